"""Which pair becomes of a record: its layout, the draw of the rejected side, ties, gaps, and pairs binarised before."""

import hashlib
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.rated import RANDOM, answer, record, rules, run, scores
from zephyr.data import sources
from zephyr.data.binarise import Rejected, Rules, binarise, parse_rejected
from zephyr.data.encode import Options
from zephyr.data.tokenised import tokenised_pairs
from zephyr.demo import writers
from zephyr.errors import UserError

WORST = Rejected(worst=True, gap=0)


def test_the_layout_is_ultrafeedback_binarizeds() -> None:
    pair = run(record(answer("Crumbs.", [3, 3, 3, 3], 6), answer("Leaves, mostly.", [5, 4, 5, 4], 9))).pair
    chosen = [{"role": "user", "content": "What do ants eat?"}, {"role": "assistant", "content": "Leaves, mostly."}]
    assert pair == {
        "prompt": "What do ants eat?",
        "prompt_id": hashlib.sha256(b"What do ants eat?").hexdigest(),
        "chosen": chosen,
        "rejected": [chosen[0], {"role": "assistant", "content": "Crumbs."}],
        "messages": chosen,
        "score_chosen": 4.5,
        "score_rejected": 3.0,
    }
    assert [type(pair[name]) for name in ("score_chosen", "score_rejected")] == [float, float]


def four(*means: float) -> dict[str, Any]:
    return record(*(answer(f"Answer {n}.", [mean] * 4, 5) for n, mean in enumerate(means)))


def drawn(columns: dict[str, Any], **changed: Any) -> Counter[str | None]:
    """How often each text is rejected (or a rule drops the record) over 400 seeds."""
    counts = Counter[str | None]()
    for seed in range(400):
        pair, rule, _, _ = run(columns, seed, **changed)
        counts[pair["rejected"][-1]["content"] if pair else rule] += 1
    return counts


def test_the_random_rejected_is_uniform_over_the_rest() -> None:
    """400 draws of three: 133.3 each, standard deviation 9.4; four of them either way."""
    counts = drawn(four(2, 5, 3, 1))
    assert set(counts) == {"Answer 0.", "Answer 2.", "Answer 3."}
    assert all(96 <= count <= 171 for count in counts.values())


def test_the_draw_depends_on_the_instruction() -> None:
    columns = four(2, 5, 3, 1)
    texts = Counter(run({**columns, "instruction": f"What? {n}"}).pair["rejected"][-1]["content"] for n in range(400))  # type: ignore[index]
    assert all(96 <= count <= 171 for count in texts.values()) and len(texts) == 3


def test_worst_and_gap() -> None:
    assert drawn(four(2, 5, 1, 1), rejected=WORST) == {"Answer 2.": 400}  # the first of the worst
    assert set(drawn(four(2, 5, 3, 4.5), rejected=Rejected(False, 2))) == {"Answer 0.", "Answer 2."}
    assert set(drawn(four(2, 5, 3, 4.5), rejected=Rejected(False, 0.5))) == {"Answer 0.", "Answer 2.", "Answer 3."}
    result = run(four(4, 5, 4.5), rejected=Rejected(False, 1.5))
    assert (result.pair, result.rule, result.evidence) == (None, "no_gap", "5 and at best 4.5")
    thirds = record(answer("A.", [5, 4, 4], 5), answer("B.", [3, 3, 4], 5))  # 13/3 - 10/3, a little below 1 in floats
    assert run(thirds, rejected=Rejected(False, 1)).pair is not None


def test_ties_are_kept_dropped_or_drawn_again() -> None:
    columns = four(3, 5, 5, 2)  # Answer 1 is chosen: the first of the best
    kept = drawn(columns)
    assert set(kept) == {"Answer 0.", "Answer 2.", "Answer 3."}
    tied = kept.pop("Answer 2.")
    assert drawn(columns, ties="drop") == {**kept, "equal_scores": tied}
    again = drawn(columns, ties="redraw")
    assert set(again) == {"Answer 0.", "Answer 3."} and all(160 <= count <= 240 for count in again.values())
    for seed in range(40):  # drawing again changes tied pairs alone
        before, after = run(columns, seed), run(columns, seed, ties="redraw")
        assert before.faults == after.faults
        assert before.faults["equal_scores"] == (before.pair != after.pair)
    assert drawn(four(4, 4, 4), ties="redraw") == {"equal_scores": 400}
    assert drawn(four(4, 4, 4), ties="redraw", rejected=WORST) == {"equal_scores": 400}
    assert run(four(4, 4), ties="drop").evidence == "4 and 4"


def test_a_text_never_stands_on_both_sides() -> None:
    columns = record(answer("Leaves.", [5]), answer("Leaves. \n", [1]), answer("Moss.", [2]), answer("Leaves.", [3]))
    assert drawn(columns) == {"Moss.": 400}
    faults = run(columns).faults
    assert faults["identical_texts"] == 2 and faults["duplicate_completions"] == 2
    copies = record(answer("Leaves.", [5]), answer("Leaves.", [1]))
    assert run(copies)[:3] == (None, "identical_texts", "Leaves.")


def test_truthful_qa_is_kept_on_demand() -> None:
    columns = {**record(answer("a", [5] * 4, 9), answer("b", [2] * 4, 3)), "source": "truthful_qa"}
    assert scores(columns, truthful_qa="keep") == (5, 2)
    assert run(columns, truthful_qa="keep").faults == {"truthful_qa": 1}


def test_pairs_meet_the_same_rules() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    sides = {side: [*chat, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = run({**sides, "prompt": "another", "prompt_id": "another", "score_chosen": 3, "score_rejected": 1}).pair
    assert pair == {
        **sides,
        "messages": sides["chosen"],
        "prompt": "Hi",  # what the conversation says, whatever the columns do
        "prompt_id": hashlib.sha256(b"Hi").hexdigest(),
        "score_chosen": 3.0,
        "score_rejected": 1.0,
    }
    tie = {**sides, "score_chosen": 3, "score_rejected": 3}
    assert run(tie).pair and run(tie, ties="drop").rule == "equal_scores"
    assert run(tie, ties="redraw").rule == "equal_scores"  # there is nothing else to draw
    near = {**sides, "score_chosen": 3, "score_rejected": 1.5}
    assert run(near, rejected=Rejected(False, 1.5)).pair and run(near, rejected=Rejected(False, 2)).rule == "no_gap"
    result = run(sides)
    assert result.pair and result.pair["score_chosen"] is None and result.faults == {"missing_score": 2}
    assert run(sides, rejected=Rejected(False, 1)).rule == "no_gap"


def test_rejected_is_read_from_its_text() -> None:
    assert parse_rejected("random", "rejected") == RANDOM
    assert parse_rejected("worst", "rejected") == WORST
    assert parse_rejected("gap>=1.5", "rejected") == parse_rejected(" gap >= 1.5", "rejected") == Rejected(False, 1.5)
    for nonsense in ("", "best", "gap", "gap>=", "gap>=-1", "gap>1", "gap>=x", "gap>=nan", "gap>=1e999", "random "):
        with pytest.raises(UserError, match="rejected='.*' is none of random, worst, gap>=x"):
            parse_rejected(nonsense, "rejected")


RATINGS = st.sampled_from([1, 2, 3, 4, 5, "1", "3", "5", "N/A", "4.5", "4/5", None, 0, 10])
TEXTS = st.sampled_from(["", " ", "ant", "bee", "bee ", "cat", "dog"])
COMPLETIONS = st.lists(st.builds(answer, TEXTS, st.lists(RATINGS, min_size=4, max_size=4), RATINGS), max_size=6)
EVERY_RULE = st.builds(
    Rules,
    st.sampled_from(["mean", "overall"]),
    st.builds(Rejected, st.booleans(), st.sampled_from([0, 0.5, 2])),
    st.sampled_from(["keep", "drop", "redraw"]),
    st.just("drop"),
)


@given(COMPLETIONS, EVERY_RULE, st.integers(0, 99))
def test_whatever_the_record_a_pair_keeps_the_rules(completions, how, seed) -> None:
    row = ("file.jsonl line 7", record(*completions))
    result = binarise(row, how, seed)
    assert result == binarise(("elsewhere line 9", json.loads(json.dumps(row[1]))), how, seed)
    assert (result.pair is None) == (result.rule is not None)
    assert all(count > 0 for count in result.faults.values())
    if result.pair is None:
        return
    chosen, rejected = (result.pair[side][-1]["content"] for side in ("chosen", "rejected"))
    assert {chosen, rejected} <= {completion["response"] for completion in completions}
    assert chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip()
    distance = result.pair["score_chosen"] - result.pair["score_rejected"]
    assert distance >= how.rejected.gap and (distance > 0 or how.ties == "keep")


def test_training_takes_the_same_pairs(tmp_path) -> None:
    """data.train on the demo's raw feedback, and on the file binarised before by the paper's rules: the same tokens."""
    raw = [("row", columns) for columns in writers.feedback(seed=5, count=120)]
    pairs = [binarise(row, rules(), seed=3).pair for row in raw]
    assert all(pairs)
    assert [sources.preference(row, seed=3) for row in raw] == [(p["chosen"], p["rejected"]) for p in pairs if p]
    tables = []
    for name, rows in (("raw", [columns for _, columns in raw]), ("binarised", pairs)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(columns) + "\n" for columns in rows))
        options = Options(256, 128, False, None, seed=3, drop_bad_rows=False)
        table, _ = tokenised_pairs(str(path), "data.train", tiny.tokenizer(), options, tmp_path / "cache")
        tables.append([[table.row(side, n) for side in ("prompt", "chosen", "rejected")] for n in range(len(table))])
    assert tables[0] == tables[1] and len(tables[0]) == 120
