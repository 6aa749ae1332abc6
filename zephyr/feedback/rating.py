"""The number that a judge wrote: one grammar for every place where a rating or a score may stand.

Never a guess: what is not plainly one number of the scale has a name instead.
"""

import math
import re
import unicodedata
from typing import Any, NamedTuple


class Unreadable(NamedTuple):
    """Why there is no rating; the causes are listed in verdict.py."""

    cause: str
    detail: str  # what stood there, at most 120 characters


Value = float | Unreadable | None  # None is N/A

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORD = "|".join(_WORDS)
NUMBER = r"[0-9]+(?:[.,][0-9]{1,2})?"  # half of the world writes 3,5 for 3.5
_NOT_APPLICABLE = r"n\s*/\s*a|n\.\s*a\b\.?|na|not\s+applicable|does\s+not\s+apply"
_OPEN, _CLOSE = r"[\[<({\"'*_`]*", r"[\]>)}\"'*_`]*"
_VALUE = re.compile(
    rf"{_OPEN}(?:(?P<none>{_NOT_APPLICABLE})|(?P<value>{NUMBER}|{WORD}))(?!\w){_CLOSE}"
    rf"(?:\s*(?:/|out\s+of\b|of\b)\s*{_OPEN}(?P<top>{NUMBER}|{WORD})(?!\w){_CLOSE})?(?:\s*(?:stars?|points?)\b)?"
    rf"{_CLOSE}\s*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_COMMENT = re.compile(r"(?:[.,;](?=\s|$)|[:(\[|!]|-+\s|$)")  # what may follow a rating: never "-5", ".5", "%", "or 5"
_MORE = re.compile(rf"\b(?:{WORD.replace('one|', '')}|half|quarter|{_NOT_APPLICABLE})\b", re.IGNORECASE)
_FOREIGN = (
    "：﹕∶︰＝／⁄∕．。٫，、､﹐；［］【】〔〕「」『』（）〈〉《》＜＞＊＃＿｜–—−‐‑‒―－“”„‟‘’«»\u00a0\u3000\u2009\u202f"  # noqa: RUF001
)
_PLAIN = str.maketrans(_FOREIGN, '::::=///...,,,,;[][][][][]()<><><>*#_|--------""""\'\'""    ')


def rating(value: Any, top: int, not_applicable: bool) -> Value:
    """The rating, 1 to `top`, that a JSON value or a text says. All of the text must say it, not a part of it.

    A comment may follow ("4 - mostly true"), unless it holds another number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return Unreadable("wrong_type", shown(value))
    if not isinstance(value, str):
        return _ranged(float(value), top, value) if abs(value) <= top else Unreadable("out_of_range", shown(value))
    found = _VALUE.fullmatch(plain(value).strip())
    if not found or not _is_comment(found["rest"]) or (found["none"] and found["top"]):
        return Unreadable("unreadable_rating", shown(value))
    if found["none"]:
        return None if not_applicable else Unreadable("not_applicable", shown(value))
    if found["top"] and number(found["top"]) != top:
        return Unreadable("other_scale", shown(value))
    return _ranged(number(found["value"]), top, value)


def is_bare(text: str) -> bool:
    """Whether a text is a number of some scale, or N/A, and nothing more but a comment in parentheses."""
    found = _VALUE.fullmatch(text.strip())
    return found is not None and found["rest"][:1] in ("", "(") and _is_comment(found["rest"])


def number(text: str) -> float:
    """Digits or a word as a number. NaN for digits beyond any scale."""
    text = text.lower()
    return float(_WORDS.index(text)) if text in _WORDS else float(text.replace(",", ".")) if len(text) < 9 else math.nan


def plain(text: str) -> str:
    """Punctuation and digits of other scripts as ASCII, character by character, so that positions stay.

    Not by Unicode's compatibility forms: they make 10 of a 1 with a superscript 0.
    """
    if text.isascii():
        return text
    text = text.translate(_PLAIN)
    return "".join(str(unicodedata.decimal(c)) if c > "\x7f" and c.isdecimal() else c for c in text)


def shown(value: Any) -> str:
    """A value for a message: one line of at most 120 characters."""
    return " ".join(str(value).split())[:120]


def _is_comment(rest: str) -> bool:
    return bool(_COMMENT.match(rest)) and not _MORE.search(rest) and not any(c.isnumeric() for c in rest)


def _ranged(value: float, top: int, stated: Any) -> Value:
    return value if 1 <= value <= top else Unreadable("out_of_range", shown(stated))
