"""What a data set's own part of the preparation is, as the engine sees it: a function of one row."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from zephyr.data.sources import Row

Size = int | float | None  # rows, a share of them in (0, 1), or all that are left
NOTHING: Mapping[str, int] = MappingProxyType({})


class Change(NamedTuple):
    """An example for the report: a text before and after."""

    what: str
    before: str
    after: str


class Outcome(NamedTuple):
    """What became of a row."""

    record: dict[str, Any] | None  # columns of the output row, `prompt` among them; None: dropped
    rule: str | None  # why it was dropped: the rule's name, a snake_case word; None if kept
    evidence: str = ""  # the text that met the rule, at most some 80 characters
    counts: Mapping[str, int] = NOTHING  # whatever else the report counts
    changes: Sequence[Change] = ()  # at most a few
    bands: np.ndarray | None = None  # [bands] uint64: rows that share one may be near-duplicates
    signature: np.ndarray | None = None  # [entries] uint32 or uint64: the share of equal ones estimates the Jaccard


class Split(NamedTuple):
    """A part of the output. Rows of one prompt are all on one side."""

    name: str
    side: Literal["train", "test"]
    cut: bool = False  # `messages` end before the last assistant's turn, so with a user's


class Work(Protocol):
    """Rows to records; picklable, as each process of the pool gets one. Equal rows have equal outcomes, whatever came
    before them."""

    rules: Sequence[str]  # why rows may be dropped, in the order in which they are looked at
    splits: Sequence[Split]

    @property
    def schema(self) -> pa.Schema:
        """Of the records; `prompt` is one of its columns, a text."""

    def __call__(self, row: Row) -> Outcome:
        """Raises zephyr.data.sources.BadRow for a row that cannot be used, UserError where no row of its file can."""
