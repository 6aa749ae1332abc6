"""What became of the rows: report.json for programs, report.md for people, bad_rows.jsonl for who mends them."""

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from zephyr.prepare.folder import Input
from zephyr.prepare.tally import Examples, quantile

_PLACE = re.compile(r"(?P<file>.+?) (?P<kind>line|row) (?P<number>\d+): (?P<what>.*)", re.DOTALL)
_FIELD = re.compile(r"[A-Za-z_][\w-]*(\[\d+\]|\.[A-Za-z_]\w*)*")
_SHOWN = 10  # bad rows in report.md
_CELL = 160  # characters


@dataclass
class Totals:
    """Sums over all parts: rows = kept + bad + the sum of dropped."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    examples: Examples = field(default_factory=Examples)
    shown: list[dict[str, Any]] = field(default_factory=list)  # the first bad rows
    first: list[str] = field(default_factory=list)  # the first one's message

    def add(self, part: dict[str, Any], bad_rows: IO[str]) -> None:
        """A part's own account, as zephyr.prepare.parts wrote it; its bad rows go to the file."""
        self.rows += part["rows"]
        self.kept += part["kept"]
        self.bad += len(part["bad"])
        self.dropped.update(part["dropped"])
        self.counts.update(part["counts"])
        self.examples.update(part["examples"])
        for name, counts in part["lengths"].items():
            self.lengths.setdefault(name, Counter()).update({int(length): count for length, count in counts.items()})
        self.first = self.first or part["bad"][:1]
        for message in part["bad"]:
            row = bad_row(message)
            bad_rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(self.shown) < _SHOWN:
                self.shown.append(row)


def bad_row(message: str) -> dict[str, Any]:
    """The parts of a message "FILE line N: FIELD why. How to mend."."""
    place = _PLACE.fullmatch(message)
    if place is None:
        return {"file": None, "line": None, "field": None, "why": message, "mend": "Mend the row or leave it out."}
    why, mend = [*re.split(r"\. |; ", place["what"], maxsplit=1), ""][:2]
    name = _FIELD.match(why)
    known = name and (name[0] in why.split("=")[0].split(" ")[0].rstrip(":")) and ("[" in name[0] or " is " in why)
    return {
        "file": place["file"],
        place["kind"]: int(place["number"]),
        "field": name[0] if known and name else None,
        "why": why.rstrip("."),
        "mend": mend or "Mend the row or leave it out.",
    }


def as_json(
    totals: Totals, rules: Sequence[str], splits: Mapping[str, int], settings: Mapping[str, Any],
    inputs: Iterable[Input], fingerprint: str, run: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """report.json; everything but `run` and `versions` is the same whenever the same is prepared."""
    packages = ("zephyr", "pyarrow", "numpy")
    return {
        "rows_in": totals.rows,
        "rows_out": totals.kept,
        "bad_rows": totals.bad,
        "dropped": {rule: totals.dropped[rule] for rule in rules},
        "splits": dict(splits),
        "counts": dict(sorted(totals.counts.items())),
        "lengths": {
            name: {"median": quantile(counts, 0.5), "95 %": quantile(counts, 0.95), "most": max(counts)}
            for name, counts in sorted(totals.lengths.items())
        },
        "settings": dict(settings),
        "input": [{"file": file.name, "bytes": file.size, "blake2b": file.digest} for file in inputs],
        "fingerprint": fingerprint,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "run": dict(run),
    }


def as_markdown(report: Mapping[str, Any], totals: Totals, rules: Sequence[str], plots: Sequence[str]) -> str:
    """report.md; the same whenever the same is prepared."""
    lines = ["# What became of the rows", "", "| | rows in | left out | rows on |", "| --- | ---: | ---: | ---: |"]
    rows = report["rows_in"]
    for name, count in (("unusable", report["bad_rows"]), *((rule, report["dropped"][rule]) for rule in rules)):
        lines.append(f"| {name} | {rows:,} | {count:,} | {rows - count:,} |")
        rows -= count
    lines += [f"| **kept** | **{report['rows_in']:,}** | **{report['rows_in'] - rows:,}** | **{rows:,}** |", ""]
    lines += ["## Splits", "", *_table(("split", "rows"), report["splits"].items())]
    if report["lengths"]:
        lines += ["## Lengths", "", "Of the rows that all rules kept; exact below 16, within 9 % above.", ""]
        measures = ((name, *values.values()) for name, values in report["lengths"].items())
        lines += _table(("", "median", "95 %", "most"), measures)
        lines += [f"![{Path(plot).stem}]({plot})" for plot in plots]
        lines.append("")
    if report["counts"]:
        lines += ["## Counts", "", *_table(("", "count"), report["counts"].items())]
    examples = totals.examples.as_json()
    for kind, title, names in (
        ("change", "Changes", ("where", "before", "after")),
        ("drop", "Left out", ("where", "evidence")),
    ):
        found = {name.split("/", 1)[1]: items for name, items in examples.items() if name.startswith(kind + "/")}
        if found:
            lines += [f"## {title}", ""]
        for name, items in found.items():
            lines += [f"### {name}", "", *_table(names, ((where, *texts) for _, where, texts in items))]
    if totals.shown:
        said = f"{totals.bad:,} of them, all in [bad_rows.jsonl](bad_rows.jsonl); the first:"
        lines += ["## Unusable rows", "", said, ""]
        bad = ((f"{row['file']} {row.get('line', row.get('row'))}", row["why"], row["mend"]) for row in totals.shown)
        lines += _table(("where", "why", "how to mend"), bad)
    lines += ["## Input and settings", ""]
    lines += _table(("file", "bytes", "blake2b"), (file.values() for file in report["input"]))
    lines += ["```json", json.dumps(report["settings"], indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


def _table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = list(names)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = " ".join(str(value).split())
    text = text if len(text) <= _CELL else text[: _CELL - 1] + "…"
    return re.sub(r"([\\`*_|<\[\]#])", r"\\\1", text)
