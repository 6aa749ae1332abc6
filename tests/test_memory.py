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
faults(8)  # until the heap has settled
print(faults(4))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc is what is told")
def test_what_is_freed_is_kept():
    counted = [
        int(
            subprocess.run([sys.executable, "-c", SCRIPT.replace("KEEP", keep)], capture_output=True, check=True).stdout
        )
        for keep in ("True", "False")
    ]
    assert counted[0] < 100 < counted[1]  # 4 times 32 MiB, in pages of 4 KiB or, where the system likes, 2 MiB
