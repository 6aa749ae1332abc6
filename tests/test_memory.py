"""Memory that is freed and asked for again comes without pages that the system must clear."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from zephyr.training.memory import keep_freed
if KEEP:
    keep_freed()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(2**23).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(8)
print(faults(32))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc is what is told")
def test_what_is_freed_is_kept():
    kept, given_back = [
        int(
            subprocess.run([sys.executable, "-c", SCRIPT.replace("KEEP", keep)], capture_output=True, check=True).stdout
        )
        for keep in ("True", "False")
    ]
    # 32 MiB are 8,192 pages, or 16 where the system makes them large. A small object that comes to lie in the freed
    # block moves the next one elsewhere, whose pages are new: now and then, not each time.
    assert given_back >= 32 * 16
    assert kept < given_back / 8
