"""Training loops in threads of their own, of which one at a time runs, step by step."""

import gc
import resource
import threading
import time
from collections.abc import Callable
from ctypes import CDLL
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """What a turn took."""

    cpu_seconds: float  # of the process, all threads
    seconds: float  # of the wall clock

    def __add__(self, other: tuple[object, ...]) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(self.cpu_seconds + other.cpu_seconds, self.seconds + other.seconds)


class Finished(BaseException):
    """Raised inside a loop that is no longer wanted."""


class Player:
    """A training loop that stands still at the end of every step until it is given the next turn.

    `train` builds the loop and runs it; it calls the function that it is given wherever a step has ended. A turn thus
    goes from the end of one step to the end of the next: loading, collation, both passes, the optimizer's step and
    whatever the loop does besides. The first turn includes building and is the warm-up.
    """

    def __init__(self, name: str, train: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._wanted, self._error = True, None
        self._thread = threading.Thread(target=self._run, args=(train,), name=name, daemon=True)
        self._thread.start()

    def turn(self) -> Cost:
        """Let the loop finish one step. Raises what the loop raises."""
        cpu, wall = time.process_time(), time.perf_counter()
        self._go.release()
        self._back.acquire()
        cost = Cost(time.process_time() - cpu, time.perf_counter() - wall)
        if self._error is not None:
            raise RuntimeError(f"the loop of {self.name} ended") from self._error
        return cost

    def end(self) -> None:
        """Leave the loop."""
        self._wanted = False
        self._go.release()
        self._thread.join()

    def _run(self, train: Callable[[Callable[[], None]], None]) -> None:
        self._go.acquire()
        try:
            torch.set_num_threads(1)  # a new thread does not inherit it
            train(self._step_ended)
            raise RuntimeError("it ran out of steps")
        except Finished:
            pass
        except BaseException as error:
            self._error = error  # type: ignore[assignment]
        self._back.release()

    def _step_ended(self) -> None:
        self._back.release()
        self._go.acquire()
        if not self._wanted:
            raise Finished


def transient_mib(turn: Callable[[], object]) -> float:
    """How far a turn's peak of resident memory lies above what was resident before it, in MiB. Linux only."""
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    turn()
    return _status("VmHWM") - before


def peak_mib() -> float:
    """The process's highest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """The process's resident memory now, in MiB."""
    return _status("VmRSS")


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
