"""The plots of a run, drawn from its metrics file."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zephyr.observe import metrics as metrics_file

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SMOOTH_FROM = 60  # points; a shorter line is readable as it is


class Series(NamedTuple):
    """One metric of a plot. Those of evaluation are drawn with markers, those of training without."""

    key: str
    label: str
    colour: str


class Plot(NamedTuple):
    """One file: `<name>.png`, with an optional fixed line that a reader compares with."""

    name: str
    title: str
    unit: str
    series: list[Series]
    log: bool = False
    line: tuple[float, str] | None = None


def draw(metrics: Path, folder: Path) -> list[Path]:
    """Draw into `folder`, over older ones, the plots that the metrics file has data for; their paths."""
    rows = metrics_file.read(metrics)
    keys = {key for row in rows for key in row}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in _plots(preferences=any("/rewards/" in key for key in keys)):
        lines = [(series, *_points(rows, series.key)) for series in plot.series]
        lines = [(series, steps, values) for series, steps, values in lines if len(steps)]
        if lines:
            written.append(folder / f"{plot.name}.png")
            _figure(plot, lines).savefig(written[-1], dpi=140)
    return written


def _plots(preferences: bool) -> Iterable[Plot]:
    unit = "nats per pair" if preferences else "nats per scored token"
    start = (math.log(2), "ln 2: policy = reference") if preferences else None
    yield Plot("loss", "Loss", unit, _both("loss", BLUE, ORANGE), line=start)
    rate = [Series("train/learning_rate", "", BLUE)]
    yield Plot("learning_rate", "Learning rate", "learning rate", rate)
    norm = [Series("train/grad_norm", "", BLUE)]
    yield Plot("grad_norm", "Gradient norm before clipping", "L2 norm (log scale)", norm, log=True)
    sides = [
        Series(f"{split}/rewards/{side}", f"{side}, {split}", colour)
        for split in ("train", "eval")
        for side, colour in (("chosen", GREEN), ("rejected", RED))
    ]
    zero, chance = (0.0, "0: as under the reference"), (0.5, "0.5: chance")
    yield Plot("rewards", "Implicit rewards", "nats, beta included", sides, line=zero)
    accuracies = _both("rewards/accuracies", BLUE, ORANGE)
    yield Plot("accuracies", "Chosen rewarded above rejected", "share of pairs", accuracies, line=chance)
    margins = _both("rewards/margins", BLUE, ORANGE)
    yield Plot("margins", "Reward margin, chosen minus rejected", "nats, beta included", margins, line=zero)
    logps = [side._replace(key=side.key.replace("/rewards/", "/logps/")) for side in sides]
    yield Plot("logps", "Log-probability of a completion under the policy", "nats", logps)


def _both(name: str, train: str, evaluation: str) -> list[Series]:
    return [Series(f"train/{name}", "train", train), Series(f"eval/{name}", "eval", evaluation)]


def _points(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps), np.asarray(values, dtype=float)


def _figure(plot: Plot, lines: list[tuple[Series, np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if plot.log and any((values > 0).any() for _, _, values in lines):
        axes.set_yscale("log")
    for series, steps, values in lines:
        _line(axes, series, steps, values)
    if plot.line:
        height, label = plot.line
        axes.axhline(height, color="0.45", linewidth=0.8, linestyle=(0, (6, 3)), zorder=1, label=label)
    axes.set_title(plot.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    end = max(1, *(int(steps[-1]) for _, steps, _ in lines))
    axes.set_xlim(-0.015 * end, 1.015 * end)
    axes.grid(which="both" if plot.log else "major", color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if labels := axes.get_legend_handles_labels()[1]:
        columns = 3 if len(labels) > 4 else 4
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, series: Series, steps: np.ndarray, values: np.ndarray) -> None:
    colour, label = series.colour, series.label or None
    if series.key.startswith("eval/"):
        axes.plot(steps, values, "o--", color=colour, markeredgecolor="white", linewidth=1.2, zorder=4, label=label)
    elif len(steps) < SMOOTH_FROM or series.key == "train/learning_rate":
        marker = "." if len(steps) < 3 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, zorder=3, label=label)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25, zorder=2)
        smoothed = smooth(values, reach=len(values) // 25)
        axes.plot(steps, smoothed, color=colour, linewidth=1.8, zorder=3, label=label)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and as many neighbours on either side: `reach`, or what is left to the nearer end.

    It neither lags nor bends towards the middle at the ends.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    near = np.minimum(reach, np.minimum(index, index[::-1]))
    return np.asarray((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
