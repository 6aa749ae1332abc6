"""What more is mended in a message without any capital: all words that the counts say have one."""

import re

from zephyr.data.truecase.casing import WORD, base
from zephyr.data.truecase.mending import Message
from zephyr.data.truecase.odds import UNSEEN
from zephyr.data.truecase.words import CLAUSE, DOUBTFUL, ENGLISH, SMALL

# In nats. What a name needs where nothing proves that all capitals are lost, and the proof; what it needs where that is
# proven, in a message whose writer ends it with a mark and in one whose writer does not, and misspells words; what a
# hyphen beside a word takes away, and that a word would be all in capitals.
_SURE, _PROOF, _LEAST, _CARELESS, _HYPHEN, _CAPITALS = 3.0, 3.5, 0.3, 3.0, 1.5, 1.5
_FORMAL = frozenset(".!?:\"”)'*")
_ABBREVIATION = re.compile(r"(?<![\w.])(?:[a-z]\.){2,}(?!\w)|(?<![\w.])[a-z]\.(?= (?:[a-z]\. )?[a-z]{3,})")
_ACRONYM = re.compile(r"\(([a-z]{2,6})s?\)")
_SMALL_DOTTED = frozenset(
    ("e.g.", "i.e.", "a.m.", "p.m.", "a.k.a.", "w.r.t.", "n.b.", "p.", "c.", "v.", "a.", "i.", "e.")
)
_LABEL = re.compile(
    r"^[ \t]*(?:[-*•][ \t]+|\d+\.[ \t]+)?([^\n:.!?,;()\[\]]{2,60}):[ ]+[\"“(]?(?=[a-z]\S* \S+ \S)", re.MULTILINE
)


class LowerMessage(Message):
    """A message that may be in lower case throughout."""

    def _whole(self, lost: int) -> None:
        self._words(lost)
        if lost:
            self._labels(lost > 2)

    def _words(self, lost: int) -> None:
        text, odds = self.text, self.odds
        matches = list(WORD.finditer(text))
        keys = [base(match.group()).lower() for match in matches]
        before, after, scores = [], [], []
        for number, (match, key) in enumerate(zip(matches, keys, strict=True)):
            near = number > 0 and text[matches[number - 1].end() : match.start()] == " "
            far = number + 1 < len(keys) and text[match.end() : matches[number + 1].start()] == " "
            before.append(keys[number - 1] if near else "")
            after.append(keys[number + 1] if far else "")
            score = odds.log_odds(key, before[-1], after[-1])
            if score > UNSEEN and "-" in text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]:
                score -= _HYPHEN
            scores.append(score)
        # capitals that single sentences have lost are no proof that all are; names in lower case are
        proven = lost > 2 or max(scores, default=0.0) > _PROOF
        # who leaves out full stops misspells words too
        formal = text.rstrip()[-1:] in _FORMAL
        least = (_LEAST if formal else _CARELESS) if proven else _SURE
        if proven and formal:
            scores = self._beside(keys, before, after, self._beside(keys, before, after, scores))
        for number, (match, key) in enumerate(zip(matches, keys, strict=True)):
            score = scores[number]
            if odds.best.get(key, "").isupper():  # where that is wrong, all its letters are
                score -= _CAPITALS if proven else _SURE
            if score <= (2.0 if key in DOUBTFUL else least) or key == "i" or (len(key) == 1 and score < 2):
                continue
            if self._in_identifier(match) or self._is_kept(match.start()):
                continue
            word = match.group()
            form = odds.best.get(key, key.capitalize())
            if len(form) == len(key):
                self._change("all_lower", match.start(), word, form + word[len(key) :])
        if proven:
            for match in _ABBREVIATION.finditer(text):
                if match.group() not in _SMALL_DOTTED:
                    for letter in WORD.finditer(match.group()):
                        self._change("all_lower", match.start() + letter.start(), letter[0], letter[0].upper())
            for match in _ACRONYM.finditer(text):
                initials = [key[0] for key in WORD.findall(text, max(0, match.start() - 80), match.start())]
                if initials[-len(match[1]) :] == list(match[1]):
                    self._change("all_lower", match.start(1), match[1], match[1].upper())

    def _beside(self, keys: list[str], before: list[str], after: list[str], alone: list[float]) -> list[float]:
        """The scores with what it says that the words beside are names."""
        scores = list(alone)
        for number, key in enumerate(keys):
            named_before = before[number] not in ("", "i") and scores[number - 1] > 0
            named_after = after[number] not in ("", "i") and alone[number + 1] > 0
            if scores[number] <= 0 and (named_before or named_after):
                scores[number] += self.odds.beside_name(key, before[number], after[number], named_before, named_after)
        return scores

    def _labels(self, sure: bool) -> None:
        """Capitals behind a line's label, and in labels of nouns alone, as assistants write them."""
        text = self.text
        for match in _LABEL.finditer(text):
            words = match[1].split()
            plain = not any(word in ENGLISH for word in words)
            if len(words) > 8 or self._is_kept(match.start()):
                continue
            if sure or (CLAUSE.isdisjoint(words) and text[match.end() + 1] not in " '’"):
                self._start(match.end())
                if sure and plain and 2 <= len(words) <= 3 and SMALL.isdisjoint(words):
                    self._title(match.start(1), match.end(1))

    def _title(self, start: int, end: int) -> None:
        for match in WORD.finditer(self.text, start, end):
            word = match.group()
            if word not in SMALL and not self._in_identifier(match):
                self._change("all_lower", match.start(), word, self._capitalised(word))
