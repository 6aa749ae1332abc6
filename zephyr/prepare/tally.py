"""What a report is made of, as parts of the data add to it: examples and lengths, the same however the data are cut."""

import heapq
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

EXAMPLES = 5  # of a kind
_TEXT = 200  # characters of an example
# Lengths are counted up to the next edge: exact below 16, within 9 % above.
_EDGES = sorted({round(2 ** (step / 8)) for step in range(8 * 31)} | set(range(16)))


class Examples:
    """A few of each kind, spread over the whole input: those whose place has the smallest hash."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[int, str, list[str]]]] = {}

    def add(self, kind: str, where: str, texts: Iterable[str]) -> None:
        """An example: where it stands, and the texts that show it. The first of its place counts."""
        kept = self._kept.setdefault(kind, [])
        mark = -zlib.crc32(where.encode())
        if any(place == where for _, place, _ in kept):
            return
        if len(kept) < EXAMPLES or (mark, where) > kept[0][:2]:
            self._push(kept, (mark, where, [text[:_TEXT] for text in texts]))

    def update(self, others: dict[str, list[list[Any]]]) -> None:
        """Those of another part, as `as_json` gave them."""
        for kind, found in others.items():
            kept = self._kept.setdefault(kind, [])
            for mark, where, texts in found:
                self._push(kept, (mark, where, texts))

    def _push(self, kept: list[tuple[int, str, list[str]]], example: tuple[int, str, list[str]]) -> None:
        heapq.heappush(kept, example)
        if len(kept) > EXAMPLES:
            heapq.heappop(kept)

    def as_json(self) -> dict[str, list[tuple[int, str, list[str]]]]:
        """By kind, in order of their hash."""
        return {kind: sorted(kept, reverse=True) for kind, kept in sorted(self._kept.items())}


def edge(length: int) -> int:
    """The lower end of the class that a length is counted in."""
    return _EDGES[bisect_right(_EDGES, length) - 1]


def lengths(record: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """What is measured of a record: messages, and characters by role or side."""
    for side in ("chosen", "rejected"):
        if record.get(side):
            yield f"characters/{side} completion", len(record[side][-1]["content"])
    messages = record.get("messages") or ()
    if messages:
        yield "messages/dialogue", len(messages)
    for message in messages:
        yield f"characters/{message['role']} message", len(message["content"])


def quantile(histogram: Counter[int], share: float) -> int:
    """The class in which this share of the lengths is reached."""
    wanted, seen = share * histogram.total(), 0
    for length in sorted(histogram):
        seen += histogram[length]
        if seen >= wanted:
            return length
    return 0
