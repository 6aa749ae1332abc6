"""What of a message is mended by rule and by sure names: starts of sentences, the pronoun, names."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from zephyr.data.truecase.casing import WORD, base
from zephyr.data.truecase.odds import Odds
from zephyr.data.truecase.prose import is_code, kept_spans, may_hold_code
from zephyr.data.truecase.words import (
    AMBIGUOUS,
    BEFORE_NUMERAL,
    BEHIND_TITLE,
    COMMANDS,
    CONTINUES,
    ENGLISH,
    EXCLAIMED,
    FOREIGN,
    I_VERBS,
    NEVER_LAST,
    STARTERS,
    SURE_STARTERS,
)

KINDS = ("sentence_start", "pronoun_i", "name", "all_lower")

_WORD_BEFORE = re.compile(r"(?<![\w@#/.'’-])([a-z]+) \Z")
_WORD_BEHIND = re.compile(r" ([a-z]+)(?![\w@/-])")
_LETTER = "a-zà-öø-ÿāăąćčďđēėęěğīįķłńňőōřśšťūůűźżž"
_OPENING = r"[\"“‘'(\[*_¿¡]*"
BOUNDARY = re.compile(rf"([.!?…])([\"”’')\]*_]*)\s+({_OPENING})(?=[{_LETTER}])")
LINE = re.compile(
    r"^[ \t]*(?:>[ \t]*)*"
    rf"(?P<mark>[-*+•–—◦▪][ \t]+|\(?(?:\d+|[A-Za-z]|[ivxIVX]+)[.)][ \t]+|\#+[ \t]+)?{_OPENING}(?=[{_LETTER}])",
    re.MULTILINE,
)
CAPITAL = re.compile(r"[A-Z]")
_LONE_I = re.compile(
    r"(?<![^\s(\"'“‘\[*_,;:!?—–…/.])(?<!\w[.'/_*])i"
    r"(?=['’](?:m|ve|d|ll|s)\b|(?![\w@/\\^+*=<>&$%~’'-]|[.)]\w|\.[A-Za-z]))"
)
_MATHEMATICAL = re.compile(r"[Ff]or i in\b|\bi\s*(?:=|\+\+|\+=|<|>)|\[i\]|_i\b|\^i\b|\d\s*i\b|\bi\^|-th\b|\bi\*")
CONTRACTIONS = frozenset(f"i{mark}{end}" for mark in "'’" for end in ("m", "ve", "d", "ll")) | {"i"}
_NUMERAL = re.compile(r"[ivxl]{1,5}[.)](?!\w)")
_LABEL_NUMBER = re.compile(r"\d+[:.] |/[A-Z]")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_PREVIOUS = re.compile(r"([\w.'’&-]+)[\"”’')\]*_]*\Z")


class Change(NamedTuple):
    """One word's mending: its kind (of KINDS), where it starts, in characters, and the word before and after."""

    kind: str
    start: int
    before: str
    after: str


def applied(text: str, changes: list[Change]) -> str:
    """The text with these changes, which are in order of their position."""
    parts: list[str] = []
    end = 0
    for change in changes:
        parts += (text[end : change.start], change.after)
        end = change.start + len(change.before)
    return "".join(parts) + text[end:]


class Message:
    """One message: its words, the stretches that are kept, and the changes found."""

    def __init__(self, odds: Odds, text: str, tokens: frozenset[str]) -> None:
        self.odds = odds
        self.text = text
        self.tokens = tokens
        self.foreign = not FOREIGN.isdisjoint(tokens)
        self.all_lower = not CAPITAL.search(text)
        self.found: dict[int, Change] = {}

    # a message may turn out to have no fault before anything asks for these two, which cost half of its time

    @cached_property
    def kept(self) -> list[tuple[int, int]]:
        """The stretches that are no prose."""
        return kept_spans(self.text)

    @cached_property
    def code(self) -> dict[int, bool] | None:
        """Whether the line that starts there is code, as far as it was asked; None where no line can be."""
        return {} if may_hold_code(self.text) else None

    def changes(self) -> list[Change]:
        """All changes, by position."""
        if not self._english(0, len(self.text), 60):
            return []
        for start in self._starts():
            self._start(start)
        lost = len(self.found)
        if not CONTRACTIONS.isdisjoint(self.tokens):
            self._pronouns()
        self._names()
        if self.all_lower:
            self._whole(lost)
        return self._in_order()

    def _in_order(self) -> list[Change]:
        return [self.found[start] for start in sorted(self.found)]

    def _whole(self, lost: int) -> None:
        """What else a message without any capital needs, `lost` sentences of which began in lower case."""

    def _change(self, kind: str, start: int, before: str, after: str) -> None:
        if before != after and start not in self.found and len(before) == len(after):
            self.found[start] = Change(kind, start, before, after)

    def _in_kept(self, position: int) -> bool:
        return any(start <= position < end for start, end in self.kept)

    def _is_kept(self, position: int) -> bool:
        if self._in_kept(position):
            return True
        if self.code is None:
            return False
        line_start = self.text.rfind("\n", 0, position) + 1
        if line_start not in self.code:
            line_end = self.text.find("\n", position)
            self.code[line_start] = is_code(self.text[line_start : line_end if line_end >= 0 else len(self.text)])
        return self.code[line_start]

    def _english(self, start: int, end: int, most: int = 12) -> bool:
        """Whether a stretch's first words are not of another language."""
        if start and not self.foreign and self.text.isascii():
            return True
        words = [word.lower() for word in WORD.findall(self.text, start, min(end, start + 12 * most))][:most]
        english = sum(word in ENGLISH for word in words)
        foreign = sum(word in FOREIGN or word[0] > "\u024f" for word in words)
        if foreign > english:
            return False
        if english > 2 * foreign:
            return True
        known = sum(self.odds.knows(word) for word in words)
        return 2 * known >= len(words)

    # sentence starts

    def _starts(self) -> Iterator[int]:
        text = self.text
        for match in LINE.finditer(text):
            if self._line_starts(match):
                yield match.end()
        for match in BOUNDARY.finditer(text):
            if self._ends(match) and not self._in_kept(match.start()):
                yield match.end()

    def _line_starts(self, match: re.Match[str]) -> bool:
        """Whether prose begins at a line's first letter that is not behind the end of a sentence."""
        text = self.text
        if match.start() == 0:
            return not match["mark"]
        if match["mark"] or not self.all_lower:
            return False
        if text[: match.start()].rstrip(" \t\r")[-2:] != "\n\n" or text[: match.start()].rstrip()[-1:] in ",;:":
            return False
        end = text.find("\n", match.end())
        line = text[match.end() : end if end >= 0 else len(text)].rstrip()
        return line.endswith((".", "!", "?", ":")) and line.count(" ") >= 3

    def _ends(self, match: re.Match[str]) -> bool:
        """Whether a mark and what follows it end a sentence."""
        text = self.text
        mark, closing, _ = match.groups()
        following = WORD.match(text, match.end())
        next_word = following.group().lower() if following else ""
        before = _PREVIOUS.search(text, max(0, match.start() - 40), match.start())
        token = before.group(1) if before else ""
        if text[match.start() - 1 : match.start()].isspace():
            return False
        if mark == "…" or text[match.start() - 1 : match.start()] in (".", "…"):
            return False
        if mark == ".":
            low = token.lower().lstrip("'’-")
            if low in NEVER_LAST:
                return False
            if len(low) == 1 and not low.isdigit():  # an initial, a list's mark, a unit
                return text[: match.start() - 1].rstrip()[-1:] in "0123456789°"
            if low in AMBIGUOUS or _DOTTED.fullmatch(low):
                return self.all_lower and next_word in SURE_STARTERS and text[match.start() : match.start() + 2] == ". "
            if low.isdigit() and len(low) <= 2:
                number = int(low)  # of a list in one line, if the one before or behind is there too
                if f"{number - 1}. " in text[: match.start()] or f" {number + 1}. " in text[match.end() :]:
                    return False
                outside = text[: before.start(1)].rstrip(" \t(")[-1:] if before else ""
                return outside not in ("", "\n", ":", ".", ";", ",", "!", "?", ")")
            return True
        if any(sign in closing for sign in "\"”’')]*_"):
            return next_word in STARTERS and next_word not in CONTINUES
        if mark == "!" and token.lower() in ("lo", "oh", "ah", "alas", "o"):
            return False
        # a name with a mark of its own, in the middle of a sentence: Yahoo! is
        named = token.lower() in EXCLAIMED or (
            token[:1].isupper() and before is not None and text[: before.start(1)].rstrip(" ")[-1:].isalpha()
        )
        return not (named and next_word in BEHIND_TITLE)

    def _start(self, start: int) -> None:
        text = self.text
        match = WORD.match(text, start)
        if not match or self._is_kept(start):
            return
        word = match.group()
        after = text[match.end() : match.end() + 1]
        if len(word) == 1 and _LABEL_NUMBER.match(text, match.end()):
            after = ""
        if (
            (after and (after.isdigit() or after in "_=\\@"))
            or word in COMMANDS
            or (len(word) == 1 and after in ".)]:")
        ):
            return
        if word in COMMANDS or _NUMERAL.match(text, start) or text.startswith("e-", start):
            return
        if start and text[start - 1] in "([":  # a fragment
            return
        if start and text[start - 1] in '"“' and after and after in '"”':  # a word that is spoken of
            return
        if after == ":" and start and text[start - 1] == "\n" and not self.all_lower:  # a key, or a program's output
            return
        if not self._english(start, len(text)):
            return
        self._change("sentence_start", start, word, self._capitalised(word))

    def _capitalised(self, word: str) -> str:
        """How a word is written at the start of a sentence."""
        odds = self.odds
        if word != word.lower():  # nASA, iPhone
            lost = word[0].upper() + word[1:]
            return lost if word not in odds.forms and (lost in odds.forms or len(word) == 1) else word
        key = base(word)
        form = odds.proper(key)
        if form and not form.istitle():
            return form + word[len(key) :]
        return word[0].upper() + word[1:]

    # the pronoun

    def _pronouns(self) -> None:
        doubtful = []
        for match in _LONE_I.finditer(self.text):
            if self._is_kept(match.start()):
                continue
            if self.text[match.end() : match.end() + 1] in ("'", "’") or self._word_behind(match) in I_VERBS:
                self._change("pronoun_i", match.start(), "i", "I")
            else:
                doubtful.append(match)
        # what is mended by now is no sign of mathematics: "0 i'm" is, to who looks at it before
        if doubtful and not _MATHEMATICAL.search(applied(self.text, self._in_order())):
            for match in doubtful:
                self._doubtful_pronoun(match)

    def _word_behind(self, match: re.Match[str]) -> str:
        following = WORD.match(self.text, match.end() + 1) if self.text[match.end() : match.end() + 1] == " " else None
        return following.group().lower().replace("’", "'") if following else ""

    def _doubtful_pronoun(self, match: re.Match[str]) -> None:
        text, start, behind = self.text, match.start(), self.text[match.end() : match.end() + 1]
        before, opening = text[start - 1 : start], text[:start].rstrip(" \t(")[-1:]
        previous = WORD.findall(text, max(0, start - 30), start)
        quoted = before in "([\"'“‘" and behind in ")]\"'”’.,"
        numeral = previous and previous[-1].lower() in BEFORE_NUMERAL
        of_a_list = behind in (".", ")") and opening in ("", "\n", ":")
        if not (quoted or numeral or of_a_list) and self._english(max(0, start - 60), start + 60):
            self._change("pronoun_i", start, "i", "I")

    # names

    def _names(self) -> None:
        odds, text = self.odds, self.text
        for word in sorted(self.tokens & odds.names.keys()):
            for match in re.finditer(rf"(?<![\w@#/.\\'’-]){word}(?![\w@/\\-]|\.\w|['’](?!s\b))", text):
                quoted = text[match.start() - 1 : match.start()] in tuple('"“') and text[
                    match.end() : match.end() + 1
                ] in tuple(',."”')
                if (
                    quoted
                    or self._is_kept(match.start())
                    or not self._english(max(0, match.start() - 60), match.end() + 60, 20)
                ):
                    continue
                self._change("name", match.start(), word, odds.names[word])
                before = _WORD_BEFORE.search(text, max(0, match.start() - 20), match.start())
                if before and (form := odds.joined(before.group(1), word, True)):
                    self._change("name", before.start(1), before.group(1), form)
                after = _WORD_BEHIND.match(text, match.end())
                if after and (form := odds.joined(word, after.group(1), False)):
                    self._change("name", after.start(1), after.group(1), form)

    def _in_identifier(self, match: re.Match[str]) -> bool:
        around = self.text[match.start() - 1 : match.start()] + self.text[match.end() : match.end() + 1]
        return any(sign.isdigit() or sign in "_@#/\\=" for sign in around)
