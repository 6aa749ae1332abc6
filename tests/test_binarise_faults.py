"""What is wrong with ratings and records, by its name and number, and what is read in its place."""

import gzip
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.rated import answer, record, rules, run, scores
from zephyr.data import sources
from zephyr.data.binarise import binarise
from zephyr.data.messages import BadRow
from zephyr.errors import UserError


# What is written, what it is read as as a rating (1 to 5) and as an overall score (1 to 10), and its name.
@pytest.mark.parametrize(
    ("written", "rating", "overall", "fault"),
    [
        (4, 4, 4, None),
        (4.0, 4, 4, None),
        ("4", 4, 4, "string_rating"),
        (" 4.0\n", 4, 4, "string_rating"),
        ("4.5", 4.5, 4.5, "decimal_rating"),
        (4.5, 4.5, 4.5, "decimal_rating"),
        ("4/5", 4, None, ("fraction_rating", "unclear_fraction")),
        ("4.5 / 5", 4.5, None, ("fraction_rating", "unclear_fraction")),
        ("8/10", None, 8, ("unclear_fraction", "fraction_rating")),
        ("8 out of 10.0", None, 8, ("unclear_fraction", "fraction_rating")),
        ("4/0", None, None, "unclear_fraction"),
        ("0/5", None, None, ("out_of_range", "unclear_fraction")),
        ("N/A", None, None, "not_applicable"),
        ("n/a", None, None, "not_applicable"),
        (" NA ", None, None, "not_applicable"),
        ("N. A.", None, None, "not_applicable"),
        ("Not applicable.", None, None, "not_applicable"),
        ("None", None, None, "not_applicable"),
        (0, None, None, "out_of_range"),
        ("0", None, None, "out_of_range"),
        (11, None, None, "out_of_range"),
        (6, None, 6, ("out_of_range", None)),
        (-1, None, None, "out_of_range"),
        ("-1", None, None, "out_of_range"),
        (0.999, None, None, "out_of_range"),
        (float("nan"), None, None, "out_of_range"),
        (float("inf"), None, None, "out_of_range"),
        (10**400, None, None, "out_of_range"),
        (True, None, None, "unreadable_rating"),
        ("four", None, None, "unreadable_rating"),
        ("4 stars", None, None, "unreadable_rating"),
        ("1e0", None, None, "unreadable_rating"),
        ("٤", None, None, "unreadable_rating"),
        ("4" * 9999, None, None, "unreadable_rating"),
        ([4], None, None, "unreadable_rating"),
        ("", None, None, ("missing_rating", "missing_overall")),
        (None, None, None, ("missing_rating", "missing_overall")),
    ],
)
def test_what_a_rating_is_read_as(written: Any, rating: float | None, overall: float | None, fault: Any) -> None:
    """With ratings of 2 and 2 beside it: the mean is (2 + 2 + rating) / 3, or 2 where there is none."""
    names = fault if isinstance(fault, tuple) else (fault, fault)
    plain = answer("Crumbs.", [1, 1, 1, 1], 1)
    result = run(record(plain, answer("Leaves.", [2, 2, written, 1], 9)))
    assert result.pair and result.pair["score_chosen"] == pytest.approx((5 + rating) / 4 if rating else 5 / 3)
    assert result.faults == Counter([names[0]] if names[0] else [])
    result = run(record(plain, answer("Leaves.", [2, 2, 2, 2], written), answer("Moss.", [2] * 4, 2)), score="overall")
    assert result.pair and result.pair["score_chosen"] == max(overall or 0, 2)
    assert result.faults == Counter([names[1]] if names[1] else [])


# The mean rating, the critique, and what an overall score of 10 then was.
@pytest.mark.parametrize(
    ("ratings", "critique", "score", "fault"),
    [
        ([1, 1, 1, 1], "Wrong.", 1, "one_became_ten"),
        ([2, 2, "N/A", 2], None, 1, "one_became_ten"),  # 2 is within
        ([2, 2, 2, 3], "Poor.", None, "undecided_ten"),  # 2.25
        ([4, 4, 4, 4], "Good.", None, "undecided_ten"),  # 4 is not above 4
        ([4, 4, 4, 5], "Good.", 10, None),  # 4.25
        ([5, 5, 5, 5], "Bad.\nOverall Score: 1", 1, "one_became_ten"),  # the judge's own word comes first
        ([3, 3, 3, 3], "Bad.\nOverall score: 1/10", 1, "one_became_ten"),
        ([1, 1, 1, 1], "An Overall Score: 1? No.\n**Overall Score:** [10]", 10, None),  # and its last word
        ([1, 1, 1, 1], "Overall Score: 7", 1, "one_became_ten"),  # 7 tells neither
        (None, "Good.", 10, "unchecked_ten"),
        (["N/A"] * 4, None, 10, "unchecked_ten"),
    ],
)
@pytest.mark.parametrize("ten", [10, 10.0, "10"])
def test_a_one_that_became_a_ten_is_told_by_critique_and_mean(ratings, critique, score, fault, ten) -> None:
    columns = record(answer("Moss.", [3] * 4, 1.5), answer("Leaves.", ratings, ten, critique=critique))
    result = run(columns, score="overall")
    names = ("one_became_ten", "undecided_ten", "unchecked_ten")
    assert {name: result.faults[name] for name in names if name in result.faults} == ({fault: 1} if fault else {})
    if score is None:  # only one score is left
        assert result.rule == "too_few_scored"
    else:
        assert scores(columns, score="overall") == (max(score, 1.5), min(score, 1.5))


def test_a_ten_in_the_judges_own_words_stays() -> None:
    columns = record(answer("Leaves.", [1] * 4, "10/10"), answer("Moss.", [1] * 4, 3))
    assert scores(columns, score="overall") == (10, 3)
    assert run(columns).faults == Counter(fraction_rating=1, equal_scores=1)


def test_a_record_is_compared_by_one_scale() -> None:
    """A mean of 4.5 out of 5 beside an overall score of 6 out of 10: the latter must not win."""
    mixed = record(answer("Leaves.", [5, 4], 9), answer("Moss.", [3, 3], 5), answer("Stone.", None, 6))
    assert {scores({**mixed, "instruction": str(n)}) for n in range(20)} == {(4.5, 3)}
    alone = record(answer("Leaves.", [5, 4], 9), answer("Moss.", None, 5), answer("Stone.", None, 6))
    assert {scores({**alone, "instruction": str(n)}) for n in range(20)} == {(9, 5), (9, 6)}
    assert run(alone).faults == Counter(missing_annotations=2, mean_from_overall=1, missing_rating=2)
    fine = {"fine-grained_score": 3.25}
    given = record(
        answer("Leaves.", [5, 4], 9, **{"fine-grained_score": 1}),
        answer("Moss.", None, 10, **fine),
        answer("Stone.", None, 6),
    )
    assert scores(given) == (4.5, 3.25)  # fine-grained_score is a mean of ratings too
    assert run(given).faults == Counter(missing_annotations=2, missing_rating=2, undecided_ten=1)


BY_HAND: list[tuple[dict[str, Any], str | None, tuple[float, float] | None, dict[str, int]]] = [
    (  # nothing wrong: means 4.5 and 2
        record(answer("a", [4, 5, 4, 5], 8), answer("b", [2, 2, 2, 2], 3), models=["ant", "bee"]),
        None,
        (4.5, 2),
        {},
    ),
    (  # UltraFeedback's own way: ratings are texts, means 14/4 and (1 + 2 + 2) / 3; a 1 became a 10
        record(answer("a", "4334", 7.5), answer("b", ["1", "N/A", "2", "2"], 10)),
        None,
        (3.5, 5 / 3),
        {"string_rating": 7, "not_applicable": 1, "decimal_rating": 1, "one_became_ten": 1},
    ),
    (  # decimals and fractions: (4.5 + 4 + 3 + 5) / 4 = 4.125 and (1 + 2) / 2; the 10 stays
        record(answer("a", ["4.5", "4/5", 3, 5], "10"), answer("b", [1, "4/10", "four", 2], "8/10")),
        None,
        (4.125, 1.5),
        {
            "decimal_rating": 1,
            "fraction_rating": 2,
            "string_rating": 1,
            "unclear_fraction": 1,
            "unreadable_rating": 1,
        },
    ),
    (  # out of range: 0, 6, -1 and 11 are left out, so the means are 3 and (2 + 4) / 2; equal
        record(answer("a", [0, 6, 3, 3], 11), answer("b", [2, 4, -1, True], None)),
        None,
        (3, 3),
        {"out_of_range": 4, "unreadable_rating": 1, "missing_overall": 1, "equal_scores": 1},
    ),
    (  # a ten that cannot be told, with a mean of 3; an aspect that was left empty
        record(answer("a", [3, 3, 3, 3], 10), answer("b", [2, None, 3], 4)),
        None,
        (3, 2.5),
        {"undecided_ten": 1, "missing_rating": 2},
    ),
    (  # one response is blank, one has no score, two are left
        record(answer(" ", [5] * 4, 9), answer("a", ["N/A"] * 4, 9), answer("b", [4] * 4, 8), answer("c", [1] * 4, 2)),
        None,
        (4, 1),
        {"empty_response": 1, "not_applicable": 4},
    ),
    (  # the same without the last: one is left by mean, but the overall scores are two
        record(answer(" ", [5] * 4, 9), answer("a", ["N/A"] * 4, 9), answer("b", [4] * 4, 8)),
        None,
        (9, 8),
        {"empty_response": 1, "not_applicable": 4, "mean_from_overall": 1},
    ),
    (
        record(answer("", [5] * 4, 9), answer("a", [4] * 4, 9)),
        "too_few_scored",
        None,
        {"empty_response": 1, "too_few_scored": 1},
    ),
    (record(), "too_few_scored", None, {"too_few_scored": 1}),
    (
        record(answer("a", [4] * 4, 9), answer("b", None, "N/A")),
        "too_few_scored",
        None,
        {"missing_annotations": 1, "not_applicable": 1, "too_few_scored": 1},
    ),
    (  # dropped as it is: what else is wrong with it is not looked at
        {**record(answer("a", "5555", 10)), "source": "truthful_qa"},
        "truthful_qa",
        None,
        {"truthful_qa": 1},
    ),
    (
        record(answer("a", [5] * 4, 9), answer(" a", [2] * 4, 3)),
        "identical_texts",
        None,
        {"identical_texts": 1, "duplicate_completions": 1},
    ),
    (
        record(answer("a", [5] * 4, 9), answer("b", [2] * 4, 3), answer("b", [2] * 4, 3)),
        None,
        (5, 2),
        {"duplicate_completions": 1},
    ),
    (
        record(answer("a", [5] * 4, 9, model="ant"), answer("b", [2] * 4, 3, model="cat"), models=["ant", "bee"]),
        None,
        (5, 2),
        {"models_disagree": 1},
    ),
    (  # their order is nobody's fault
        record(answer("a", [5] * 4, 9, model="bee"), answer("b", [2] * 4, 3, model="ant"), models=["ant", "bee"]),
        None,
        (5, 2),
        {},
    ),
    (
        record(answer("a", [5] * 4, 9), answer("b", [2] * 4, 3), instruction=" "),
        "empty_prompt",
        None,
        {"empty_prompt": 1},
    ),
    # pairs, binarised before
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8, "score_rejected": 6.5}, None, (8, 6.5), {}),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "7.5", "score_rejected": "7.5"},
        None,
        (7.5, 7.5),
        {"equal_scores": 1},
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "a ", "score_chosen": 8, "score_rejected": 8},
        "identical_texts",
        None,
        {"identical_texts": 1, "equal_scores": 1},
    ),
    (
        {"prompt": "p", "chosen": " ", "rejected": "a", "score_chosen": 8, "score_rejected": 2},
        "empty_chosen",
        None,
        {"empty_chosen": 1},
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "", "score_chosen": "8", "score_rejected": 2},
        "empty_rejected",
        None,
        {"empty_rejected": 1, "string_rating": 1},
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 8},
        "inverted_scores",
        None,
        {"inverted_scores": 1},
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "source": "TruthfulQA", "score_chosen": 2, "score_rejected": 8},
        "truthful_qa",
        None,
        {"truthful_qa": 1},
    ),
]
for columns, *_ in BY_HAND:
    if "models" in columns:
        for completion, model in zip(columns["completions"], columns["models"], strict=True):
            completion.setdefault("model", model)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_file_with_every_fault_gives_the_counts_worked_by_hand(tmp_path, kind) -> None:
    path = tmp_path / f"feedback.{kind}"
    table = [columns for columns, *_ in BY_HAND]
    if kind == "parquet":  # where ratings and scores of a column are of one type: texts
        table = [as_texts(columns) for columns in table if "completions" in columns]
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(columns) + "\n" for columns in table).encode()))
    total, dropped = Counter[str](), Counter[str | None]()
    for row, columns, (_, rule, expected, faults) in zip(sources.read([path]), table, BY_HAND, strict=False):
        result = binarise(row, rules(), seed=0)
        assert result.rule == rule, columns
        assert expected == (result.pair and (result.pair["score_chosen"], result.pair["score_rejected"])), columns
        if kind == "jsonl.gz":
            assert dict(result.faults) == faults, columns
        total += result.faults
        dropped[rule] += 1
    if kind == "jsonl.gz":
        assert dropped == {
            **{None: 12, "too_few_scored": 3, "truthful_qa": 2, "identical_texts": 2, "empty_prompt": 1},
            **{"empty_chosen": 1, "empty_rejected": 1, "inverted_scores": 1},
        }
        assert total == {
            **{"string_rating": 9, "decimal_rating": 2, "fraction_rating": 2, "unclear_fraction": 1},
            **{"not_applicable": 10, "out_of_range": 4, "unreadable_rating": 2, "one_became_ten": 1},
            **{"undecided_ten": 1, "missing_rating": 2, "missing_overall": 1, "missing_annotations": 1},
            **{"mean_from_overall": 1, "empty_response": 3, "too_few_scored": 3, "duplicate_completions": 2},
            **{"identical_texts": 2, "models_disagree": 1, "truthful_qa": 2, "empty_prompt": 1, "equal_scores": 3},
            **{"empty_chosen": 1, "empty_rejected": 1, "inverted_scores": 1},
        }
    else:
        assert total["missing_annotations"] == 1 and total["missing_rating"] == 2  # though every key is there


def as_texts(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: as_texts(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [as_texts(item) for item in value]
    return str(value) if name in ("Rating", "overall_score") and value is not None else value


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction": None, "completions": []}, "instruction is null, not a text"),
        ({"instruction": "\ud800", "completions": []}, "instruction holds half a character"),
        ({"instruction": "Hi", "completions": None}, "completions is null, not a list"),
        ({"instruction": "Hi", "completions": {"response": "x"}}, "completions is dict, not a list"),
        (record("x"), r"completions\[0\] must be an object with a response. Give it one, or leave"),
        (record(answer("a"), {"text": "x"}), r"completions\[1\] must be an object with a response"),
        (record(answer("a"), answer(None)), r"completions\[1\].response is null, not a text"),
        (record(answer("\ud800")), r"completions\[0\].response holds half a character"),
        (record(answer("a", annotations=[])), r'completions\[0\].annotations is list, not {aspect: {"Rating": ...}}'),
        (
            record(answer("a", annotations={"honesty": 5})),
            r'completions\[0\].annotations.honesty must be {"Rating": 1 to 5 or "N/A"}, not 5',
        ),
        ({"chosen": "a", "rejected": "b"}, "chosen is a text, so the row needs a prompt"),
        ({"prompt": "Hi", "chosen": None, "rejected": "b"}, "chosen is null, not a list"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": [{"role": "user", "content": "Hi"}]},
            "do not share one prompt; only their last turn may differ",
        ),
        (
            {side: [{"role": "user", "content": "Hi"}] for side in ("chosen", "rejected")},
            "must end with an assistant turn",
        ),
    ],
)
def test_broken_rows_are_named(columns, message) -> None:
    with pytest.raises(BadRow, match=f"^file.jsonl line 7: .*{message}"):
        run(columns)


def test_columns_without_feedback_are_a_mistake_in_the_file() -> None:
    with pytest.raises(UserError, match="line 7: feedback needs the columns .* found messages") as error:
        run({"messages": []})
    assert not isinstance(error.value, BadRow)
