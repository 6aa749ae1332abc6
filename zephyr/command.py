"""How a command ends: a mistake with one message and status 2, Ctrl-C with 130, SIGTERM with 143."""

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

from zephyr.errors import Stopped, UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def status(act: Callable[[], int | None]) -> int:
    """Do it; its exit status, 0 where it returns none. A stopped command says that the same one goes on."""
    try:
        with stoppable():
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


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Stopped at once. Stopped is what leaves this block after one, whatever became of
    it on its way: where it falls into another library's bookkeeping, that may fail by it with an error of its own, and
    what is raised in a finalizer Python drops."""
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        received.append(signum)
        raise Stopped(signum)

    before = install(stop)
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, Stopped):
            raise Stopped(received[0]) from error
        raise
    finally:
        restore(before)
    if received:
        raise Stopped(received[0])


def install(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle SIGNALS in this process and return the handlers it had."""
    owner = os.getpid()  # forked data workers inherit the handler, and a terminal sends Ctrl-C to them too

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(signum, frame)
        elif signum == signal.SIGTERM:
            os._exit(128 + signum)

    return {signum: signal.signal(signum, handle) for signum in SIGNALS}


def restore(handlers: dict[signal.Signals, Any]) -> None:
    """Put back what `install` returned, once."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    handlers.clear()


def outlived(act: Callable[[], int]) -> int:
    """The exit status of `act`, done in a child process that is told by SIGTERM when this one is gone.

    So SIGKILL too, of the process or of its group, leaves what is under way the time to end: it may be paid for.
    """
    lives, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes through the parent, once
        os.close(held)
        threading.Thread(target=_orphaned, args=(lives,), daemon=True).start()
        code = 1
        try:
            code = act()
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # whoever read them may have gone, and nothing may go on behind this
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    os.close(lives)
    for signum in SIGNALS:
        signal.signal(signum, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _orphaned(lives: int) -> None:
    os.read(lives, 1)  # returns when the other end is closed, by whatever closes it
    os.kill(os.getpid(), signal.SIGTERM)


async def interruptible(work: Awaitable[T]) -> T:
    """The work, which SIGINT and SIGTERM cancel, so that it can end in its own way; a second one does not wait. Raises
    Stopped. A handler that raised by itself would do so in the middle of whatever runs."""
    if threading.current_thread() is not threading.main_thread():
        return await work
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        return await work
    except asyncio.CancelledError:
        if received:
            raise Stopped(received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
