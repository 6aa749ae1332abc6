"""A work as small as can be, for the engine's tests: a module of its own, which a fresh process imports in no time."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zephyr.data.sources import BadRow, Row, conversation
from zephyr.errors import UserError
from zephyr.prepare.engine import Job
from zephyr.prepare.work import Change, Outcome, Split

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


class Shout:
    """Drops dialogues that say "drop me", counts messages, and writes prompts that hold "loud" in capitals."""

    rules = ("said_drop", "never_met")
    splits = (
        Split("train_sft", "train"),
        Split("test_sft", "test"),
        Split("train_gen", "train", cut=True),
        Split("test_gen", "test", cut=True),
    )

    def __init__(self, near: bool = False, seconds: float = 0.0, die_at: str = "", log: Path | None = None) -> None:
        self.near, self.seconds, self.die_at, self.log = near, seconds, die_at, log

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([("prompt", pa.string()), ("messages", pa.list_(MESSAGE))])

    def __call__(self, row: Row) -> Outcome:
        if self.seconds:
            ends = time.perf_counter() + self.seconds
            while time.perf_counter() < ends:
                pass
        where, columns = row
        if not {"messages", "data"} & set(columns):
            raise BadRow(f"{where}: messages is missing. Give each row its messages.")
        try:
            messages = conversation(row)
        except BadRow:
            raise
        except UserError as error:
            raise BadRow(str(error)) from error
        prompt = messages[0]["content"]
        if self.die_at and prompt == self.die_at:
            os._exit(1)
        counts = Counter(messages=len(messages))
        if any("drop me" in message["content"] for message in messages):
            return Outcome(None, "said_drop", "drop me", counts)
        changes = []
        if "loud" in prompt:
            changes.append(Change("shouted", prompt, prompt.upper()))
            counts["shouted"] += 1
            messages = [{**messages[0], "content": prompt.upper()}, *messages[1:]]
        record: dict[str, Any] = {"prompt": messages[0]["content"], "messages": messages}
        if not self.near:
            return Outcome(record, None, "", counts, changes)
        # a signature of the prompt's first eight letters, and two bands of its halves
        letters = np.frombuffer(prompt[:8].ljust(8).encode(), np.uint8).astype(np.uint32)
        bands = letters.astype(np.uint8).view(np.uint32).astype(np.uint64)
        return Outcome(record, None, "", counts, changes, bands, letters)


SIZES = {"train_sft": None, "test_sft": 0.2, "train_gen": 15, "test_gen": 4}


def dialogue(number: int, turns: int = 2, first: str = "") -> dict[str, Any]:
    texts = [first or f"question {number}", *(f"turn {turn} of {number}" for turn in range(1, turns))]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


MIXED = [
    *(dialogue(n, turns=2 + n % 3) for n in range(40)),
    dialogue(40, first="a loud one"),
    dialogue(41, first="please drop me"),
    b"{not json",
    dialogue(43, first="please drop me too"),
    {"messages": "text"},
]


def job(folder: Path, rows: list[Any] = MIXED, **changes: Any) -> Job:
    source = folder / "rows.jsonl"
    if not source.exists():
        source.write_bytes(lines(*rows))
    known: dict[str, Any] = {
        "work": Shout(), "input": str(source), "output": str(folder / "out"), "settings": {"volume": 11}, "seed": 3,
        "sizes": SIZES, "bad_rows": "drop", "similarity": None, "processes": 1,
    }  # fmt: skip
    return Job(**known | changes)
