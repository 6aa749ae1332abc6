"""Preference pairs of feedback: from several scored completions of a prompt to one chosen and one rejected.

In: UltraFeedback's raw layout (Cui et al., 2023; `instruction` and `completions` with ratings), or pairs that are
binarised already (`chosen`, `rejected`), which are checked by the same rules. Out: ultrafeedback_binarized's layout.
Chosen is the completion with the best score (Tunstall et al., 2023, section 4.2), the first of them where several are.

A rating is one of 1 to 5, an overall score one of 1 to 10. What is known to be wrong with those files has a name, is
handled by it, and is counted, whichever score the rules then use:

string_rating          a whole number as text ("4"), as UltraFeedback has throughout: read
decimal_rating         not whole ("4.5", 7.5): read as it stands, never cut
fraction_rating        out of the top of its own scale ("4/5" of 1 to 5, "8/10" of 1 to 10): its numerator
not_applicable         "N/A" in any spelling: left out of the mean
unclear_fraction       out of another number ("4/10" of 1 to 5): left out
out_of_range           below 1, beyond the top, NaN or infinite: left out
unreadable_rating      words, truth values, lists: left out; a guess would enter the training data unseen
missing_annotations    a completion without a Rating of any of the four aspects
missing_rating         an aspect that is absent, or without Rating, where others have one: left out
missing_overall        a completion without overall_score
one_became_ten         an overall_score 10 that was a 1: read as 1 (see `_ten`)
undecided_ten          a 10 of which this cannot be told: no overall score
unchecked_ten          a 10 with nothing to tell it by: stays
mean_from_overall      a record without two means: compared by overall_score under score=mean too
empty_response         a completion without text: never a side
duplicate_completions  a text that stood there before
identical_texts        a completion with the text of chosen: never drawn; in a pair, both sides alike
equal_scores           the rejected that was drawn has the score of chosen; in a pair, both scores are equal
too_few_scored         a record with fewer than two completions that have text and score
models_disagree        `models` are not the completions' models
truthful_qa            a prompt of the TruthfulQA benchmark
empty_prompt           nothing is asked
empty_chosen, empty_rejected, inverted_scores, missing_score    in pairs: a side or score that is not there, or the
                       score of rejected is the higher one
"""

import hashlib
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from zephyr.data.messages import BadRow, Message, Row, checked_list, checked_message, checked_messages
from zephyr.errors import UserError

# Why a row gives no pair, in the order in which that is asked.
RULES = (
    "truthful_qa",
    "empty_prompt",
    "too_few_scored",
    "empty_chosen",
    "empty_rejected",
    "identical_texts",
    "inverted_scores",
    "no_gap",
    "equal_scores",
)
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
_RATING, _OVERALL = 5, 10  # the tops of the scales; both begin at 1
_NOT_APPLICABLE = {"n/a", "na", "notapplicable", "none"}  # without blanks and stops
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
_FRACTION = re.compile(rf"({_NUMBER.pattern})\s*(?:/|out of)\s*({_NUMBER.pattern})")
_STATED = re.compile(rf"overall score\W{{0,6}}?({_NUMBER.pattern})", re.IGNORECASE)
_LONGEST = 40  # characters of a rating's text; what is longer is a sentence
_EPSILON = 1e-9  # means of thirds: 13/3 - 10/3 is a little less than 1
_TRUTHFUL_QA = {"truthful_qa", "truthfulqa"}
_GAP = re.compile(r"gap\s*>=\s*([0-9]+(?:\.[0-9]+)?)")


class Rejected(NamedTuple):
    """Which of the rest is rejected."""

    worst: bool  # the lowest score (the first of them), in place of a random one
    gap: float  # least distance of its score below chosen's


@dataclass(frozen=True)
class Rules:
    """How a pair is taken out of a record."""

    score: Literal["mean", "overall"]  # of the aspects' ratings, or the critique's single score
    rejected: Rejected
    ties: Literal["keep", "drop", "redraw"]  # when the drawn one scores like chosen: redraw among those below
    truthful_qa: Literal["drop", "keep"]


class Binarised(NamedTuple):
    """What became of a row."""

    pair: dict[str, Any] | None  # a row in ultrafeedback_binarized's layout
    rule: str | None  # why there is none
    evidence: str  # what met the rule, at most 80 characters
    faults: Counter[str]  # name -> how many ratings, completions or rows it was met in


class _Answer(NamedTuple):
    text: str
    mean: float | None
    overall: float | None


def parse_rejected(text: str, key: str) -> Rejected:
    """`random`, `worst` or `gap>=x`; `key` is the configuration key, for the message. Raises UserError at others."""
    if gap := _GAP.fullmatch(text.strip()):
        return Rejected(False, float(gap[1]))
    if text not in ("random", "worst"):
        raise UserError(
            f"{key}={text!r} is none of random, worst, gap>=x; x is a distance of scores, 0 or more, as in gap>=1.5 "
            "(which a shell takes in quotes alone)."
        )
    return Rejected(text == "worst", 0.0)


def binarise(row: Row, rules: Rules, seed: int) -> Binarised:
    """The pair of a row, or why there is none. Depends on nothing but the row, the rules and the seed.

    Raises BadRow at a structure that cannot be read, UserError at columns that hold no feedback at all.
    """
    where, columns = row
    pair = {"chosen", "rejected"} <= columns.keys()
    if not pair and not {"instruction", "completions"} <= columns.keys():
        raise UserError(
            f"{where}: feedback needs the columns instruction and completions (or chosen and rejected, where it is "
            f"binarised already); found {', '.join(sorted(columns)) or 'none'}."
        )
    faults = Counter[str]()
    source = columns.get("source")
    if isinstance(source, str) and source.strip().casefold() in _TRUTHFUL_QA:
        faults["truthful_qa"] += 1
        if rules.truthful_qa == "drop":
            return _dropped("truthful_qa", source, faults)
    return _pair(columns, where, rules, faults) if pair else _record(columns, where, rules, seed, faults)


def sides(row: Row) -> tuple[list[Message], list[Message]]:
    """Chosen and rejected of a binarised row: whole conversations that differ in their last turn alone.

    A side may be a conversation, or a text or messages behind the row's `prompt`. Raises BadRow.
    """
    where, columns = row
    prompt = columns.get("prompt")
    chosen, rejected = (_side(columns[name], prompt, where, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow(f"{where}: chosen and rejected do not share one prompt; only their last turn may differ.")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise BadRow(f"{where}: chosen and rejected must end with an assistant turn.")
    return chosen, rejected


def _side(value: Any, prompt: Any, where: str, name: str) -> list[Message]:
    if isinstance(value, str):
        if prompt is None:
            raise BadRow(f"{where}: {name} is a text, so the row needs a prompt.")
        start = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else checked_list(prompt, where, "prompt")
        )
        return checked_messages([*start, {"role": "assistant", "content": value}], where, name)
    messages = checked_list(value, where, name)
    if isinstance(prompt, list) and len(messages) == 1:
        messages = [*prompt, *messages]
    return checked_messages(messages, where, name)


def _pair(columns: dict[str, Any], where: str, rules: Rules, faults: Counter[str]) -> Binarised:
    chosen, rejected = sides((where, columns))
    high, low = (_side_score(columns.get(name), faults) for name in ("score_chosen", "score_rejected"))
    distance = math.nan if high is None or low is None else high - low
    texts = [side[-1]["content"].strip() for side in (chosen, rejected)]
    met = {
        "empty_prompt": not _prompt(chosen).strip(),
        "empty_chosen": not texts[0],
        "empty_rejected": not texts[1],
        "identical_texts": texts[0] == texts[1] != "",
        "inverted_scores": distance < 0,
        "equal_scores": distance == 0,
    }
    faults.update(name for name, is_met in met.items() if is_met)
    for name in ("empty_prompt", "empty_chosen", "empty_rejected"):
        if met[name]:
            return _dropped(name, "", faults)
    if met["identical_texts"]:
        return _dropped("identical_texts", texts[0], faults)
    scores = f"{columns.get('score_chosen')} and {columns.get('score_rejected')}"
    if met["inverted_scores"] or (met["equal_scores"] and rules.ties != "keep"):
        return _dropped("inverted_scores" if distance < 0 else "equal_scores", scores, faults)
    if rules.rejected.gap and not distance >= rules.rejected.gap - _EPSILON:
        return _dropped("no_gap", scores, faults)
    return Binarised(_layout(chosen, rejected, high, low), None, "", faults)


def _record(columns: dict[str, Any], where: str, rules: Rules, seed: int, faults: Counter[str]) -> Binarised:
    prompt = checked_message("user", columns["instruction"], where, "instruction")
    completions = checked_list(columns["completions"], where, "completions")
    answers = [_answer(item, where, f"completions[{n}]", faults) for n, item in enumerate(completions)]
    models = columns.get("models")
    if models is not None and (  # their order says nothing: a completion names its own model
        not isinstance(models, list) or Counter(map(str, models)) != Counter(str(c.get("model")) for c in completions)
    ):
        faults["models_disagree"] += 1
    answers = [answer for answer in answers if answer.text.strip()]
    if copies := len(answers) - len({answer.text.strip() for answer in answers}):
        faults["duplicate_completions"] += copies
    if not prompt["content"].strip():
        faults["empty_prompt"] += 1
        return _dropped("empty_prompt", "", faults)
    scored = _scored(answers, rules.score, faults)
    if len(scored) < 2:
        faults["too_few_scored"] += 1
        return _dropped("too_few_scored", f"{len(scored)} of {len(completions)} have text and score", faults)
    best = max(scored, key=_score)
    text = best[1].strip()
    rest = [other for other in scored if other[1].strip() != text]
    if copies := len(scored) - 1 - len(rest):
        faults["identical_texts"] += copies
        if not rest:
            return _dropped("identical_texts", text, faults)
    if gap := rules.rejected.gap:
        nearest = max(rest, key=_score)
        rest = [other for other in rest if best[0] - other[0] >= gap - _EPSILON]
        if not rest:
            return _dropped("no_gap", f"{best[0]:g} and at best {nearest[0]:g}", faults)
    draw = random.Random(f"{seed} {prompt['content']}")
    other = min(rest, key=_score) if rules.rejected.worst else draw.choice(rest)
    if other[0] == best[0]:
        faults["equal_scores"] += 1
        below = [other for other in rest if other[0] < best[0]] if rules.ties == "redraw" else []
        if rules.ties == "drop" or (rules.ties == "redraw" and not below):
            return _dropped("equal_scores", f"{best[0]:g} and {other[0]:g}", faults)
        other = draw.choice(below) if below else other
    turns = _turns(columns.get("prompt"), prompt, where)
    chosen, rejected = ([*turns, {"role": "assistant", "content": side[1]}] for side in (best, other))
    return Binarised(_layout(chosen, rejected, best[0], other[0]), None, "", faults)


def _turns(value: Any, prompt: Message, where: str) -> list[Message]:
    """What the completions answer: `prompt`, where it holds the turns of which the instruction is the text."""
    if not isinstance(value, list):
        return [prompt]
    turns = checked_messages(value, where, "prompt")
    if turns[-1]["role"] != "user":
        raise BadRow(f"{where}: prompt must end with a user turn, as the completions answer it.")
    return turns


def _scored(answers: list[_Answer], score: str, faults: Counter[str]) -> list[tuple[float, str]]:
    """Score and text of those that have both. All of a record by one scale: 1 to 5 beside 1 to 10 ranks nothing."""
    if score == "mean":
        means = [(answer.mean, answer.text) for answer in answers if answer.mean is not None]
        if len(means) > 1:
            return means
    overall = [(answer.overall, answer.text) for answer in answers if answer.overall is not None]
    if score == "mean" and len(overall) > 1:
        faults["mean_from_overall"] += 1
    return overall


def _score(scored: tuple[float, str]) -> float:
    return scored[0]


def _answer(completion: Any, where: str, place: str, faults: Counter[str]) -> _Answer:
    if not isinstance(completion, dict) or "response" not in completion:
        raise BadRow(f"{where}: {place} must be an object with a response. Give it one, or leave the completion out.")
    text = completion["response"]
    checked_message("assistant", text, where, f"{place}.response")
    if not text.strip():
        faults["empty_response"] += 1
    mean = _aspects(completion.get("annotations"), f"{where}: {place}", faults)
    if mean is None and (given := _present(completion.get("fine-grained_score"))) is not None:
        mean, fault = _reading(given, 1, _RATING)
        if fault and fault != "decimal_rating":  # which a mean may well be
            faults[fault] += 1
    return _Answer(text, mean, _overall(completion, mean, faults))


def _aspects(annotations: Any, place: str, faults: Counter[str]) -> float | None:
    """Mean of the four aspects' ratings, 1 to 5, those left out that cannot be read."""
    if annotations is not None and not isinstance(annotations, dict):
        raise BadRow(f'{place}.annotations is {type(annotations).__name__}, not {{aspect: {{"Rating": ...}}}}.')
    values = [_rating((annotations or {}).get(aspect), place, aspect) for aspect in _ASPECTS]
    if not any(value is not None for value in values):  # Parquet holds the keys of an absent one all the same
        faults["missing_annotations"] += 1
        return None
    known = []
    for value in values:
        number, fault = (None, "missing_rating") if value is None else _reading(value, 1, _RATING)
        if fault:
            faults[fault] += 1
        if number is not None:
            known.append(number)
    return math.fsum(known) / len(known) if known else None


def _rating(annotation: Any, place: str, aspect: str) -> Any:
    if annotation is None:
        return None
    if not isinstance(annotation, dict):
        raise BadRow(f'{place}.annotations.{aspect} must be {{"Rating": 1 to 5 or "N/A"}}, not {annotation!r:.40}.')
    return _present(annotation.get("Rating"))


def _present(value: Any) -> Any:
    return None if value == "" else value


def _overall(completion: dict[str, Any], mean: float | None, faults: Counter[str]) -> float | None:
    value = _present(completion.get("overall_score"))
    if value is None:
        faults["missing_overall"] += 1
        return None
    number, fault = _reading(value, 1, _OVERALL)
    if fault:
        faults[fault] += 1
    if number != _OVERALL or fault == "fraction_rating":  # "10/10" is a ten in the judge's own words
        return number
    number, fault = _ten(completion.get("critique"), mean)
    if fault:
        faults[fault] += 1
    return number


def _ten(critique: Any, mean: float | None) -> tuple[float | None, str | None]:
    """What an overall score of 10 was. UltraFeedback's program read scores up to 1 as fractions and multiplied them
    by 10, so true 1s became 10s in 2,628 completions. The critique's own "Overall Score: N" decides, where it says 1
    or 10; else the mean rating, by the bounds of that project's repair: up to 2 it was a 1, above 4 a 10."""
    stated = _STATED.findall(critique) if isinstance(critique, str) else []
    last = float(stated[-1]) if stated else None
    if last in (1, _OVERALL):
        return (1.0, "one_became_ten") if last == 1 else (10.0, None)
    if mean is None:
        return 10.0, "unchecked_ten"
    if mean <= 2:
        return 1.0, "one_became_ten"
    return (10.0, None) if mean > 4 else (None, "undecided_ten")


def _side_score(value: Any, faults: Counter[str]) -> float | None:
    if _present(value) is None:
        faults["missing_score"] += 1
        return None
    number, fault = _reading(value, -sys.float_info.max, sys.float_info.max)  # its scale is not ours to know
    if fault and fault != "decimal_rating":
        faults[fault] += 1
    return number


def _reading(value: Any, low: float, top: float) -> tuple[float | None, str | None]:
    """The number that a rating says, None where it says none, and the name of what is odd about it."""
    if type(value) is str:
        return _text(value, low, top) if len(value) <= _LONGEST else (None, "unreadable_rating")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, "unreadable_rating"
    if not low <= value <= top:
        return None, "out_of_range"
    return float(value), None if value == int(value) else "decimal_rating"


@lru_cache(4096)
def _text(text: str, low: float, top: float) -> tuple[float | None, str | None]:
    text = text.strip().casefold()
    if "".join(text.split()).replace(".", "") in _NOT_APPLICABLE:
        return None, "not_applicable"
    fraction = _FRACTION.fullmatch(text)
    if not fraction and not _NUMBER.fullmatch(text):
        return None, "unreadable_rating"
    if fraction and float(fraction[2]) != top:
        return None, "unclear_fraction"
    number = float(fraction[1] if fraction else text)
    if not low <= number <= top:
        return None, "out_of_range"
    if fraction:
        return number, "fraction_rating"
    return number, "string_rating" if number.is_integer() else "decimal_rating"


def _layout(
    chosen: list[Message], rejected: list[Message], score_chosen: float | None, score_rejected: float | None
) -> dict[str, Any]:
    prompt = _prompt(chosen)
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
    }


def _prompt(messages: list[Message]) -> str:
    """The first user turn: what ultrachat_200k and ultrafeedback_binarized call the prompt."""
    return next(message["content"] for message in messages if message["role"] == "user")


def _dropped(rule: str, evidence: str, faults: Counter[str]) -> Binarised:
    return Binarised(None, rule, " ".join(evidence.split())[:80], faults)
