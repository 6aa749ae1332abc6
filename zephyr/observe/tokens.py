"""What the model sees, for people: what each token is for, and who attends to whom in a packed row."""

import html
from collections.abc import Iterable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from zephyr.data.batch import Batch, Conversation, Pair

# Pale relatives of Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {"read": "#e4e4e4", "scored": "#8fd3bf", "chosen": "#8fd3bf", "rejected": "#f2b98f"}
_NEITHER, _OWN, _PROMPT, _READ = "white", "#0072B2", "#56B4E9", "#D55E00"
_SPAN = "background:{};color:black;padding:1px 0;margin:0 1px;border-radius:3px;white-space:pre"


def conversation(tokenizer: PreTrainedTokenizerBase, tokens: Conversation) -> str:
    """HTML of a conversation, a box a token: those that dSFT scores in another colour than those that it only reads.
    The first token of a row is never scored, whatever its label."""
    return _html(tokenizer, ((token, "scored" if label else "read") for token, label in zip(*tokens, strict=True)))


def pair(tokenizer: PreTrainedTokenizerBase, tokens: Pair) -> str:
    """HTML of a preference pair: the prompt that both completions share, the chosen one, the rejected one."""
    kinds = {"read": tokens.prompt, "chosen": tokens.chosen, "rejected": tokens.rejected}
    return _html(tokenizer, ((token, kind) for kind, part in kinds.items() for token in part))


def attention(batch: Batch) -> Figure:
    """A packed row as a square: a cell is coloured where the token of that line attends to the token of that column.

    Dark is a token's own segment, light the prompt that a rejected completion shares with the chosen one; a dot in
    front of a line: from here a token is predicted and scored.
    """
    seen = sight(batch)
    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(seen, cmap=ListedColormap([_NEITHER, _OWN, _PROMPT]), vmin=0, vmax=2, interpolation="nearest")
    rows = np.unique(batch.sources.numpy())
    left = axes.get_yaxis_transform()  # x as a share of the width
    axes.plot(np.full(len(rows), -0.02), rows, ".", color=_READ, markersize=4, clip_on=False, transform=left)
    edges = [segment.start for segment in batch.segments]
    axes.set_xticks(edges)
    axes.set_yticks(edges)
    for edge in edges[1:]:
        axes.axhline(edge - 0.5, color="0.75", linewidth=0.6)
        axes.axvline(edge - 0.5, color="0.75", linewidth=0.6)
    axes.set(xlabel="attended to", ylabel="token of the row")
    axes.tick_params(axis="y", pad=10)
    return figure


def sight(batch: Batch) -> NDArray[np.uint8]:
    """[T, T]: 1 where a token attends to one of its own segment, 2 where to one of the segment's prefix, else 0."""
    size = len(batch.ids)
    seen = np.zeros((size, size), np.uint8)
    for start, end, prefix_start, prefix_end in batch.segments:
        seen[start:end, start:end] = np.tril(np.ones((end - start, end - start), np.uint8))
        seen[start:end, prefix_start:prefix_end] = 2
    return seen


def _html(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[tuple[int, str]]) -> str:
    boxes = []
    for token, kind in tokens:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        text = piece.replace("▁", " ") if "▁" in piece else str(tokenizer.decode([token]))
        shown, breaks = html.escape(text).replace("\n", "↵"), "<br>" * text.count("\n")
        boxes.append(f'<span title="{token}" style="{_SPAN.format(COLOURS[kind])}">{shown}</span>{breaks}')
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(boxes)}</div>'
