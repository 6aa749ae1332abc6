"""The pictures of a study: the arms beside the paper's, and dDPO over its epochs."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zephyr.observe.plots import BLUE, GREEN, ORANGE, RED, smooth
from zephyr.study.estimates import Estimate
from zephyr.study.plan import ALONE, ARMS, DPO, SECOND, SFT
from zephyr.study.results import LABELS, PUBLISHED, Results

ARMS_FILE, EPOCHS_FILE = "ablation.png", "epochs.png"
_COLOURS = {ALONE: RED, SFT: BLUE, SECOND: ORANGE, DPO: GREEN}
_REACH = 20  # parts of a curve: how far a training accuracy is smoothed to either side


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there is; the paths of the pictures."""
    drawn = {ARMS_FILE: _arms(results) if results.arms else None, EPOCHS_FILE: _epochs(results)}
    paths = []
    for name, figure in drawn.items():
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(folder / name, dpi=140)
            paths.append(folder / name)
    return paths


def _arms(results: Results) -> Figure:
    """A panel a measure: the paper's two, then ours, each with a dot a seed."""
    measures = [measure for measure in results.measures if any(measure in arm for arm in results.arms.values())]
    figure, axes = _figure(2 + len(measures), width=3.1)
    names = [*ARMS]
    for panel, measure in zip(axes, ("mt_bench", "alpaca_eval"), strict=False):
        for place, arm in enumerate(names):
            error = 1.96 * PUBLISHED[arm]["error"] if measure == "alpaca_eval" else None
            _bar(panel, place, arm, PUBLISHED[arm][measure], error, pale=True)
        panel.set_title(f"Paper: {LABELS[measure]}", loc="left", fontsize=10)
    for panel, measure in zip(axes[2:], measures, strict=True):
        for place, arm in enumerate(names):
            if (found := results.arms.get(arm, {}).get(measure)) is not None:
                _bar(panel, place, arm, found.mean, _reach(found))
                panel.plot([place] * len(found.values), found.values, "o", color="black", markersize=3, zorder=4)
        panel.set_title(f"{results.recipe}: {LABELS[measure]}", loc="left", fontsize=10)
    for panel in axes:
        panel.set_xticks(range(len(names)), [ARMS[arm].replace(" without", "\nwithout") for arm in names], fontsize=8)
        panel.tick_params(axis="x", rotation=30)
    return figure


def _bar(panel: Axes, place: int, arm: str, value: float, error: float | None, pale: bool = False) -> None:
    panel.bar(place, value, color=_COLOURS[arm], alpha=0.45 if pale else 0.9, width=0.7, zorder=2)
    if error is not None:
        panel.errorbar(place, value, error, color="0.25", capsize=3, linewidth=1.0, zorder=3)


def _reach(found: Estimate) -> float | None:
    return None if found.seeds is None else (found.seeds[1] - found.seeds[0]) / 2


def _epochs(results: Results) -> Figure | None:
    """Accuracy along the longest run of each seed, and what the models of runs of 1, 2, ... epochs are worth."""
    curves = [curve for curve in results.curves.values() if curve.train]
    measure = results.measures[0]
    worth = {epochs: known[measure] for epochs, known in results.epochs.items() if measure in known}
    if not curves and not worth:
        return None
    figure, (left, right) = _figure(2, width=4.6)
    for number, curve in enumerate(curves):
        label = ("training pairs", "held-out pairs") if number == 0 else (None, None)
        train = np.asarray(curve.train)
        smoothed = smooth(train[:, 1], len(train) // _REACH)
        left.plot(train[:, 0], smoothed, color=BLUE, linewidth=1.2, label=label[0])
        if curve.held_out:
            left.plot(
                *zip(*curve.held_out, strict=True), "o--", color=ORANGE, linewidth=1.0, markersize=3.5, label=label[1]
            )
    left.set(xlabel="epochs of dDPO", ylabel="share of pairs")
    left.set_title("Chosen rewarded above rejected", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    for epochs, found in worth.items():
        right.errorbar(epochs, found.mean, _reach(found), fmt="o", color=GREEN, capsize=3)
        right.plot([epochs] * len(found.values), found.values, ".", color="0.6", zorder=1)
    if (first := results.arms.get(SFT, {}).get(measure)) is not None:
        right.axhline(first.mean, color="0.45", linewidth=0.8, linestyle=(0, (6, 3)), label="dSFT-1")
        right.legend(frameon=False, fontsize=9, loc="upper left")
    right.set_xticks([*worth])
    right.set(xlabel="epochs of dDPO", xlim=(0.5, max(worth, default=1) + 0.5))
    right.set_title(LABELS[measure][0].upper() + LABELS[measure][1:], loc="left", fontsize=10)
    return figure


def _figure(panels: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [*figure.subplots(1, panels, squeeze=False)[0]]
    for panel in axes:
        panel.grid(axis="y", color="0.92", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
