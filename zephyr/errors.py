"""The one exception a user is meant to read, and what other libraries' exceptions come down to."""

import signal


class UserError(Exception):
    """A mistake the user can mend: the message says what is wrong, where, and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def reason(error: Exception) -> str:
    """The first line of another library's message, with the next one where it only announces it, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(",;:")
    return text if text.endswith((".", "!", "?")) else f"{text}."


class Stopped(BaseException):
    """A signal ended the run: exit with 128 + signal. Not an Exception: `except Exception` must miss it."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)
        super().__init__(f"stopped by {self.signal.name}")
