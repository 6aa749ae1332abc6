"""MT-Bench's figures from its judgments: means as FastChat's show_result has them, what is left out counted."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zephyr.evaluation.intervals import bootstrap, ratio

NO_REPLY = "$ERROR$"  # what FastChat writes in place of a reply that never came

Rows = Sequence[Mapping[str, Any]]

# of the 80 questions, by their ids: ten a category
CATEGORIES: Mapping[Any, str] = {
    81 + 10 * place + number: category
    for place, category in enumerate(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
    )
    for number in range(10)
}


def scored(rows: Rows, categories: Mapping[Any, str]) -> dict[str, Any]:
    """One model's single-answer judgments: `score` (mean, 1 to 10), its `interval`, `n` judgments in it, `failed` ones
    left out of it (score -1), of which `no_reply` never came and the others said no score; the same for each of
    `turns` and `categories`. `score` and `interval` are None where there is nothing to count."""
    return _parted(rows, categories, _scored)


def compared(rows: Rows, model: str, categories: Mapping[Any, str]) -> dict[str, Any]:
    """One model's pairwise judgments: `win_rate`, `loss_rate` and `tie_rate` (shares; a win or loss is one in both
    orders, everything else a tie), `score` = wins and half of the ties, its `interval`, `n` and `failed` as above."""
    return _parted(rows, categories, lambda some: _compared(some, model))


def _parted(rows: Rows, categories: Mapping[Any, str], part: Callable[[Rows], dict[str, Any]]) -> dict[str, Any]:
    turns = sorted({row["turn"] for row in rows if "turn" in row})
    known = {categories[row["question_id"]] for row in rows if row["question_id"] in categories}
    return {
        **part(rows),
        "turns": {str(turn): part([row for row in rows if row.get("turn") == turn]) for turn in turns},
        "categories": {
            name: part([row for row in rows if categories.get(row["question_id"]) == name])
            for name in dict.fromkeys(categories.values())
            if name in known
        },
    }


def _scored(rows: Rows) -> dict[str, Any]:
    good = [(row["question_id"], row["score"]) for row in rows if row["score"] != -1]
    lost = sum(row["score"] == -1 and row.get("judgment") == NO_REPLY for row in rows)
    return _mean(good) | {"failed": len(rows) - len(good), "no_reply": lost}


def _compared(rows: Rows, model: str) -> dict[str, Any]:
    outcomes: list[tuple[Any, float]] = []
    for row in rows:
        games = (row["g1_winner"], row["g2_winner"])
        if "error" not in games:
            side = "model_1" if row["model_1"] == model else "model_2"
            agreed = games[0] == games[1] and games[0] != "tie"
            outcomes.append((row["question_id"], 0.5 if not agreed else float(games[0] == side)))
    lost = sum(NO_REPLY in (row.get("g1_judgment"), row.get("g2_judgment")) for row in rows)
    shares = {
        name: sum(outcome == value for _, outcome in outcomes) / len(outcomes) if outcomes else None
        for name, value in (("win_rate", 1.0), ("loss_rate", 0.0), ("tie_rate", 0.5))
    }
    return _mean(outcomes) | shares | {"failed": len(rows) - len(outcomes), "no_reply": lost}


def _mean(values: Sequence[tuple[Any, float]]) -> dict[str, Any]:
    """With its interval over questions, whose turns and repetitions are drawn together: they are not independent."""
    if not values:
        return {"score": None, "interval": None, "n": 0}
    places = {question: place for place, question in enumerate(dict.fromkeys(question for question, _ in values))}
    sums = np.zeros((len(places), 2))
    for question, value in values:
        sums[places[question]] += value, 1
    mean = math.fsum(value for _, value in values) / len(values)
    return {"score": mean, "interval": list(bootstrap(sums, ratio)), "n": len(values)}
