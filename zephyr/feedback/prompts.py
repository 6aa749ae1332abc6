"""The prompts of a file: what is asked, once each, in the order of the rows.

A conversation that ends with the user's turn is a prompt as a whole; of one that has been answered, what stands before
the first answer is (zephyr.data.sources.question). A row may say in `source` where it is from.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from zephyr import demo
from zephyr.data import sources
from zephyr.data.messages import BadRow, Message, Row, checked_message, checked_messages
from zephyr.errors import UserError

_NAMED = 20  # bad rows that are named in the report; all are counted


class Prompt(NamedTuple):
    """What is asked."""

    text: str  # of the only turn, or of all with who speaks: what judges are shown and draws depend on
    messages: Sequence[Message]  # what models are sent; the last one is the user's
    source: str | None


class Prompts:
    """The prompts of a file, a folder, a hub data set or a part of the demo. To be gone through as often as one likes:
    the counts are those of the latest time. Raises UserError where there is none, BadRow at one when `bad_rows` is
    error."""

    def __init__(self, source: str, limit: int | None, bad_rows: Literal["error", "drop"]) -> None:
        self.paths: list[Path] = sources.files(demo.locate(source), "prompts")
        self.limit, self._drop = limit, bad_rows == "drop"
        self.duplicates = self.bad = 0
        self.named: list[str] = []  # what is wrong with the first of the bad ones

    def __iter__(self) -> Iterator[Prompt]:
        self.duplicates = self.bad = 0
        self.named = []
        seen: set[int] = set()  # 64 bits of each: 70 MB at a million
        for chunk in sources.chunks(self.paths):
            for row in chunk.rows():
                try:
                    if isinstance(row, BadRow):
                        raise row
                    prompt = read(row)
                except BadRow as error:
                    if not self._drop:
                        raise UserError(f"{error} Or leave such rows out: bad_rows=drop.") from error
                    self.bad += 1
                    self.named += [str(error)] if len(self.named) < _NAMED else []
                    continue
                mark = int.from_bytes(hashlib.sha256(prompt.text.encode()).digest()[:8])
                if mark in seen:
                    self.duplicates += 1
                    continue
                seen.add(mark)
                yield prompt
                if len(seen) == self.limit:
                    return
        if not seen:
            raise UserError(f"prompts: none of {self.bad:,} rows can be used. The first: {self.named[0]}")


def read(row: Row) -> Prompt:
    """The prompt of a row. Raises BadRow where it holds none."""
    where, columns = row
    messages = _open(columns, where) or sources.question(row)[0]
    checked_message("user", messages[-1]["content"], where, "the prompt")
    if not messages[-1]["content"].strip():
        raise BadRow(f"{where}: nothing is asked: the user's turn is empty.")
    source = columns.get("source")
    return Prompt(_text(messages), messages, source if isinstance(source, str) and source else None)


def _open(columns: dict[str, Any], where: str) -> list[Message] | None:
    """A conversation that ends with the user's turn, so that all of it is the prompt."""
    for name in ("prompt", "messages"):
        if isinstance(columns.get(name), list):
            messages = checked_messages(columns[name], where, name)
            if messages[-1]["role"] == "user":
                return messages
    return None


def _text(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
