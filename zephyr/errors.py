"""The one exception a user is meant to read, and what other libraries' exceptions come down to."""

import os
import signal
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend: the message says what is wrong, where, and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def reason(error: Exception) -> str:
    """The first line of another library's message, with the next one where it only announces it, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(",;:")
    return text if text.endswith((".", "!", "?")) else f"{text}."


def check_writable(folder: Path, key: str) -> None:
    """Raise UserError where a folder, which need not be there yet, cannot be written to. `key` is what named it.

    Only an attempt tells: what the permissions say does not hold for root, nor for file systems that refuse of their
    own accord. Nothing is left behind.
    """
    existing = folder
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        trial = existing / f".{os.urandom(8).hex()}.tmp"
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        why = f"{existing} is not a folder that you may write to ({error.strerror})"
        raise UserError(f"Cannot write to {key}={folder}: {why}. Give another.") from error


class Stopped(BaseException):
    """A signal ended the run: exit with 128 + signal. Not an Exception: `except Exception` must miss it."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)
        super().__init__(f"stopped by {self.signal.name}")
