"""Pictures of benchmark results."""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from zephyr.observe.plots import BLUE, GREEN, ORANGE, RED

# Okabe and Ito's colours, and lines that also differ in print without colour
_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), ("#CC79A7", (0, (5, 1))), ("#56B4E9", (0, (1, 1))))


def radar(scores: Mapping[str, Mapping[str, float | None]], path: Path, title: str, top: float = 10.0) -> list[Path]:
    """A model a line, a category a spoke, from 0 in the middle to `top`: a PNG at `path` and an SVG beside it.

    `scores` are by model, then by category; a spoke for which a model has no score has no point of its line. Raises
    ValueError where there are fewer than three categories to go round.
    """
    spokes = list(dict.fromkeys(name for model in scores.values() for name in model))
    if len(spokes) < 3:
        raise ValueError(f"a radar plot needs three categories, not {len(spokes)}")
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * place / len(spokes) for place in range(len(spokes))]
    for number, (model, by_category) in enumerate(scores.items()):
        colour, line = _STYLES[number % len(_STYLES)]
        values = [_or_nan(by_category.get(name)) for name in spokes]
        closed = [*values, values[0]], [*angles, angles[0]]
        axes.plot(closed[1], closed[0], color=colour, linestyle=line, linewidth=1.8, marker="o", ms=3.5, label=model)
        if len(scores) <= 3 and not any(map(math.isnan, values)):
            axes.fill(closed[1], closed[0], color=colour, alpha=0.06)
    axes.set_xticks(angles, [""] * len(spokes))
    for angle, name in zip(angles, spokes, strict=True):  # beside the circle, never across it
        side = round(math.sin(angle), 6)
        axes.text(angle, 1.06 * top, name, ha="center" if not side else "left" if side > 0 else "right", va="center")
    axes.set_ylim(0, top)
    axes.set_yticks([top * share for share in (0.2, 0.4, 0.6, 0.8)])
    axes.set_rlabel_position(math.degrees(angles[1]) / 2)
    axes.tick_params(axis="y", labelsize=8, labelcolor="0.45")
    axes.grid(color="0.85", linewidth=0.7)
    axes.spines["polar"].set_color("0.7")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=min(3, len(scores)), frameon=False)
    return saved(figure, path)


def saved(figure: Figure, path: Path) -> list[Path]:
    """The figure as `path`, a PNG, and as an SVG beside it; without a date, so that equal figures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    vector = path.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": "zephyr"}):
        figure.savefig(vector, metadata={"Date": None})
    return [path, vector]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
