"""Waiting for what other processes and threads do."""

import subprocess
import time
from collections.abc import Callable


def until(met: Callable[[], object], seconds: float = 60.0, process: subprocess.Popen | None = None) -> None:
    """Return once `met()` holds; fail after so many seconds, or when the process that is to bring it about has ended."""
    end = time.monotonic() + seconds
    while not met():
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.01)
