"""The splits as Parquet files, laid out as on the hub: data/train_sft-00000-of-00003.parquet."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zephyr.prepare.folder import durable
from zephyr.prepare.parts import WHERE
from zephyr.prepare.splits import Interval, cut, inside
from zephyr.prepare.work import Split

ROWS, GROUP = 100_000, 5_000  # of a file, and of what is read of it at once


class File(NamedTuple):
    """A file to be written: some rows of a split."""

    split: Split
    name: str
    first: int  # row of the split
    rows: int
    parts: tuple[int, int]  # the parts from the one that has the first row, up to the one that has the last
    skip: int  # rows of the split in the first of those that come before


class Writer:
    """Writes files from parts. Rows keep the order of the input."""

    def __init__(self, parts: Path, names: Sequence[str], stays: Path | None, starts: Sequence[int], data: Path,
                 intervals: Mapping[str, Interval], schema: pa.Schema) -> None:  # fmt: skip
        self.parts, self.names, self.stays, self.starts = parts, names, stays, starts
        self.data, self.intervals, self.schema = data, intervals, schema

    def keys(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a part's rows, [rows] uint64, and which of them stay, [rows] bool."""
        keys = np.load(self.parts / f"{self.names[number]}.keys.npy")
        if self.stays is None:
            return keys, np.ones(len(keys), bool)
        return keys, np.fromfile(self.stays, bool, len(keys), offset=self.starts[number])

    def mask(self, number: int, split: str) -> np.ndarray:
        """Which rows of a part are in a split, [rows] bool."""
        keys, stays = self.keys(number)
        return inside(keys, self.intervals[split]) & stays

    def files(self, splits: Sequence[Split]) -> Iterator[File]:
        """Every file of the splits, none of which is without a file."""
        for split in splits:
            counts = np.array([self.mask(number, split.name).sum() for number in range(len(self.names))], np.int64)
            ends = np.cumsum(counts)
            total = int(ends[-1])
            files = max(1, -(-total // ROWS))
            for number in range(files):
                first, last = number * total // files, (number + 1) * total // files
                start, stop = np.searchsorted(ends, [first, last - 1], "right")
                name = f"{split.name}-{number:05d}-of-{files:05d}.parquet"
                span = (int(start), int(stop) + 1) if total else (0, 0)
                skip = first - int(ends[start] - counts[start]) if total else 0
                yield File(split, name, first, last - first, span, skip)

    def __call__(self, file: File) -> int:
        """Write a file, unless it is there. Its rows."""
        path = self.data / file.name
        if path.exists():
            return file.rows
        with (
            durable(path) as temporary,
            # checksums, so that damage to a text is noticed where it would still be Parquet
            pq.ParquetWriter(
                temporary, self.schema, compression="zstd", compression_level=3, write_page_checksum=True
            ) as writer,
        ):
            waiting: list[pa.Table] = []
            for table in self._tables(file):
                waiting.append(table)
                if sum(map(len, waiting)) >= GROUP:
                    joined = pa.concat_tables(waiting)
                    full = len(joined) // GROUP * GROUP
                    writer.write_table(joined.slice(0, full), row_group_size=GROUP)
                    # copied, so that what was written is not held by what is left
                    waiting = [joined.slice(full).take(np.arange(len(joined) - full))]
            if left := pa.concat_tables(waiting) if waiting else None:
                writer.write_table(left)
        return file.rows

    def _tables(self, file: File) -> Iterator[pa.Table]:
        left, skip = file.rows, file.skip
        for number in range(*file.parts):
            part = pq.ParquetFile(self.parts / f"{self.names[number]}.parquet").read(use_threads=False)
            table = part.drop_columns([WHERE]).filter(pa.array(self.mask(number, file.split.name)))
            table, skip = table.slice(skip, left), 0
            left -= len(table)
            if len(table):
                yield cut(table) if file.split.cut else table
