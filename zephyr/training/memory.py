"""Memory that a step frees stays with the process while it trains on a CPU."""

import ctypes

# of glibc's malloc.h; what they are set to, and what instead where that is refused
_TRIM_THRESHOLD = -1, -1  # bytes free at the end of the heap, from which on they are given back: never
_TOP_PAD = -2, 2**26  # bytes more than needed, when the heap grows
# Bytes of an allocation that is mapped by itself, and given back when freed. An older glibc takes no more than half of
# a heap; if it took none it would map all from 128 KiB on, as it raises that bound only until any of these is set.
_MMAP_THRESHOLD = -3, 2**31 - 1, 2**25


def keep_freed() -> None:
    """Let glibc give nothing back. Where there is another library, nothing happens.

    A step asks for the same memory as the one before, and the system clears each page that it gives: a tenth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, *values in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD):
            any(mallopt(option, value) for value in values)  # the first that it takes
