"""How a command ends: a mistake with one message and status 2, Ctrl-C with 130, SIGTERM with 143."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from zephyr.errors import Stopped, UserError


def status(act: Callable[[], int | None]) -> int:
    """Do it; its exit status, 0 where it returns none. A stopped command says that the same one goes on."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        return act() or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"Stopped by {stopped.signal.name}. The same command goes on.", file=sys.stderr)
        return 128 + stopped.signal
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        print(f"Error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)
