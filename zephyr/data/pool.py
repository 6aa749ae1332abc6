"""A pool of processes that answers in order and holds little: for work on one piece of data after another."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from zephyr.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    worker: Callable[[], Callable[[Item], Result]], items: Iterator[Item], processes: int, lost: str
) -> Generator[Result, None, None]:
    """`worker()` of each item, in order, in fresh processes, each of which makes its worker once.

    No more than two items a process are in memory, their results included. What goes wrong is raised where it would be
    without processes: an error of `items` comes behind the results of what was before it. Raises UserError, of the
    text `lost`, when a process is killed.
    """
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (worker,))
    pending: deque[Future[Result]] = deque()
    failure: Exception | None = None
    reading = True
    try:
        while reading or pending:
            while reading and len(pending) < 2 * processes:
                try:
                    pending.append(pool.submit(_work, next(items)))
                except StopIteration:
                    reading = False
                except BrokenProcessPool:
                    raise
                except Exception as error:  # a damaged file: what was read of it comes before
                    reading, failure = False, error
            if pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(lost) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failure is not None:
        raise failure


_worker: Callable[[Any], Any]  # of a process of the pool


def _begin(worker: Callable[[], Callable[[Any], Any]]) -> None:
    """Start a process of the pool. Ctrl-C is for its parent, and it ends with that one, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _worker
    _worker = worker()


def _work(item: Any) -> Any:
    return _worker(item)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
