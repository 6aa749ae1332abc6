"""What a preparation tells: rows that are bad, examples, lengths, its report, its progress, its commands."""

import json
import re
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import small
from tests.preparing import SIZES, dialogue, job
from zephyr.prepare import __main__ as command
from zephyr.prepare import report, tally
from zephyr.prepare.engine import run
from zephyr.prepare.progress import Shown


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "a.jsonl line 7: messages[2].role is 'x' where 'user' is due; join turns.",
            ("a.jsonl", 7, "messages[2].role"),
        ),
        ("b c.parquet row 12: data is null, not a list.", ("b c.parquet", 12, "data")),
        ("d/a.jsonl line 1: invalid JSON (x at column 2). Mend it.", ("d/a.jsonl", 1, None)),
        ("a.jsonl line 3: a row must be a JSON object, not list.", ("a.jsonl", 3, None)),
        ("a.jsonl line 3: completions[1].response is not a text.", ("a.jsonl", 3, "completions[1].response")),
        ("something else", (None, None, None)),
    ],
)
def test_a_bad_row_by_its_message(message: str, expected: tuple[Any, ...]):
    row = report.bad_row(message)
    assert (row["file"], row.get("line", row.get("row")), row["field"]) == expected
    assert row["why"] and row["mend"].endswith(".")


def test_examples_do_not_depend_on_the_cut():
    places = [f"line {n}" for n in range(100)]
    for size in (1, 7, 100):
        merged = tally.Examples()
        for first in range(0, 100, size):
            some = tally.Examples()
            for place in places[first : first + size]:
                some.add("kind", place, [place])
                some.add("kind", place, ["a second of one place"])
            merged.update(json.loads(json.dumps(some.as_json())))
        found = [where for _, where, _ in merged.as_json()["kind"]]
        assert found == sorted(places, key=lambda place: zlib.crc32(place.encode()))[: tally.EXAMPLES]


def test_lengths_are_counted_in_classes():
    assert [tally.edge(n) for n in (0, 1, 9, 15, 16)] == [0, 1, 9, 15, 16]
    assert all(0.91 < tally.edge(n) / n <= 1 for n in range(16, 5000))
    assert tally.quantile(Counter({1: 50, 2: 45, 9: 5}), 0.5) == 1
    assert tally.quantile(Counter({1: 50, 2: 44, 9: 6}), 0.95) == 9


@small
def test_the_report_cannot_be_broken_by_a_text(tmp_path: Path):
    rows = [dialogue(n, first=f"loud | <b>`x\n\n# {n}") for n in range(6)]
    text = (run(job(tmp_path, rows, sizes=SIZES | {"test_sft": 1, "test_gen": 1})) / "report.md").read_text()
    assert r"| loud \| \<b\>\`x \# 0 |".replace(r"\>", ">") in text
    assert not any(line.startswith("# ") for line in text.splitlines()[1:])


def test_plain_lines_of_progress(capsys: pytest.CaptureFixture[str]):
    with Shown(1000, seconds=0.0) as shown:
        shown.skipped(500)
        time.sleep(0.05)
        shown.advance(30, 600)
    line = capsys.readouterr().err
    assert re.fullmatch(r"60%  30 rows  [\d,]+ rows/s  ETA 0:00:00\n", line), line


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "Error: Which data?"),
        (["ultrachatt"], 2, "Error: Unknown command 'ultrachatt'."),
        (["--help"], 0, "Usage: python -m zephyr.prepare COMMAND key=value"),
    ],
)
def test_the_commands_are_listed(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(arguments) == status
    said = capsys.readouterr()
    text = said.err if status else said.out
    assert words in text and all(name in text for name in command.COMMANDS)
