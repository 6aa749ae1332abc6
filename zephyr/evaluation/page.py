"""A report in two forms from one content: Markdown with PNG files beside it, and one HTML page that needs nothing else.

Whatever a model wrote, or is called, is text: in the page it is escaped, and the page's policy lets no other script
run and nothing be fetched; in Markdown it stands in a fence that it cannot close.
"""

import base64
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from zephyr.evaluation.charts import Image

_FOLDER = Path(__file__).parent


class Cell(NamedTuple):
    """Of a table."""

    text: str
    note: str = ""  # said small behind it
    value: float | None = None  # that a numeric column is sorted by


class Column(NamedTuple):
    """Of a table: numbers stand to the right."""

    name: str
    numeric: bool = True


class Table(NamedTuple):
    """The first column names the rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


class Plot(NamedTuple):
    """With what it shows in words, for those who do not see it."""

    name: str  # of its file
    title: str
    alt: str
    draw: Callable[[], Image]


class Said(NamedTuple):
    """What a model answered, and what came of it."""

    by: str
    text: str
    verdict: str = ""


class Turn(NamedTuple):
    """A question and its answers, side by side."""

    question: str
    answers: Sequence[Said]


class Example(NamedTuple):
    """A conversation."""

    title: str
    turns: Sequence[Turn]


class Section(NamedTuple):
    """A part of the report."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    examples: Sequence[Example] = ()
    points: Sequence[str] = ()

    @property
    def anchor(self) -> str:
        """What links in the page say."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


class Page(NamedTuple):
    """The whole."""

    title: str
    text: str
    sections: Sequence[Section]


def to_html(page: Page, images: Mapping[str, Image]) -> str:
    """One page with the plots' images: nothing is fetched, and the one script is the page's own."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.from_string((_FOLDER / "report.html.jinja").read_text(encoding="utf-8"))
    return _encodable(template.render(page=page, images=images, script=script, digest=digest))


def to_markdown(page: Page) -> str:
    """Its plots are expected beside it as NAME.png."""
    lines = [f"# {_inline(page.title)}", "", _inline(page.text), ""]
    for section in page.sections:
        lines += [f"## {_inline(section.title)}", ""]
        if section.text:
            lines += [_inline(section.text), ""]
        for table in section.tables:
            lines += _table(table)
        for plot in section.plots:
            lines += [f"![{_inline(plot.alt)}]({plot.name}.png)", ""]
        for example in section.examples:
            lines += [f"### {_inline(example.title)}", ""]
            for turn in example.turns:
                lines += _quoted("Question", turn.question)
                for said in turn.answers:
                    lines += _quoted(said.by + (f" ({said.verdict})" if said.verdict else ""), said.text)
        lines += [f"- {_inline(point)}" for point in section.points] + [""] * bool(section.points)
    return _encodable("\n".join(lines).rstrip() + "\n")


def _encodable(text: str) -> str:
    """Halves of characters, which a model may write, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _table(table: Table) -> list[str]:
    def row(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |"

    cells = [[_inline(f"{cell.text} ({cell.note})" if cell.note else cell.text) for cell in row] for row in table.rows]
    head = [row([_inline(column.name) for column in table.columns])]
    head.append(row(["---:" if column.numeric else "---" for column in table.columns]))
    note = [_inline(table.note), ""] if table.note else []
    return [f"**{_inline(table.title)}**", "", *head, *map(row, cells), "", *note]


def _quoted(by: str, text: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"**{_inline(by)}**", "", f"{fence}text", text, fence, ""]


def _inline(text: str) -> str:
    """Text that is nothing but text to Markdown, on one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escaped)
