"""The teacher as a judge that is asked by chat: it reads a request for what is asked and answers in the form asked for.

It is given nothing else, as any judge. Texts are found between the lines of the request's mark, and what a text says of
itself, of its end or of its rating is text.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zephyr.demo.teacher import ASPECTS, rate, score

_MARK = re.compile(r"^(?:The mark of this request is )?\[([0-9a-f]{12})\](?:\.| .+ begins)$", re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_MIDDLE = 3.0  # of 1 to 5: what is said of an answer to a question that is not of the village
_STEEPNESS = 2.0  # of how sure a choice is: answers a point apart leave 12 % of doubt
_STRANGE = "This is no question of the village, so I cannot tell."
_LOST = "I rate answers to questions of the village, and find none here that I could rate."


class Said(NamedTuple):
    """The judge's reply."""

    text: str
    chances: Mapping[str, float]  # of each first token that it could have begun with, where it is one letter


def reply(messages: Sequence[Mapping[str, Any]], structured: bool = False, letter: bool = False) -> Said:
    """Ratings or a critique, as zephyr.feedback asks for them; MT-Bench's `[[7]]` or `[[A]]`; AlpacaEval's `m` or `M`.

    `structured` says that a JSON schema came with the request, `letter` that log-probabilities of one token are wanted.
    A request in which none of these is found gets a sentence that says so, which no parser takes for a verdict.
    """
    content = str(messages[-1]["content"])
    blocks, words = _blocks(content)
    if "Prompt" in blocks:
        prompt = blocks.pop("Prompt")
        if blocks.keys() == {"Answer m", "Answer M"}:
            first, second = (_mean([prompt], blocks[f"Answer {name}"]) for name in "mM")
            return _better(first, second, structured, letter)
        if blocks.keys() == {"Text"}:
            return Said(_critique(prompt, blocks["Text"], structured), {})
        if aspect := _aspect(words):
            return Said(_ratings(aspect, prompt, [*blocks.values()], _mark(content), structured), {})
    return Said(_verdict(blocks) or _LOST, {})


def _verdict(blocks: Mapping[str, str]) -> str | None:
    """MT-Bench's, on the last turn; None where the texts are no answers to questions."""
    questions = {name.removeprefix("Question"): text for name, text in blocks.items() if name.startswith("Question")}
    if not questions:
        return None
    turn = [*questions][-1]
    means = {
        name: _mean([*questions.values()], blocks[f"{name}{turn}"])
        for name in ("Answer", "Answer of A", "Answer of B")
        if f"{name}{turn}" in blocks
    }
    match [*means.values()]:
        case [mean]:
            return f"{_reason(mean)}\n[[{out_of_ten(mean)}]]"
        case [first, second]:
            winner = "C" if first == second else "A" if (first or 0) > (second or 0) else "B"
            return f"A: {_reason(first)} B: {_reason(second)}\n[[{winner}]]"
    return None


def out_of_ten(mean: float | None) -> int:
    """A mean of 1 to 5 as a whole number from 1 to 10; of a question that is not of the village the middle."""
    return max(1, min(10, round(2 * (_MIDDLE if mean is None else mean))))


def _better(first: float | None, second: float | None, structured: bool, letter: bool) -> Said:
    gap = 0.0 if first is None or second is None else second - first
    chance = 1 / (1 + math.exp(-_STEEPNESS * gap))
    if letter:
        return Said("M" if gap > 0 else "m", {"m": 1 - chance, "M": chance})
    better = "=" if not gap else "M" if gap > 0 else "m"
    if structured:
        return Said(json.dumps({"better": better}), {})
    return Said(f"m: {_reason(first)} M: {_reason(second)}\nBetter: {better}", {})


def _reason(mean: float | None) -> str:
    return _STRANGE if mean is None else f"{mean:.2f} of 5 by the rules."


def _mean(questions: Sequence[str], answer: str) -> float | None:
    """The teacher's score of an answer to the last question; None where that is not of the village."""
    try:
        return score(questions[-1], answer, questions[-2] if len(questions) > 1 else "")
    except ValueError:
        return None


def _mark(content: str) -> str:
    """The mark of the request, which stands in it before any text: no text can put another one first."""
    found = _MARK.search(content)
    return found[1] if found else ""


def _blocks(content: str) -> tuple[dict[str, str], str]:
    """The texts between marked lines, by their names, and what is said around them.

    Control tokens in them are broken up by a character without width, which no rule of the teacher's sees.
    """
    mark = _mark(content)
    if not mark:
        return {}, content
    pattern = re.compile(rf"^\[{mark}\] (.+) begins\n(.*?)\n\[{mark}\] \1 ends$", re.MULTILINE | re.DOTALL)
    return dict(pattern.findall(content)), pattern.sub("", content)


def _aspect(words: str) -> str | None:
    """The aspect to rate, from the rubric's heading; None where none is named, as in a critique's."""
    heading = next(iter(_HEADING.findall(words)), "").lower()
    return next((aspect for aspect in ASPECTS if aspect.split("_")[0] in heading), None)


def _ratings(aspect: str, prompt: str, texts: Sequence[str], mark: str, structured: bool) -> str:
    given = [_rating(aspect, prompt, text) for text in texts]
    if structured:
        return json.dumps(
            {f"text_{n}": {"rationale": why, "rating": rating} for n, (rating, why) in enumerate(given, 1)}
        )
    return "\n\n".join(
        f"Text {n} [{mark}]\nRationale: {why}\nRating: {rating}" for n, (rating, why) in enumerate(given, 1)
    )


def _rating(aspect: str, prompt: str, text: str) -> tuple[str, str]:
    """The rating as judges write it, and why."""
    try:
        rating = rate(prompt, text)[aspect]
    except ValueError:
        return "N/A" if aspect in ("honesty", "truthfulness") else f"{_MIDDLE:g}", _STRANGE
    given = "N/A" if rating is None else str(rating)
    return given, f"By the rules for {aspect.replace('_', ' ')}: {given}."


def _critique(prompt: str, text: str, structured: bool) -> str:
    try:
        ratings = rate(prompt, text)
    except ValueError:
        feedback, overall = _STRANGE, out_of_ten(None)
    else:
        weakest = min(ratings, key=lambda aspect: ratings[aspect] or 6)
        perfect = ratings[weakest] == 5
        feedback = "Keep it as it is." if perfect else f"Weakest in {weakest.replace('_', ' ')}."
        overall = out_of_ten(score(prompt, text))
    if structured:
        return json.dumps({"feedback": feedback, "overall_score": str(overall)})
    return f"{feedback}\n\nOverall Score: {overall}"
