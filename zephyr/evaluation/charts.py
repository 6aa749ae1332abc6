"""The report's plots: drawn once, kept as PNG for Markdown and as SVG that takes a page's colours."""

import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zephyr.observe.plots import BLUE, GREEN, ORANGE, RED

INK, PALE = "#24292f", "#d5dae0"  # of text and of lines; a page has its own instead
COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#8C6D31", "#7F7F7F")  # of models
_WIDTH = 5.4  # inches: text of 9 points is then as large on a phone
_STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have dollars
}
_OWN = {INK: "currentColor", "#d9d9d9": "var(--line)", "#b3b3b3": "var(--line)", PALE: "var(--line)",
        "#737373": "var(--quiet)", BLUE: "var(--accent)"}  # fmt: skip


class Image(NamedTuple):
    """A plot in two forms."""

    png: bytes
    svg: str


class Value(NamedTuple):
    """A figure with its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Point(NamedTuple):
    """Of a calibration curve: pairs that were said to agree with such a probability, and how many did."""

    expected: float
    observed: float
    n: int


def drawn(draw: Callable[[], Figure], name: str) -> Image:
    """The plot as both; equal plots give equal bytes. `name` tells its parts from those of a page's other plots."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, image, vector = draw(), io.BytesIO(), io.StringIO()
        figure.savefig(image, format="png", dpi=160, metadata={"Software": None}, facecolor="white")
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
    return Image(image.getvalue(), inlined(vector.getvalue()))


def written(draw: Callable[[Path], list[Path]]) -> Image:
    """The same of a function that writes the PNG that it is told, and an SVG beside it; it returns the two."""
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(_STYLE):
        image, vector = draw(Path(folder, "plot.png"))
        return Image(image.read_bytes(), inlined(vector.read_text(encoding="utf-8")))


def inlined(svg: str) -> str:
    """An SVG file as an element of a page, of the page's colours and font."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", rest)
    for colour, own in _OWN.items():
        rest = re.sub(rf"{colour}\b", own, rest, flags=re.IGNORECASE)
    # matplotlib counts its groups anew in each plot, and nothing refers to them
    rest = re.sub(r' id="[\w.]+_\d+"', "", rest)
    rest = re.sub(r"^ *<path[^>]*style=\"(?:fill: none|fill: #ffffff)\"/>\n", "", rest, flags=re.MULTILINE)
    return f'<svg {box[0]} aria-hidden="true">{rest.strip()}'


def bars(values: Mapping[str, Value], unit: str, end: float | None = None, line: float | None = None) -> Figure:
    """A bar a model, with its interval; `line` is what to compare with."""
    figure = _figure(0.9 + 0.36 * len(values))
    axes = figure.add_subplot()
    names, places = [short(name) for name in values], range(len(values))
    axes.barh(places, [value.value for value in values.values()], height=0.55, color=BLUE, zorder=2)
    for place, value in zip(places, values.values(), strict=True):
        reach = value.value
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [place, place], color=INK, linewidth=1.2, zorder=3)
            reach = max(reach, value.high)
        axes.annotate(
            f"{value.value:.2f}", (reach, place), xytext=(5, 0), textcoords="offset points", va="center", zorder=4
        )
    if line is not None:
        axes.axvline(line, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, end or 1.18 * max([0.01, *(max(v.value, v.high or 0) for v in values.values())]))
    axes.set_xlabel(unit)
    return _plain(figure)


def grouped(groups: Sequence[str], models: Mapping[str, Sequence[Value | None]], beside: Sequence[float | None],
            beside_name: str, unit: str) -> Figure:  # fmt: skip
    """A group of bars a task, one a model; a tick stands where the published value is."""
    height = 0.8 / max(1, len(models))
    figure = _figure(1.2 + len(groups) * max(0.34, 0.2 * len(models)))
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(models.items()):
        for place, value in enumerate(values):
            if value is None:
                continue
            y = place - 0.4 + (number + 0.5) * height
            axes.barh(y, value.value, height=0.9 * height, color=COLOURS[number % len(COLOURS)], zorder=2)
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [y, y], color=INK, linewidth=1, zorder=3)
        axes.barh([0], [0], color=COLOURS[number % len(COLOURS)], label=short(name))
    known = [(place, value) for place, value in enumerate(beside) if value is not None]
    if known:
        axes.vlines(
            [value for _, value in known],
            [place - 0.45 for place, _ in known],
            [place + 0.45 for place, _ in known],
            color=INK,
            linewidth=1.6,
            zorder=4,
            label=beside_name,
        )
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _plain(figure)


def calibration(curves: Mapping[str, Sequence[Point]]) -> Figure:
    """How often a preference agrees with the data's, by how sure it is; on the diagonal it is as sure as it should."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    axes.plot([0.0, 1.0], [0.0, 1.0], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [point.expected for point in points], [point.observed for point in points]
        most = max(point.n for point in points)
        axes.plot(x, y, color=colour, linewidth=1.4, zorder=2, label=short(name))
        axes.scatter(x, y, [8 + 32 * point.n / most for point in points], color=colour, zorder=3)
    low = min([0.5, *(min(p.expected, p.observed) for points in curves.values() for p in points)])
    axes.set_xlim(low - 0.02, 1.02)
    axes.set_ylim(low - 0.02, 1.02)
    axes.set_xlabel("probability that the model gives its own choice")
    axes.set_ylabel("share of pairs in which the data agree")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _plain(figure, grid="both")


def short(name: str) -> str:
    """A model's name as a plot has room for it."""
    return name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(figure: Figure, grid: str = "x") -> Figure:
    for axes in figure.axes:
        axes.grid(axis=grid)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    return figure
