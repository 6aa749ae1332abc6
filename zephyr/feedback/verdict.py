"""What a judge's reply says: ratings of 1 to 5 for each text, or a critique with one score of 1 to 10.

A reply is JSON or text. What cannot be read is missing and has a cause; it is never a number:

unfinished           the reply ends inside the judge's reasoning
cut_off              the server stopped the judge at its token limit before a rating was surely complete: a 1 at the
                     very end may be the beginning of a 10
invalid_json         begins like JSON and is none, or holds a key twice
wrong_type           JSON of another shape than asked for: a list, true, null
too_many_texts       a text is labelled that was not shown, so no label can be trusted
missing_text         no part of the reply is about this text
missing_rating       a part about it, without a rating
unreadable_rating    not a number, or more than one ("4 or 5", "4-5", "four and a half", "80%")
other_scale          out of another number than the scale's top ("8/10" of 1 to 5)
out_of_range         below 1 or above the top
not_applicable       N/A where the rubric has none
conflicting_ratings  stated more than once, and not alike
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from zephyr.feedback.rating import NUMBER, WORD, Unreadable, Value, is_bare, number, plain, rating, shown
from zephyr.feedback.request import whole

_T = TypeVar("_T")


class Rated(NamedTuple):
    """A text's rating, None for N/A, and the judge's reason (empty where it gave none)."""

    rating: float | None
    rationale: str


class Critique(NamedTuple):
    """Written feedback, without the line of the score, and the score."""

    feedback: str
    score: float


class Disagreement(NamedTuple):
    """Of two judgements of the same texts in different orders. Shares are 0 to 1; None where nothing can be said."""

    ratings: int  # texts that have a number in both
    mean_absolute: float | None  # distance, in points
    equal: float | None  # share
    kappa: float | None  # Cohen's with quadratic weights: 1 alike, 0 as by chance
    reversed: float | None  # share, of the pairs of texts that both tell apart, ranked the other way round


_DECORATION = r"\s*(?:[0-9]+[.)]\s+)?[\s#*_`•·|+\-]*"
_MARKER = re.compile(
    rf"{_DECORATION}(?:(?:the|my|final|overall|revised|total)\s+)*(?:rating|score|grade)\b[*_`\"']*"
    r"(?P<sign>\s*[:=]|\s+is\b|(?=\s+[\[(*]*[0-9])|$)[*_`\s]*(?P<value>.*)",
    re.IGNORECASE,
)
_RESULT = re.compile(r".*\[RESULT\][\s:]*(?P<value>.*)", re.IGNORECASE)  # Prometheus
_BRACKETS = re.compile(rf"\[\[\s*({NUMBER}|{WORD})\s*\]\]", re.IGNORECASE)  # MT-Bench
_REASON = r"(?:rationale|reason(?:ing)?|explanation|justification|comments?)(?: for (?:the )?rating)?[*_`\"']*\s*:"
_RATIONALE = re.compile(rf"{_DECORATION}{_REASON}[*_`\s]*", re.IGNORECASE)
_RATIONALE_BEHIND = re.compile(rf"\b{_REASON}[*_`\s]*", re.IGNORECASE)
_FEEDBACK = re.compile(r"[\s#*_]*feedback[*_]*\s*(?::|(?=\n))[*_\s]*", re.IGNORECASE)
_PAIR = re.compile(rf"\s*\(?({NUMBER})[ ,]+({NUMBER})\)?[ \t]*(?:\n|$)")
_STATED_PAIR = re.compile(rf"(?:scores are|^output:) \(({NUMBER}), ({NUMBER})\)", re.MULTILINE | re.IGNORECASE)


def read_ratings(
    reply: str, count: int, top: int, not_applicable: bool, *, mark: str = "", finished: bool = True
) -> list[Rated | Unreadable]:
    """What a reply says of texts 1 to `count`, in that order, as JSON (`text_1`...) or as blocks headed `Text 1`.

    `mark` is the code of the request: where a block's heading carries it, headings without it are quotations.
    `finished` is False where the server stopped the judge at its token limit.
    """
    found = _parsed(reply)
    if isinstance(found, Unreadable):
        return [_cut(found, finished)] * count
    if isinstance(found, str):
        blocks = _blocks(found, "text", count, top, not_applicable, mark, finished)
        return [_cut(verdict, finished) for verdict in blocks]
    labels = {match[1]: item for key, item in found.items() if (match := re.fullmatch(r"text[_ ]?(\d+)", key.lower()))}
    return _labelled(labels, count, top, not_applicable)


def read_pair(review: str, top: int) -> list[Rated | Unreadable]:
    """The two scores of a pairwise review: in its first line, or behind "Assistant 1:" and "Assistant 2:"."""
    if found := _PAIR.match(review) or _STATED_PAIR.search(review):
        ratings = [rating(value, top, False) for value in found.groups()]
        return [value if isinstance(value, Unreadable) else Rated(value, review) for value in ratings]
    return _blocks(review, "assistant", 2, top, False, "", True)


def read_critique(reply: str, top: int, *, finished: bool = True) -> Critique | Unreadable:
    """Feedback and overall score, 1 to `top`, of a reply as JSON, or as text that states the score.

    The score may stand behind "Overall Score:", "Rating:" or "[RESULT]" at the beginning of a line, or in double
    brackets anywhere (`[[8]]`, as MT-Bench's judges are asked to write it); quotations and code do not count.
    """
    found = _parsed(reply)
    if isinstance(found, Unreadable):
        return _cut(found, finished)
    if isinstance(found, str):
        return _cut(_critique(found, top, finished), finished)
    if "overall_score" not in found:
        return Unreadable("missing_rating", shown(found))
    if not isinstance(feedback := found.get("feedback", ""), str):
        return Unreadable("wrong_type", f"feedback: {shown(feedback)}")
    score = rating(found["overall_score"], top, False)
    return Critique(feedback.strip(), score) if isinstance(score, float) else _unreadable(score)


class Judgements:
    """Two judgements of the same texts, prompt after prompt. What is kept does not grow with the prompts."""

    def __init__(self) -> None:
        self._pairs: Counter[tuple[float, float]] = Counter()
        self._ranked = self._flipped = 0

    def add(self, first: Sequence[float | None], second: Sequence[float | None]) -> None:
        """A prompt's ratings, in the order of the completions; a text counts where both have a number."""
        both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        self._pairs.update(both)
        for i, one in enumerate(both):
            products = [(one[0] - other[0]) * (one[1] - other[1]) for other in both[i + 1 :]]
            self._ranked += sum(product != 0 for product in products)
            self._flipped += sum(product < 0 for product in products)

    def disagreement(self) -> Disagreement:
        """How far they differ."""
        n = self._pairs.total()
        if not n:
            return Disagreement(0, None, None, None, None)

        def mean(of: Callable[[float, float], float]) -> float:
            return math.fsum(number * of(*pair) for pair, number in self._pairs.items()) / n

        first, second = mean(lambda a, b: a), mean(lambda a, b: b)
        # mean squared distance of ratings that are paired at random
        by_chance = mean(lambda a, b: (a - first) ** 2 + (b - second) ** 2) + (first - second) ** 2
        return Disagreement(
            n,
            mean(lambda a, b: abs(a - b)),
            mean(lambda a, b: a == b),
            1 - mean(lambda a, b: (a - b) ** 2) / by_chance if by_chance else None,
            self._flipped / self._ranked if self._ranked else None,
        )


def _blocks(
    body: str, noun: str, count: int, top: int, not_applicable: bool, mark: str, finished: bool
) -> list[Rated | Unreadable]:
    """A text reply: lines that state a rating and lines that give the reason, under labels."""
    heading = _heading(noun)
    stated = _lines(body, finished)
    lines = [line.replace(f"[{mark}]", "").replace(mark, "") for line in stated] if mark else stated
    found = [heading.match(plain(line)) for line in lines]
    if mark and any(match and mark in line for line, match in zip(stated, found, strict=True)):
        found = [match if mark in line else None for line, match in zip(stated, found, strict=True)]
    blocks: dict[int, list[str]] = {} if any(found) or count > 1 else {1: []}
    label = 1 if blocks else None  # a single text needs none
    for line, match in zip(lines, found, strict=True):
        if match:
            label = int(number(match["label"][:8]))
            line, rest = line[match.end() :], plain(line)[match.end() :]
            if match["kind"] or (match["sign"] in (":", "=") and is_bare(rest)):
                line = f"Rating: {rest}"
        if label is not None:
            blocks.setdefault(label, []).append(line)
    if wrong := [known for known in blocks if not 1 <= known <= count]:
        return [Unreadable("too_many_texts", f"Text {wrong[0]} of {count}")] * count
    return [
        _block(blocks[known], top, not_applicable) if known in blocks else Unreadable("missing_text", f"Text {known}")
        for known in range(1, count + 1)
    ]


def _heading(noun: str) -> re.Pattern[str]:
    """A block's first line: `Text 1`, `## Text 1:`, `**Text 1** - ...`, `Output for Text 1`, `Rating for Text 1: 4`."""
    return re.compile(
        rf"{_DECORATION}(?:(?:output|evaluation|annotation|assessment|verdict|(?P<kind>rating|score))\s+(?:for|of)\s+)?"
        rf"[<\[(]?{noun}\s*[#_]?\s*(?P<label>[0-9]+|{WORD})(?!\w)[>\])]?[*_`\"'\s]*"
        rf"(?:(?P<sign>[:=]|[.)](?=\s|$)|-+(?=\s|$)|\|)[*_`]*\s*|$|(?=(?:rating|score)\b))",
        re.IGNORECASE,
    )


def _block(lines: list[str], top: int, not_applicable: bool) -> Rated | Unreadable:
    values: list[Value] = []
    reasons = []
    for raw in lines:
        line = plain(raw)
        statement = _MARKER.match(line)
        stated = statement["value"] if statement else ""
        if statement and (behind := _RATIONALE_BEHIND.search(stated)):
            reasons.append(raw[statement.start("value") + behind.end() :])
            stated = stated[: behind.start()].rstrip(" |,;.*_`-")
        if statement and stated and _is_statement(statement, stated, top, not_applicable):
            values.append(rating(stated, top, not_applicable))
        elif not statement or stated:
            start = _RATIONALE.match(line)
            reasons.append(raw[start.end() :] if start else raw)
    if not values:
        return Unreadable("missing_rating", shown(" ".join(lines)))
    value = _one(values)
    return value if isinstance(value, Unreadable) else Rated(value, "\n".join(reasons).strip())


def _critique(body: str, top: int, finished: bool) -> Critique | Unreadable:
    lines = _lines(body, finished)
    values: list[Value] = []
    for raw in lines:
        line = plain(raw)
        if brackets := _BRACKETS.findall(line):
            values += [rating(value, top, False) for value in brackets]
        elif result := _RESULT.match(line):
            values.append(rating(result["value"], top, False))
        elif (found := _MARKER.match(line)) and found["value"] and _is_statement(found, found["value"], top, False):
            values.append(rating(found["value"], top, False))
    if not values:
        return Unreadable("missing_rating", shown(" ".join(lines)[-120:]))
    score = _one(values)
    if not isinstance(score, float):
        return _unreadable(score)
    last = body.splitlines()[-1]
    if _MARKER.match(plain(last)) or re.fullmatch(r"\s*\[(RESULT\]|\[).*", last):
        body = body[: -len(last)]
    return Critique(_FEEDBACK.sub("", body, count=1).strip() if _FEEDBACK.match(body) else body.strip(), score)


def _is_statement(found: re.Match[str], stated: str, top: int, not_applicable: bool) -> bool:
    """Whether a line that begins like a rating is one: without a colon it may be prose ("Rating texts is hard")."""
    return found["sign"].strip() in (":", "=") or not isinstance(rating(stated, top, not_applicable), Unreadable)


def _one(values: Sequence[Value]) -> Value:
    """The one thing that all statements say."""
    if broken := [value for value in values if isinstance(value, Unreadable)]:
        return broken[0]
    return values[0] if len(set(values)) == 1 else Unreadable("conflicting_ratings", ", ".join(map(str, values)))


def _unreadable(value: Value) -> Unreadable:
    return value if isinstance(value, Unreadable) else Unreadable("not_applicable", "")


def _cut(verdict: _T | Unreadable, finished: bool) -> _T | Unreadable:
    """In a reply that the server cut, a missing part is missing for that reason."""
    if finished or not isinstance(verdict, Unreadable) or not verdict.cause.startswith(("missing", "invalid_json")):
        return verdict
    return Unreadable("cut_off", verdict.detail)


def _parsed(reply: str) -> dict[str, Any] | str | Unreadable:
    """The JSON object that a reply is, or its text: without reasoning, out of the code fence that holds all of it."""
    body = reply.strip("\ufeff \t\r\n")
    if body.startswith("<think>"):
        _, end, body = body.rpartition("</think>")
        if not end:
            return Unreadable("unfinished", shown(reply[-120:]))
    body = body.strip()
    outside, inside = _fences(body)
    if len(inside) == 1 and not any(_states(plain(line)) for line in outside):
        body = inside[0].strip()
    if not body.startswith(("{", '["', "[{")):  # a text may well begin with another bracket
        return body
    try:
        found = json.loads(body, object_pairs_hook=_object, parse_constant=_refuse)
        if "\\u" in body:  # JSON can name half a character
            found = json.loads(whole(json.dumps(found, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        return Unreadable("invalid_json", shown(error))
    return found if isinstance(found, dict) else Unreadable("wrong_type", shown(found))


def _states(line: str) -> bool:
    """Whether a line belongs to a verdict in text."""
    return bool(_MARKER.match(line) or _heading("text").match(line) or _RESULT.match(line) or _BRACKETS.search(line))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in pairs:
        if key in known and known[key] != value:
            raise ValueError(f"the key {key!r} stands there twice")
        known[key] = value
    return known


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _labelled(labels: dict[str, Any], count: int, top: int, not_applicable: bool) -> list[Rated | Unreadable]:
    if wrong := [label for label in labels if not 1 <= number(label) <= count]:
        return [Unreadable("too_many_texts", f"text_{wrong[0][:20]} of {count}")] * count
    verdicts: list[Rated | Unreadable] = []
    for label in map(str, range(1, count + 1)):
        item = labels.get(label)
        rationale = item.get("rationale", "") if isinstance(item, dict) else ""
        if label not in labels:
            verdicts.append(Unreadable("missing_text", f"text_{label}"))
        elif not isinstance(item, dict) or not isinstance(rationale, str):
            verdicts.append(Unreadable("wrong_type", shown(item)))
        elif "rating" not in item:
            verdicts.append(Unreadable("missing_rating", shown(item)))
        else:
            value = rating(item["rating"], top, not_applicable)
            verdicts.append(value if isinstance(value, Unreadable) else Rated(value, rationale.strip()))
    return verdicts


def _lines(body: str, finished: bool) -> list[str]:
    """The lines that may state something: none in code fences, no quotations, and in a reply that was cut not the
    last one. A number alone is joined to the line "Rating:" before it."""
    lines: list[str] = []
    for line in _fences(body)[0][: None if finished else -1]:
        if line and not line.startswith(">"):
            before = _MARKER.match(plain(lines[-1])) if lines else None
            if before and not before["value"].strip() and is_bare(plain(line)):
                lines[-1] += f" {line}"
            else:
                lines.append(line)
    return lines


def _fences(body: str) -> tuple[list[str], list[str]]:
    """The lines outside of code fences, and what stands in each of them. One that is never closed is none."""
    outside: list[str] = []
    inside: list[str] = []
    block: list[str] = []  # of an open fence
    for line in map(str.strip, body.splitlines()):
        if block and line == "```":
            inside.append("\n".join(block[1:]))
            block = []
        elif block or (line.startswith("```") and "`" not in line[3:]):
            block.append(line)
        else:
            outside.append(line)
    return outside + block, inside
