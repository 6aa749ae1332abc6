import hashlib
import json

import pytest

from zephyr.feedback.draw import Drawn, draw, load_principles
from zephyr.feedback.judge import ASPECTS, CRITIQUE, aspect_asks, critique_asks, load_rubrics
from zephyr.feedback.record import Made, judged_twice, record, usable
from zephyr.feedback.request import Failure, Reply

OURS = load_rubrics(None)
PROMPT = "How do tides come about?"
NAMES = ("ant", "bee", "cat", "dog")
TEXTS = {"ant": "By the moon.", "bee": "By wind.", "cat": "By moon and sun.", "dog": "No idea."}
MADE = [
    Made(Drawn(name, "honesty", f"Heed honesty, {name}."), Reply(f"{TEXTS[name]}\n", f"{name}-v1", "stop", 20, 5, 0, 0.001))
    for name in NAMES
]  # fmt: skip
RATINGS = {  # of instruction following, honesty, truthfulness, helpfulness, and the overall score
    "ant": ("4", "5", "5", "3", "8"),
    "bee": ("4", "1", "1", "1", "1"),
    "cat": ("5", "N/A", "5", "5", "10"),
    "dog": ("1", "5", "N/A", "1", "2"),
}


def teach(made=MADE, ratings=RATINGS, structured=True, second=False, alter=None):
    """What a judge that goes by the table says to every request; `alter` may put something else in its place."""
    texts = usable(made)
    asks = aspect_asks("teacher", {}, OURS, PROMPT, texts, 0, structured=structured)
    asks += aspect_asks("teacher", {}, OURS, PROMPT, texts, 0, structured=structured, judgement=1) if second else []
    asks += critique_asks("teacher", {}, OURS, PROMPT, texts, structured=structured)
    told = []
    for ask in asks:
        names = [made[number].drawn.model for number in ask.order]
        column = [*ASPECTS, CRITIQUE].index(ask.aspect)
        stated = [ratings[name][column] for name in names]
        if ask.aspect == CRITIQUE:
            answer = {"feedback": f"Dear {names[0]}.", "overall_score": stated[0]}
            text = json.dumps(answer) if structured else f"Dear {names[0]}.\nOverall Score: {stated[0]}"
        elif structured:
            items = zip(names, stated, strict=True)
            text = json.dumps({f"text_{n}": {"rationale": f"of {m}", "rating": r} for n, (m, r) in enumerate(items, 1)})
        else:
            items = enumerate(zip(names, stated, strict=True), 1)
            text = "\n\n".join(f"Text {n} [{ask.mark}]\nRationale: of {m}\nRating: {r}" for n, (m, r) in items)
        reply = Reply(text, "teacher-2026-01", "stop", 1000, 100, 900, 0.01)
        told.append((ask, alter(ask, reply) or reply if alter else reply))
    return told


def kept(made=MADE, **options):
    return record(PROMPT, "ultrachat", made, teach(made, **options), OURS)


@pytest.mark.parametrize("structured", [True, False])
def test_a_record_in_full(structured):
    row, failures = kept(structured=structured)
    assert failures == [] and row["source"] == "ultrachat" and row["instruction"] == PROMPT
    assert row["models"] == list(NAMES) and row["judges"] == ["teacher-2026-01"]
    assert row["prompt_id"] == hashlib.sha256(PROMPT.encode()).hexdigest()
    assert row["cost"] == pytest.approx(4 * 0.001 + 8 * 0.01)
    assert row["completions"][2] == {
        "model": "cat",
        "principle": "honesty",
        "custom_system_prompt": "Heed honesty, cat.",
        "response": "By moon and sun.",
        "annotations": {
            "instruction_following": {"Rating": "5", "Rationale": "of cat"},
            "honesty": {"Rating": "N/A", "Rationale": "of cat"},
            "truthfulness": {"Rating": "5", "Rationale": "of cat", "Rationale For Rating": "of cat"},
            "helpfulness": {"Rating": "5", "Rationale": "of cat", "Rationale For Rating": "of cat"},
        },
        "critique": "Dear cat.\nOverall Score: 10",
        "overall_score": 10.0,
        "fine-grained_score": 5.0,  # (5 + 5 + 5) / 3: N/A is no number
        "generation": {
            "model": "cat-v1",
            "finish_reason": "stop",
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "cached_tokens": 0,
            "cost": 0.001,
        },
    }
    assert [completion["fine-grained_score"] for completion in row["completions"]] == [4.25, 1.75, 5.0, 7 / 3]
    assert [completion["overall_score"] for completion in row["completions"]] == [8.0, 1.0, 10.0, 2.0]
    first = row["judgements"][0]
    assert first["aspect"] == "instruction_following" and sorted(first["order"]) == [0, 1, 2, 3]
    assert first["ratings"] == [RATINGS[NAMES[place]][0] for place in first["order"]]
    assert len(row["judgements"]) == 8 and json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_order_of_arrival_changes_nothing():
    told = teach(second=True)
    assert record(PROMPT, "s", MADE, told[::-1], OURS) == record(PROMPT, "s", MADE, told, OURS)


def test_a_reply_that_cannot_be_read_is_missing_and_never_a_number():
    def alter(ask, reply):
        if ask.aspect == "honesty":
            return Reply("They are all fine.", "teacher-2026-01", "stop")
        if ask.aspect == "helpfulness":
            place = ask.order.index(1) + 1
            answer = json.loads(reply.text) | {f"text_{place}": {"rationale": "", "rating": "10"}}
            return Reply(json.dumps(answer), "teacher-2026-01", "stop")
        if ask.aspect == "truthfulness":
            return Failure("timed_out", "after 60 s")
        if ask.aspect == CRITIQUE and ask.order == (3,):
            return Reply("Good, 8 of 10.", "teacher-2026-01", "stop")
        return None

    row, failures = kept(alter=alter)
    bee, dog = row["completions"][1], row["completions"][3]
    assert bee["annotations"].keys() == {"instruction_following"} and bee["fine-grained_score"] == 4.0
    assert dog["critique"] is None and dog["overall_score"] is None
    start = {"prompt_id": row["prompt_id"], "stage": "judge", "judgement": 0}
    assert failures == [
        start | {"model": None, "aspect": "honesty", "cause": "missing_text", "detail": "Text 1"},
        start | {"model": None, "aspect": "truthfulness", "cause": "timed_out", "detail": "after 60 s"},
        start | {"model": "bee", "aspect": "helpfulness", "cause": "out_of_range", "detail": "10"},
        start | {"model": "dog", "aspect": "critique", "cause": "missing_rating", "detail": "Good, 8 of 10."},
    ]
    assert row["cost"] is None  # of three replies it is not known
    unread = [item for item in row["judgements"] if item["aspect"] == "honesty"]
    assert unread[0]["ratings"] == [None] * 4 and unread[0]["reply"] == "They are all fine."


def test_a_critique_that_the_server_cut_has_no_score():
    """Its 1 may be the beginning of a 10."""

    def alter(ask, reply):
        cut = Reply(reply.text, reply.model, "length")
        return cut if ask.aspect == CRITIQUE and ask.order == (1,) else None

    row, failures = kept(structured=False, alter=alter)
    assert [completion["overall_score"] for completion in row["completions"]] == [8.0, None, 10.0, 2.0]
    assert [(one["model"], one["aspect"], one["cause"]) for one in failures] == [("bee", "critique", "cut_off")]


def test_completions_that_did_not_come_are_neither_shown_nor_in_the_record():
    bad = [Failure("refused", "401"), Reply(" \n", "bee-v1", "length")]
    for broken, cause in zip(bad, ["refused", "empty_response"], strict=True):
        made = [MADE[0], MADE[1]._replace(reply=broken), *MADE[2:]]
        row, failures = kept(made)
        assert row["models"] == ["ant", "cat", "dog"] and set(usable(made)) == {0, 2, 3}
        assert [(one["model"], one["stage"], one["cause"]) for one in failures] == [("bee", "generate", cause)]
        assert [completion["overall_score"] for completion in row["completions"]] == [8.0, 10.0, 2.0]
        assert sorted(row["judgements"][0]["order"]) == [0, 1, 2]  # places in this record
        assert [item["order"] for item in row["judgements"] if item["aspect"] == CRITIQUE] == [[0], [1], [2]]
    made = [MADE[0], *[one._replace(reply=bad[0]) for one in MADE[1:]]]
    row, failures = record(PROMPT, "s", made, [], OURS)
    assert row is None and len(failures) == 4 and failures[-1]["cause"] == "too_few_completions"


def test_two_judgements_are_averaged_and_compared():
    """In the second one helpfulness is 5 where it was 1, and honesty of the cat is 2 where it was N/A."""

    def alter(ask, reply):
        if ask.judgement == 1:
            answer = json.loads(reply.text)
            for item in answer.values():
                if ask.aspect == "helpfulness" and item["rating"] == "1":
                    item["rating"] = "4"
                if item["rationale"] == "of cat" and ask.aspect == "honesty":
                    item["rating"] = "2"
                if item["rationale"] == "of ant" and ask.aspect == "truthfulness":
                    item["rating"] = "perhaps"
            return Reply(json.dumps(answer), "teacher-2026-01", "stop", 0, 0, 0, 0.0)
        return None

    row, failures = kept(second=True, alter=alter)
    rated = {c["model"]: {a: one["Rating"] for a, one in c["annotations"].items()} for c in row["completions"]}
    assert rated["bee"]["helpfulness"] == rated["dog"]["helpfulness"] == "2.5"
    assert rated["cat"] == {"instruction_following": "5", "honesty": "2", "truthfulness": "5", "helpfulness": "5"}
    assert rated["ant"]["truthfulness"] == "5" and rated["dog"]["truthfulness"] == "N/A"
    assert [(one["model"], one["judgement"], one["cause"]) for one in failures] == [("ant", 1, "unreadable_rating")]
    twice = {aspect: (first, second) for aspect, first, second in judged_twice(row)}
    assert twice["instruction_following"][0] == twice["instruction_following"][1]
    assert twice["helpfulness"] == ([3, 1, 5, 1], [3, 4, 5, 4])
    assert twice["honesty"][0][2] is None and twice["honesty"][1][2] == 2
    assert twice["truthfulness"][1][0] is None
    assert not list(judged_twice(kept()[0]))


def test_a_drawn_prompt_becomes_its_record():
    drawn = draw(PROMPT, "flan", [*NAMES, "eel"], load_principles(None), seed=5)
    made = [Made(one, Reply(f"{one.model} speaks", one.model, "stop")) for one in drawn]
    row, _ = record(PROMPT, "flan", made, teach(made, {one.model: ("3", "3", "3", "3", "5") for one in drawn}), OURS)
    assert row["models"] == [one.model for one in drawn]
    assert [c["custom_system_prompt"] for c in row["completions"]] == [one.system for one in drawn]


def test_the_preference_pair_of_a_record():
    """Means 4.25, 1.75, 5, 7/3: the cat is chosen, by the mean and by the overall score of 10. Its 10 stays a 10 and
    the bee's 1 a 1, whatever the means are; nothing of a record has to be mended."""
    binarise = pytest.importorskip("zephyr.data.binarise")
    row, _ = kept()
    for score, scores in (("mean", (5.0, 1.75)), ("overall", (10.0, 1.0))):
        rules = binarise.Rules(score, binarise.Rejected(True, 0.0), "drop", "drop")
        found = binarise.binarise(("row 1", row), rules, 0)
        assert [found.pair[side][-1]["content"] for side in ("chosen", "rejected")] == ["By moon and sun.", "By wind."]
        assert (found.pair["score_chosen"], found.pair["score_rejected"]) == scores
        assert found.pair["prompt_id"] == row["prompt_id"]
        assert found.faults.keys() == {"string_rating", "not_applicable"}
    harsh = {name: ("1", "1", "1", "1", "10" if name == "dog" else "3") for name in NAMES}
    rules = binarise.Rules("overall", binarise.Rejected(True, 0.0), "drop", "drop")
    found = binarise.binarise(("row 1", kept(ratings=harsh)[0]), rules, 0)
    assert found.pair["chosen"][-1]["content"] == "No idea." and found.pair["score_chosen"] == 10.0
