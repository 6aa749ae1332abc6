"""A rank's side of a job: `python -m zephyr.launching.worker FROZEN` trains what the file says, and writes
down how it ended.

Only the launcher runs it. It never prints a traceback: that goes into the file that the launcher reads.
"""

import json
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from zephyr import distributed
from zephyr.errors import Stopped, UserError
from zephyr.running import rank_log

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended."""

    # killed: by a signal out of the blue; bereft: for want of another rank; cut: by the launcher
    kind: Literal["done", "mistake", "stopped", "defect", "killed", "bereft", "cut"]
    time: float  # seconds since 1970
    message: str = ""  # of a mistake, for the user; of a defect, its traceback
    signal: int = 0
    metric: float | None = None

    @property
    def status(self) -> int:
        """The exit status that says so."""
        return {"done": 0, "mistake": 2, "stopped": 128 + self.signal}.get(self.kind, 1)


def outcome_file(frozen: Path, rank: int) -> Path:
    """Where a rank says how it ended."""
    return frozen.with_name(f"rank-{rank}.json")


def log_file(frozen: Path, rank: int) -> Path:
    """Where a rank other than 0 writes until `rank_log.move`."""
    return frozen.with_name(f"rank-{rank}.log")


def serve(body: Callable[[dict[str, Any]], float | None], frozen: Path) -> None:
    """Run `body` on the frozen configuration and leave its outcome beside it. Returns only if it returned."""
    for signum in SIGNALS:
        signal.signal(signum, _exit)  # until the run has its own: importing it takes seconds
    _follow_parent(frozen)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed process flushes nothing
    rank_log.begin(log_file(frozen, distributed.rank()))
    try:
        outcome = Outcome("done", time.time(), metric=body(json.loads(frozen.read_text())))
    except BaseException as error:
        outcome = _judge(error)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    file = outcome_file(frozen, distributed.rank())
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(outcome)))
    unfinished.replace(file)
    if outcome.kind != "done":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.status)  # an orderly end could wait for processes and threads that are stuck


def _judge(error: BaseException) -> Outcome:
    """What an exception means: the oldest of its chain that is of a known kind decides, since failures follow on it."""
    now = time.time()
    for link in reversed(list(_chain(error))):
        if isinstance(link, UserError):
            return Outcome("mistake", now, str(link))
        if (signum := _stopped_by(link)) is not None:
            return Outcome("stopped", now, signal=signum)
        if isinstance(link, distributed.PartnerFailed) or _broken_connection(link):
            return Outcome("bereft", now, _format(error))
    return Outcome("defect", now, _format(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _stopped_by(error: BaseException) -> int | None:
    if isinstance(error, SystemExit) and error.code in [128 + signum for signum in SIGNALS]:
        return error.code - 128
    return error.signal if isinstance(error, Stopped) else None


def _broken_connection(error: BaseException) -> bool:
    """Whether torch says that another process cannot be reached any more."""
    if any(kind.__name__ == "DistError" and kind.__module__ == "torch.distributed" for kind in type(error).__mro__):
        return True
    return type(error) is RuntimeError and "gloo" in str(error)  # gloo's bear the path of its source


def _format(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _follow_parent(frozen: Path) -> None:
    """End at once, data workers and all, when the launcher is gone: its end of the pipe on standard input closes."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode) or os.getsid(0) != os.getpid():
        return  # run by hand
    pipe = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)

    def follow() -> None:
        os.read(pipe, 1)
        frozen.unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def _train(config: dict[str, Any]) -> float | None:
    from zephyr.run import run
    from zephyr.settings import parse

    return run(parse(config), config)


def main() -> None:
    """`python -m zephyr.launching.worker FROZEN`."""
    serve(_train, Path(sys.argv[1]))


if __name__ == "__main__":
    from zephyr.launching import worker  # as run.py knows it, which this module, __main__, is not

    worker.main()
