"""Where the processes of a run write but the first: only that one speaks on the terminal."""

import os
import sys
import time
from pathlib import Path

from zephyr import distributed

_log: Path | None = None  # where the launcher has this process write before there is an output_dir


def begin(log: Path) -> None:
    """This process writes to `log`, if there is one, until `move`."""
    global _log
    if log.exists():
        _log = log


def move(output_dir: Path) -> None:
    """Let a rank other than 0 write to output_dir/ranks/rank-N.log from now on. What it wrote before goes along."""
    global _log
    if distributed.rank() == 0:
        return
    path = output_dir / "ranks" / f"rank-{distributed.rank()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        if file.tell() > 0:  # a resumed run
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
        if _log is not None:
            file.write(_log.read_bytes())
            file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if _log is not None:
        _log.unlink()  # by which the launcher knows
        _log = None
