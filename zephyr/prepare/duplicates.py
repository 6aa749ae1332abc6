"""Near-duplicates over the whole data set, in memory that does not grow with it.

A row is dropped if, in one of its bands, the first row of the input with the same band hash is another one, and the
share of equal entries of the two signatures (the estimate of their Jaccard similarity) is at least the threshold. So
the first row of a cluster always stays, and what is dropped depends neither on the order of bands nor on what else
was dropped. It is locality-sensitive hashing (Leskovec, Rajaraman and Ullman, 2020, section 3.4) with one comparison
a band and row: a row that is similar to a later one of its band alone stays.

The band hashes are spread over files by value, so that equal ones meet in one, which is then sorted in memory.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_FILES = 256  # of a million rows with 32 bands, each holds 1.5 MB
_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u4")])
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads hashes that differ in their low bits alone
_APART = np.uint64(0xD6E8FEB86659FD93)  # keeps equal hashes of different bands apart


class Near(NamedTuple):
    """What was found."""

    of: np.ndarray  # [rows] int32: the row that a dropped one resembles, -1 where a row stays

    @property
    def dropped(self) -> np.ndarray:
        """[rows] bool."""
        return self.of >= 0


def near_duplicates(parts: Iterable[tuple[np.ndarray, np.ndarray]], rows: int, threshold: float, scratch: Path) -> Near:
    """Of parts in input order, each [n, bands] uint64 and [n, entries] of signatures, of so many rows together;
    `scratch` is a folder that is there for this alone. Bands and entries are the same for all parts."""
    of = np.full(rows, -1, np.int32)
    scratch.mkdir(parents=True, exist_ok=True)
    row = 0
    entry: np.dtype[Any] = np.dtype(np.uint8)
    with ExitStack() as stack:
        files = [stack.enter_context((scratch / f"{number:03d}").open("wb")) for number in range(_FILES)]
        signatures = stack.enter_context((scratch / "signatures").open("wb"))
        for bands, signed in parts:
            _spread(bands, row, files)
            signed.tofile(signatures)
            row += len(bands)
            entry = np.dtype((signed.dtype, signed.shape[1:]))
    descriptor = os.open(scratch / "signatures", os.O_RDONLY)
    try:
        for number in range(_FILES):
            entries = np.fromfile(scratch / f"{number:03d}", _ENTRY)
            _compare(entries, of, descriptor, entry, threshold)
    finally:
        os.close(descriptor)
    return Near(of)


def _spread(bands: np.ndarray, first: int, files: Sequence[BinaryIO]) -> None:
    """Append the entries of a part to the files that they belong in."""
    rows, width = bands.shape
    entries = np.empty(rows * width, _ENTRY)
    entries["hash"] = ((bands + np.arange(width, dtype=np.uint64) * _APART) * _ODD).ravel()
    entries["row"] = np.repeat(np.arange(first, first + rows, dtype=np.uint32), width)
    target = entries["hash"] >> np.uint64(56)
    entries = entries[np.argsort(target, kind="stable")]
    ends = np.cumsum(np.bincount(target.astype(np.int64), minlength=_FILES))
    for file, start, end in zip(files, [0, *ends[:-1]], ends, strict=True):
        entries[start:end].tofile(file)


def _compare(entries: np.ndarray, of: np.ndarray, signatures: int, entry: np.dtype[Any], threshold: float) -> None:
    """Mark the rows that resemble the first of those with the same hash."""
    order = np.lexsort((entries["row"], entries["hash"]))
    hashes, rows = entries["hash"][order], entries["row"][order].astype(np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = hashes[1:] != hashes[:-1]
    firsts = rows[new][np.cumsum(new) - 1] if len(rows) else rows
    later = rows != firsts  # a row of which two bands are equal is no duplicate of itself
    pairs = np.unique(np.stack([firsts[later], rows[later]], axis=1), axis=0)
    held, signature = -1, np.empty(0)
    for first, row in pairs.tolist():
        if 0 <= of[row] <= first:  # found already
            continue
        if first != held:
            held, signature = first, _signature(signatures, entry, first)
        if (signature == _signature(signatures, entry, row)).mean() >= threshold:
            of[row] = first


def _signature(descriptor: int, entry: np.dtype[Any], row: int) -> np.ndarray:
    content = os.pread(descriptor, entry.itemsize, row * entry.itemsize)
    return np.frombuffer(content, entry.base)
