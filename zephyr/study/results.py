"""The figures of a study: each arm's, how far dDPO + dSFT is ahead of it, and those of more epochs of dDPO."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr.study.estimates import Estimate, estimate, wins
from zephyr.study.judging import HEADLINES, Marks
from zephyr.study.plan import ALONE, ARMS, DPO, SECOND, SFT, Run, after
from zephyr.study.settings import Ablation

SCORE, WINS, ACCURACY, TRAIN_ACCURACY, TOKENS = "score", "win_rate", "accuracy", "train_accuracy", "tokens"
LABELS = {  # measure: what it is called
    SCORE: "teacher's score, 1 to 5",
    WINS: "win rate over dSFT-1, %",
    **{name: label for name, (_, label) in HEADLINES.items()},
    ACCURACY: "held-out preference accuracy",
    TRAIN_ACCURACY: "training preference accuracy",
    TOKENS: "tokens of an answer",
}
# Tunstall et al. (2023), table 3: MT-Bench, and AlpacaEval in percent with its standard error.
PUBLISHED = {
    ALONE: {"mt_bench": 4.76, "alpaca_eval": 30.76, "error": 1.63},
    SFT: {"mt_bench": 6.64, "alpaca_eval": 85.65, "error": 1.23},
    SECOND: {"mt_bench": 6.19, "alpaca_eval": 78.54, "error": 1.44},
    DPO: {"mt_bench": 7.00, "alpaca_eval": 86.07, "error": 1.22},
}
# The order of table 3 on both benchmarks: (better, worse).
ORDER = [(DPO, SFT), (DPO, SECOND), (SFT, SECOND), (SECOND, ALONE)]


@dataclass(frozen=True)
class Curve:
    """Preference accuracy along one seed's longest run of dDPO: epochs and shares of pairs."""

    train: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """All that a report says."""

    recipe: str
    seeds: Sequence[int]
    questions: int | None  # that the demo's teacher judged
    measures: list[str]  # by which arms are compared, the first above all
    arms: dict[str, dict[str, Estimate]]  # arm -> measure
    ahead: list[tuple[str, str, Estimate]]  # (better, worse in the paper, by how much here) in the first measure
    epochs: dict[int, dict[str, Estimate]]  # passes of dDPO -> measure
    curves: dict[int, Curve]  # seed
    failed: dict[str, str]
    seconds: float  # that the runs took, all together


def results(settings: Ablation, runs: Sequence[Run], marks: Mapping[str, Marks], failed: dict[str, str]) -> Results:
    """Put together what the runs left in their folders and what their models were worth."""
    demo = settings.recipe == "demo"
    judged = [run for run in runs if run.name in marks]
    values = {run.name: _values(run, marks) for run in judged}
    arms = [*ARMS, *(after(epochs) for epochs in range(2, settings.epochs + 1))]
    measures: list[str] = [SCORE, WINS] if demo else [*settings.benchmarks]
    known: dict[str, dict[str, Estimate]] = {}
    for arm in arms:
        of_arm = [run for run in judged if run.arm == arm]
        estimates = {
            measure: estimate(
                [values[run.name][measure] for run in of_arm],
                [q for run in of_arm if (q := _questions(run, measure, marks))],
            )
            for measure in (*measures, ACCURACY, TRAIN_ACCURACY, TOKENS)
            if of_arm and all(measure in values[run.name] for run in of_arm)
        }
        if estimates:
            known[arm] = estimates
    longest = [run for run in judged if run.arm == after(settings.epochs)]
    return Results(
        recipe=settings.recipe,
        seeds=settings.seeds,
        questions=max(len(mark.scores) for mark in marks.values()) if demo and marks else None,
        measures=measures,
        arms={arm: known[arm] for arm in ARMS if arm in known},
        ahead=[
            (a, b, difference) for a, b in ORDER if (difference := _ahead(a, b, judged, values, marks, measures[0]))
        ],
        epochs={n: known[after(n)] for n in range(1, settings.epochs + 1) if after(n) in known},
        curves={run.seed: _curve(run, settings.epochs) for run in longest},
        failed=failed,
        seconds=sum(_summary(run)["seconds"] for run in judged),
    )


def _values(run: Run, marks: Mapping[str, Marks]) -> dict[str, float]:
    values = dict(marks[run.name].values)
    if won := _questions(run, WINS, marks):
        values[WINS] = statistics.fmean(won)
    if (accuracy := _summary(run)["eval"].get("eval/rewards/accuracies")) is not None:
        values[ACCURACY] = accuracy
    if last := _last_epoch(run):
        values[TRAIN_ACCURACY] = statistics.fmean(last)
    return values


def _questions(run: Run, measure: str, marks: Mapping[str, Marks]) -> list[float]:
    """The measure of each question, where it is known."""
    scores = marks[run.name].scores
    if measure == SCORE:
        return scores
    first = marks.get(f"seed-{run.seed}/{SFT}")
    return wins(scores, first.scores) if measure == WINS and first is not None else []


def _ahead(
    better: str,
    worse: str,
    judged: Sequence[Run],
    values: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, Marks],
    measure: str,
) -> Estimate | None:
    """The difference of two arms, seed by seed and question by question."""
    by_arm = {arm: {run.seed: run for run in judged if run.arm == arm} for arm in (better, worse)}
    pairs = [(run, by_arm[worse][seed]) for seed, run in by_arm[better].items() if seed in by_arm[worse]]
    if not pairs:
        return None
    questions = [
        [a - b for a, b in zip(_questions(x, measure, marks), _questions(y, measure, marks), strict=True)]
        for x, y in pairs
    ]
    return estimate([values[x.name][measure] - values[y.name][measure] for x, y in pairs], questions)


def _curve(run: Run, epochs: int) -> Curve:
    rows, steps = _metrics(run), _summary(run)["steps"]

    def points(key: str) -> list[tuple[float, float]]:
        return [(epochs * row["step"] / steps, row[key]) for row in rows if row.get(key) is not None]

    return Curve(points("train/rewards/accuracies"), points("eval/rewards/accuracies"))


def _last_epoch(run: Run) -> list[float]:
    """Logged accuracies of the training steps in the last pass over the pairs."""
    rows = [row for row in _metrics(run) if row.get("train/rewards/accuracies") is not None]
    if not rows:
        return []
    steps = _summary(run)["steps"]
    epochs = max(1, round(rows[-1]["epoch"]))
    return [row["train/rewards/accuracies"] for row in rows if row["step"] > steps * (1 - 1 / epochs)]


def _summary(run: Run) -> dict[str, Any]:
    return json.loads(Path(run.folder, "summary.json").read_text(encoding="utf-8"))


def _metrics(run: Run) -> list[dict[str, Any]]:
    from zephyr.observe.metrics import read

    return read(run.folder / "metrics.jsonl")
