"""Histograms of lengths, as PNG."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from zephyr.prepare.tally import edge, quantile

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
_TITLES = {"messages": "Messages of a dialogue", "characters": "Characters of a message"}


def draw(lengths: Mapping[str, Counter[int]], folder: Path) -> list[Path]:
    """A file for each kind of length: `kind/what` -> counts by class. Their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in sorted({name.split("/")[0] for name in lengths}):
        figure = Figure(figsize=(7.5, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = {name.split("/", 1)[1]: counts for name, counts in sorted(lengths.items()) if name.startswith(kind)}
        for (what, counts), colour in zip(lines.items(), _COLOURS * 2, strict=False):
            classes = sorted(counts)
            shares = np.array([counts[length] for length in classes]) / counts.total()
            if kind == "messages":
                # beyond that is one dialogue in a thousand; the table has the longest
                axes.set_xlim(0, quantile(counts, 0.999) + 1)
                axes.bar(classes, shares, color=colour, width=0.8)
            else:
                wide = _coarse(counts)
                edges = sorted(wide)
                heights = [*(wide[length] / counts.total() for length in edges), 0.0]
                axes.step([*edges, 2 * edges[-1]], heights, where="post", color=colour, linewidth=1.6, label=what)
        if kind != "messages":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        axes.set_title(_TITLES.get(kind, kind), loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel(kind)
        axes.set_ylabel(f"share of {'dialogues' if kind == 'messages' else 'messages'}")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(color="0.92", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        written.append(folder / f"{kind}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _coarse(counts: Counter[int]) -> dict[int, int]:
    """Two classes an octave, none left out between the first, which holds empty messages too, and the last."""
    steps = sorted({1, *(edge(round(2 ** (step / 2))) for step in range(2, 60))})
    last = max(1, *counts)
    classes = dict.fromkeys((step for step in steps if step <= last), 0)
    places = list(classes)
    for length, count in counts.items():
        classes[places[max(0, int(np.searchsorted(places, length, "right")) - 1)]] += count
    return classes
