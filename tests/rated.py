"""Rated completions written by hand, and what becomes of them as a preference pair."""

from typing import Any

from zephyr.data.binarise import Binarised, Rejected, Rules, binarise

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
RANDOM = Rejected(worst=False, gap=0)


def rules(score="mean", rejected=RANDOM, ties="keep", truthful_qa="drop") -> Rules:
    return Rules(score, rejected, ties, truthful_qa)


def answer(text: str, ratings: Any = None, overall: Any = None, **more: Any) -> dict[str, Any]:
    """A completion; `ratings` are those of the four aspects, in order (a text: one digit each)."""
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings or [], strict=False)}
    return {"response": text, "annotations": annotations, "overall_score": overall, **more}


def record(*completions: dict[str, Any], instruction: str = "What do ants eat?", **more: Any) -> dict[str, Any]:
    return {"source": "by_hand", "instruction": instruction, "completions": [*completions], **more}


def run(columns: dict[str, Any], seed: int = 0, **changed: Any) -> Binarised:
    return binarise(("file.jsonl line 7", columns), rules(**changed), seed)


def scores(columns: dict[str, Any], **changed: Any) -> tuple[float, float]:
    pair = run(columns, **changed).pair
    assert pair is not None
    return pair["score_chosen"], pair["score_rejected"]
