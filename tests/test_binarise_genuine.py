"""Genuine UltraFeedback, where it is at hand: valid pairs, and the faults that it is known to have."""

import random
from collections import Counter
from typing import Any

import pytest

from tests.commands import ROOT
from tests.rated import rules
from zephyr.data import sources
from zephyr.data.binarise import binarise

REAL = ROOT.parent / "shared" / "data"


def real(name: str) -> list[sources.Row]:
    if not (REAL / name).exists():
        pytest.skip(f"{name}, real data that is no part of the project, is not there")
    return list(sources.read([REAL / name]))


def total(rows: list[sources.Row], **changed: Any) -> tuple[Counter[str], Counter[str | None], list[dict[str, Any]]]:
    faults, dropped, pairs = Counter[str](), Counter[str | None](), []
    for row in rows:
        result = binarise(row, rules(**changed), seed=0)
        faults += result.faults
        dropped[result.rule] += 1
        pairs += [result.pair] if result.pair else []
    return faults, dropped, pairs


def test_genuine_pairs_come_out_valid_with_the_counts_known() -> None:
    rows = real("ultrafeedback_pairs.jsonl.gz")
    faults, dropped, pairs = total(rows)
    assert faults == {"equal_scores": 136, "identical_texts": 5, "empty_chosen": 1, "empty_rejected": 1}
    assert dropped == {None: 1193, "identical_texts": 5, "empty_chosen": 1, "empty_rejected": 1}
    given = {columns["prompt_id"]: columns for _, columns in rows}
    assert all(pair == {name: given[pair["prompt_id"]][name] for name in pair} for pair in pairs)
    assert total(rows, ties="drop")[1]["equal_scores"] == 134  # two of the 136 are identical texts


def test_genuine_feedback_comes_out_valid() -> None:
    rows = real("feedback.jsonl.gz")
    faults, dropped, pairs = total(rows)
    assert dropped == {None: 1699} and len(pairs) == 1699
    completions = [completion for _, columns in rows for completion in columns["completions"]]
    blank = sum(not completion["response"].strip() for completion in completions)
    assert (faults["empty_response"], faults["out_of_range"]) == (blank, 1)  # one score is 0
    assert faults["missing_annotations"] == len(completions) == 6796  # none has the four aspects
    assert faults["mean_from_overall"] == 1699 - 80  # of one source the mean is known
    for pair, (_, columns) in zip(pairs, rows, strict=True):
        texts = {completion["response"] for completion in columns["completions"]}
        assert pair["prompt"] == columns["instruction"]
        assert {pair["chosen"][1]["content"], pair["rejected"][1]["content"]} <= texts
        assert pair["score_chosen"] >= pair["score_rejected"] >= 1
    shuffled = random.Random(0).sample(rows, len(rows))
    again = {pair["prompt"]: pair for pair in total(shuffled)[2]}
    assert all(
        again[pair["prompt"]] == pair for pair in pairs if sum(p["prompt"] == pair["prompt"] for p in pairs) == 1
    )
