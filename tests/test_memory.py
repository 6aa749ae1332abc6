"""Memory that is freed and asked for again comes without pages that the system must clear."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from zephyr.training.memory import keep_freed

SCRIPT = """
import ctypes, resource
from zephyr.training.memory import keep_freed
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if KEEP:
    keep_freed()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(ctypes.c_size_t(2**25))
        libc.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t(2**25))
        libc.free(ctypes.c_void_p(block))
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
    assert kept < 100 < given_back  # 32 times 32 MiB, in pages of 4 KiB or, where the system likes, 2 MiB


@pytest.mark.parametrize(("most", "wanted"), [(2**31, 2**31 - 1), (2**25, 2**25)])
def test_an_older_library_is_told_the_most_it_takes(most, wanted, monkeypatch):
    """It refuses more, and has by then stopped to find the bound by itself."""
    told = {}

    def mallopt(option, value):
        taken = option != -3 or value <= most
        told.update({option: value} if taken else {})
        return taken

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed()
    assert told == {-1: -1, -2: 2**26, -3: wanted}
