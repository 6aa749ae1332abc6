"""Which rows make up which split: an interval of the keys, so that a prompt is on one side wherever it occurs.

The key of a row is a 64-bit hash of the seed and its prompt. The test side are the rows with the smallest keys, and a
split of n rows the first n of its side by key. Rows of one prompt stay together: where the last prompt of a split
occurs several times, the split is so many rows larger.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zephyr.errors import UserError
from zephyr.prepare.work import Size, Split

Interval = tuple[int, int]  # of the keys: above the first, up to the second
Keys = Callable[[], Iterator[np.ndarray]]  # the keys of all rows, piece by piece; read several times
ALL = 2**64 - 1


def intervals(splits: Sequence[Split], sizes: Mapping[str, Size], keys: Keys, rows: int) -> dict[str, Interval]:
    """The interval of each split; `rows` is the number of keys.

    Raises UserError if the test side would leave nothing to train on, or no size says how large it is.
    """
    wanted = {split.name: _rows(sizes[split.name], rows) for split in splits}
    tests = {split.name: wanted[split.name] for split in splits if split.side == "test"}
    most = max((size for size in tests.values() if size is not None), default=None)
    if most is None and tests:
        raise UserError(f"splits: at least one of {', '.join(tests)} needs a size: rows, or a share of them.")
    most = most or 0
    if most >= rows and len(tests) < len(splits):
        name = next(name for name, size in tests.items() if size == most)
        raise UserError(
            f"splits.{name}={most} leaves nothing to train on: there are {rows:,} rows. Give a smaller size."
        )
    border = nth(keys, most) if most else -1
    tested = sum(int((part <= border).sum()) for part in keys()) if most else 0
    if tested >= rows and len(tests) < len(splits):
        raise UserError(f"{rows:,} rows have too few prompts for a test side of {most:,}: none is left to train on.")
    found: dict[str, Interval] = {}
    for split in splits:
        size = wanted[split.name]
        if split.side == "test":
            found[split.name] = (-1, border if size is None else nth(keys, size) if size else -1)
        else:
            last = ALL if size is None or tested + size >= rows else nth(keys, tested + size) if size else border
            found[split.name] = (border, last)
    return found


def _rows(size: Size, rows: int) -> int | None:
    return size if size is None or isinstance(size, int) else round(size * rows)


def nth(keys: Keys, rank: int) -> int:
    """The key of this rank (1: the smallest), found 16 bits at a time, without holding the keys."""
    prefix = 0
    for shift in (48, 32, 16, 0):
        histogram = np.zeros(1 << 16, np.int64)
        for part in keys():
            here = part if shift == 48 else part[part >> np.uint64(shift + 16) == prefix]
            histogram += np.bincount((here >> np.uint64(shift)).astype(np.int64) & 0xFFFF, minlength=1 << 16)
        below = np.cumsum(histogram)
        digit = int(np.searchsorted(below, rank))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    return prefix


def inside(keys: np.ndarray, interval: Interval) -> np.ndarray:
    """[rows] bool."""
    low, high = interval
    if high < 0 or low >= ALL:
        return np.zeros(len(keys), bool)
    mask = keys <= np.uint64(high)
    return mask if low < 0 else mask & (keys > np.uint64(low))


def cut(table: pa.Table) -> pa.Table:
    """The table with each dialogue's `messages` ending before the last assistant's turn (as they are, without one)."""
    messages = table.column("messages").combine_chunks()
    if isinstance(messages, pa.ChunkedArray):
        messages = messages.chunk(0) if messages.num_chunks else pa.array([], messages.type)
    offsets = messages.offsets.to_numpy()
    flat = messages.values
    spoken = pc.equal(flat.field("role"), "assistant").to_numpy(zero_copy_only=False)
    turns = np.flatnonzero(spoken)
    last = np.searchsorted(turns, offsets[1:]) - 1  # of the dialogue, if it is not of one before
    ends = offsets[1:].copy()
    if len(turns):
        found = (last >= 0) & (turns[last] >= offsets[:-1])
        ends[found] = turns[last[found]]
    starts = offsets[:-1]
    taken = np.zeros(len(flat) + 1, np.int64)
    np.add.at(taken, starts, 1)
    np.add.at(taken, ends, -1)
    kept = flat.filter(pa.array(np.cumsum(taken)[:-1] > 0))
    bounds = np.zeros(len(offsets), np.int32)
    np.cumsum(ends - starts, out=bounds[1:])
    column = pa.ListArray.from_arrays(pa.array(bounds), kept)
    place = table.schema.get_field_index("messages")
    return table.set_column(place, table.schema.field(place), column.cast(table.schema.field(place).type))
