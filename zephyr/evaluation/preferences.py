"""Preference accuracy: how often a model holds the chosen answer of a pair above the rejected one, and how surely.

Rows, batches and log-probabilities are the trainer's own: what is found here and what a run logs as
eval/rewards/accuracies are one number. It is shown beside what an eye for length alone would find, and with how often a
stated probability comes true (Guo et al., 2017).
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging

from zephyr.chat import find_model
from zephyr.data import sources
from zephyr.data.batch import Batch, Pair, pack_pairs
from zephyr.data.encode import Options, PairRows
from zephyr.data.messages import BadRow
from zephyr.data.modules import Examples, MicroBatches
from zephyr.data.render import chat_format, load_tokenizer
from zephyr.errors import UserError
from zephyr.evaluation import charts
from zephyr.evaluation.charts import Point
from zephyr.evaluation.files import write
from zephyr.evaluation.intervals import bootstrap
from zephyr.evaluation.settings import Evaluation, Preferences
from zephyr.models.lineage import Lineage, lineage
from zephyr.models.logps import sequence_sums, token_scores
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import measured
from zephyr.progress import Lines
from zephyr.settings import Lora, Model

_BINS = 10  # of the probability that the model gives its own verdict, 0.5 to 1
_ADAPTER = Lora(1, 1.0, 0.0, "all-linear", False, False)  # settings want one beside 4 bits; a frozen model gets none

Numbers = NDArray[np.float64]


class Read(NamedTuple):
    """The pairs of a file that can be scored; all lists are of one length."""

    places: list[str]  # where each stands, "file.jsonl line 7"
    origins: list[str | None]  # its `source`
    pairs: list[Pair]
    dropped: Counter[str]  # rows by reason


class Group(NamedTuple):
    """Accuracy over some of the pairs, with the interval that holds 95 % of its resamples."""

    n: int
    accuracy: float
    low: float
    high: float
    margin: float  # mean, in nats


class Bin(NamedTuple):
    """Pairs of whose order the model is about equally sure."""

    start: float
    end: float
    n: int
    confidence: float | None  # mean probability that the model gives its own verdict; None where n is 0
    accuracy: float | None  # how often the verdict is right


class _Pairs(Examples):
    """Pairs in memory, as the trainer's batches want them."""

    unit = "pairs"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.lengths = [sum(map(len, pair)) for pair in pairs]

    def pack(self, examples: list[int]) -> Batch:
        return pack_pairs([self.pairs[i] for i in examples])


def check(settings: Evaluation) -> None:
    """Raise UserError at what is wrong before the rows are read."""
    own, path = settings.preferences, _path(settings)
    if own.data is None:
        raise UserError("preferences.data is not set: give a file of pairs, as stage=dpo of train.py takes them.")
    sources.local_files(own.data, "preferences.data")
    if own.max_prompt_length >= own.max_length:
        raise UserError(
            f"preferences.max_prompt_length={own.max_prompt_length} must be below max_length={own.max_length}: "
            "a completion needs room behind the prompt."
        )
    _against(own, lineage(path, None))


def run(settings: Evaluation, folder: Path) -> dict[str, Any]:
    """Score the pairs; the results. Writes margins.jsonl, a line a pair, and calibration.png into `folder`."""
    check(settings)
    own, path = settings.preferences, _path(settings)
    adapter = lineage(path, None)
    score, reference = _against(own, adapter)
    read = read_pairs(own, path, settings.limit)
    logps, others = _logps(own, path, adapter, reference, read.pairs)
    tokens = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in read.pairs])
    margins = _margins(score, own.beta, logps, others, tokens)
    bins = calibration(margins)
    longer = _right(tokens[:, 1] - tokens[:, 2])
    write(folder / "margins.jsonl", "".join(_lines(read, tokens, logps, others, margins)))
    points = [Point(part.confidence, part.accuracy, part.n) for part in bins if part.n]  # type: ignore[arg-type]
    draw = partial(charts.calibration, {settings.name: points})
    write(folder / "calibration.png", charts.drawn(draw, "calibration").png)
    by_source = {origin or "": [i for i, of in enumerate(read.origins) if of == origin] for origin in {*read.origins}}
    return {
        "data": own.data,
        "score": score,
        "reference": reference or (adapter.base if adapter and score == "reward" else None),
        **({"beta": own.beta} if score == "reward" else {}),
        **group(margins)._asdict(),
        "longer_preferred": float(longer.mean()),
        "by_source": {name: group(margins[by_source[name]])._asdict() for name in sorted(by_source) if name},
        "by_length_difference": _quartiles(tokens[:, 1] - tokens[:, 2], margins),
        "by_prompt_length": _quartiles(tokens[:, 0], margins),
        "calibration": [part._asdict() for part in bins],
        "expected_calibration_error": calibration_error(bins),
        "failed": read.dropped.total(),
        "dropped": dict(sorted(read.dropped.items())),
    }


def summary(results: dict[str, Any]) -> str:
    """The results in a few lines."""
    how = {"reward": "implicit reward", "sum": "log-likelihood", "mean": "log-likelihood of a token"}[results["score"]]
    against = f" against {results['reference']}" if results["reference"] else ""
    lines = [
        f"Preferences: {results['accuracy']:.4f} of {results['n']:,} pairs in the right order by {how}{against} "
        f"(95 % of resamples {results['low']:.4f} to {results['high']:.4f}); the longer answer is the chosen one in "
        f"{results['longer_preferred']:.4f}. Mean margin {results['margin']:.4f} nats, calibration error "
        f"{results['expected_calibration_error']:.4f}."
    ]
    lines += [f"  {name}: {part['accuracy']:.4f} of {part['n']:,}" for name, part in results["by_source"].items()]
    if results["failed"]:
        reasons = ", ".join(f"{number:,} {why}" for why, number in results["dropped"].items())
        lines.append(f"{results['failed']:,} rows left out: {reasons}.")
    return "\n".join(lines)


def read_pairs(own: Preferences, model: str, limit: int | None = None) -> Read:
    """The (first so many) pairs of the file as the trainer would have them, tokenised for the model.

    What the trainer leaves out is left out and counted; so are rows that cannot be used. Raises UserError where no pair
    is left.
    """
    options = Options(own.max_length, own.max_prompt_length, False, own.system, own.seed, drop_bad_rows=True)
    rows = PairRows(chat_format(load_tokenizer(model)).encoder(), options, 1)
    rows.counts, rows.dropped = Counter(), Counter()
    read = Read([], [], [], rows.dropped)
    chunks = sources.chunks(sources.files(str(own.data), "preferences.data"))
    for row in (row for chunk in chunks for row in chunk.rows()):
        if len(read.pairs) == limit:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            parsed = rows.parse(row)
        except BadRow:
            read.dropped["unusable row"] += 1
            continue
        if isinstance(parsed, str):
            read.dropped[parsed] += 1
            continue
        for columns in rows.tokenise([parsed]):
            origin = row[1].get("source")
            read.places.append(row[0])
            read.origins.append(origin if isinstance(origin, str) else None)
            read.pairs.append(Pair(*(column.tolist() for column in columns)))
    if not read.pairs:
        reasons = ", ".join(f"{number:,} {why}" for why, number in read.dropped.items())
        raise UserError(f"preferences.data: {own.data} has no pair that can be scored ({reasons}).")
    return read


def group(margins: Numbers) -> Group:
    """Accuracy of these margins; a tie is half right, as a run logs it."""
    right = _right(margins)
    return Group(len(margins), float(right.mean()), *bootstrap(right), float(margins.mean()))


def calibration(margins: Numbers) -> list[Bin]:
    """How sure the model is of its verdicts, and how often they are right.

    A margin of m nats says that the answer preferred is the better one with probability 1 / (1 + exp(-|m|)): the
    Bradley-Terry model, which DPO fits.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = _right(margins)
    edges = np.linspace(0.5, 1.0, _BINS + 1)
    places = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, _BINS - 1)
    bins = []
    for place in range(_BINS):
        inside = places == place
        means = [float(values[inside].mean()) if inside.any() else None for values in (confidence, right)]
        bins.append(Bin(float(edges[place]), float(edges[place + 1]), int(inside.sum()), *means))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of confidence and accuracy, over pairs (Guo et al., 2017, eq. 3)."""
    gaps = [part.n * abs(part.confidence - part.accuracy) for part in bins if part.n]  # type: ignore[operator]
    return sum(gaps) / sum(part.n for part in bins)


def _path(settings: Evaluation) -> str:
    if settings.folder is None:
        raise UserError("preferences need a model's folder: what a server says of two given answers cannot be asked.")
    return settings.folder


def _against(own: Preferences, adapter: Lineage | None) -> tuple[str, str | None]:
    """What is compared, and the reference's folder or hub id if it is another model."""
    reference = own.reference
    if reference is not None and (Path(reference).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", reference)):
        reference = str(find_model(Path(reference).expanduser()))
    if own.score in ("sum", "mean"):
        if reference is not None:
            raise UserError(f"preferences.score={own.score} takes no reference. Leave it out, or take score=reward.")
        return own.score, None
    if reference is None and adapter is None:
        if own.score == "reward":
            raise UserError(
                "preferences.score=reward needs preferences.reference=FOLDER, the model that DPO started from; without "
                "one take score=sum or mean."
            )
        return "mean", None
    return "reward", reference


def _logps(
    own: Preferences, path: str, adapter: Lineage | None, reference: str | None, pairs: Sequence[Pair]
) -> tuple[Numbers, Numbers | None]:
    """Log-probabilities [pairs, 2] of (chosen, rejected) under the model, and under what it is compared with. One model
    is in memory at a time."""
    batches = MicroBatches(_Pairs(pairs), own.micro_batch_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = own.precision
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    placement = Placement(device, precision)
    autocast = placement.compute if placement.autocast else None

    def under(model: Any, name: str) -> Numbers:
        found = measured(model, _followed(batches, len(pairs), name), len(pairs), _sequence_logps, autocast)
        if not np.isfinite(found).all():
            raise UserError(f"{name}: {int((~np.isfinite(found)).sum())} log-probabilities are not finite.")
        return found

    logging.disable_progress_bar()
    model: Any = load_policy(path, None, _held(own, adapter), placement, frozen=True)
    logps, others = under(model, path), None
    if reference is None and adapter is not None and own.score in ("auto", "reward"):
        with model.disable_adapter():
            others = under(model, f"{path} with its adapter off")
    del model
    if reference is not None:
        start = lineage(reference, None)
        others = under(load_policy(reference, None, _held(own, start), placement, frozen=True), reference)
    return logps, others


def _followed(batches: MicroBatches, pairs: int, model: str) -> Iterator[tuple[list[int], Batch]]:
    """The batches, with a line now and then that says how far they are."""
    lines, done = Lines(), 0
    for members, batch in batches.with_members():
        yield members, batch
        done += len(members)
        if lines.due():
            lines.say(f"Preferences, {model}: {done:,}/{pairs:,} pairs")


def _held(own: Preferences, adapter: Lineage | None) -> Model:
    """How weights are held: an adapter's base as in its training, if nothing else is said."""
    kind = own.quantization
    if kind == "auto":
        kind = "nf4" if adapter is not None and adapter.quantization else "none"
    double = adapter.double_quantization if adapter is not None and adapter.quantization else True
    quantised = kind == "nf4"
    return Model(
        path=None,
        revision=None,
        base="model",
        base_revision=None,
        lora=_ADAPTER if quantised else None,
        quantization="nf4" if quantised else None,
        double_quantization=quantised and double,
        float8=False,
        activation_checkpointing="none",
    )


def _sequence_logps(model: Any, batch: Batch) -> Tensor:
    return sequence_sums(token_scores(model, batch).logps, batch, 2 * batch.examples)


def _margins(score: str, beta: float, logps: Numbers, others: Numbers | None, tokens: NDArray[Any]) -> Numbers:
    """By how much the chosen answer is preferred, [pairs] in nats."""
    if score == "reward":
        assert others is not None
        rewards = beta * (logps - others)
    else:
        rewards = logps / tokens[:, 1:] if score == "mean" else logps
    return np.asarray(rewards[:, 0] - rewards[:, 1])


def _right(margins: NDArray[Any]) -> Numbers:
    return (margins > 0) + 0.5 * (margins == 0)


def _quartiles(values: NDArray[Any], margins: Numbers) -> list[dict[str, Any]]:
    """Accuracy over each quarter of the pairs by a number of tokens; equal numbers stay together."""
    places = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")
    quarters = [np.flatnonzero(places == place) for place in range(4)]
    return [
        {"from": int(values[some].min()), "to": int(values[some].max()), **group(margins[some])._asdict()}
        for some in quarters
        if len(some)
    ]


def _lines(read: Read, tokens: NDArray[Any], logps: Numbers, others: Numbers | None, margins: Numbers) -> Iterator[str]:
    for i, place in enumerate(read.places):
        line: dict[str, Any] = {"row": place, "source": read.origins[i], "margin": float(margins[i])}
        line |= {"chosen_logp": float(logps[i, 0]), "rejected_logp": float(logps[i, 1])}
        if others is not None:
            line |= {"reference_chosen_logp": float(others[i, 0]), "reference_rejected_logp": float(others[i, 1])}
        names = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
        yield json.dumps(line | dict(zip(names, map(int, tokens[i]), strict=True))) + "\n"
