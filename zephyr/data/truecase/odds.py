"""How surely a word has capitals of its own, by a table of counts and the words beside it."""

from zephyr.data.truecase.casing import CASED, Table, logit, smoothed
from zephyr.data.truecase.words import BEGINNINGS, ENDINGS, NOT_NAMES

UNSEEN = -9.0  # log-odds, in nats, of a word that is never seen with capitals
_UNKNOWN, _BEHIND_NAME = -1.5, 3.0  # of one that is not seen at all, and what a name before it adds
_STRENGTH = 2.0  # observations that the word alone is worth beside those of a pair
_SURE_NAME = 30, 100, 200  # times seen with a capital, all in capitals, for each time in lower case


class Odds:
    """A table's counts as decisions. `names` maps a word in lower case to a form that needs no context."""

    def __init__(self, table: Table) -> None:
        lower: dict[str, int] = {}
        best: dict[str, tuple[int, str]] = {}
        cased: dict[str, int] = {}
        for form, count in table.forms.items():
            key = form.lower()
            if form == key:
                lower[key] = count
            else:
                cased[key] = cased.get(key, 0) + count
                best[key] = max(best.get(key, (0, "")), (count, form))
        self.forms = table.forms
        self.lower = lower
        self.best = {
            key: form
            for key, (count, form) in best.items()
            # long words all in capitals are shouted, or constants of programs, unless they are frequent
            if len(form) == len(key) and (count >= 30 or len(form) < 6 or not form.isupper())
        }
        self._alone = {key: logit(lower.get(key, 0), cased[key], 0.05) for key in self.best}
        self.names = {
            key: form
            for key, form in self.best.items()
            if cased[key] >= _SURE_NAME[0 if best[key][1].istitle() else 1]
            and cased[key] >= _SURE_NAME[2] * lower.get(key, 0)
            and len(key) > 2
            and best[key][0] > 0.9 * cased[key]
            and key not in NOT_NAMES
        }
        self._left, self._right = table.left, table.right

    def proper(self, word: str) -> str | None:
        """The form of a word (in lower case) that is not lower case, where it is seen so far more often than not."""
        return self.best[word] if self._alone.get(word, UNSEEN) > 2.0 else None

    def log_odds(self, word: str, previous: str, following: str) -> float:
        """How sure it is, in nats, that a word between these two (in lower case, "" for none) is no lower-case word."""
        alone = self._alone.get(word)
        if alone is None:
            return UNSEEN if self._derived(word) else _UNKNOWN
        score = alone
        found = self._left.get(f"{previous} {word}")
        if found:
            score += logit(*found, smoothed(alone), _STRENGTH) - alone
        found = self._right.get(f"{word} {following}")
        if found:
            score += logit(*found, smoothed(alone), _STRENGTH) - alone
        return score

    def _derived(self, word: str) -> bool:
        """Whether a word without a cased form is known, or made from one that is."""
        lower = self.lower
        if word in lower or len(word) < 3:
            return True
        for ending in ENDINGS:
            if word.endswith(ending):
                stem = word[: -len(ending)]
                if len(stem) > 2 and (stem in lower or stem + "e" in lower or stem[:-1] in lower):
                    return True
        return any(word.startswith(start) and word[len(start) :] in lower for start in BEGINNINGS)

    def beside_name(self, word: str, previous: str, following: str, before: bool, after: bool) -> float:
        """What it adds to `log_odds` that the word before, the one after, or both are names; 0 where a pair spoke."""
        alone = self._alone.get(word)
        if alone is None:
            return 0.0 if self._derived(word) else _BEHIND_NAME * before
        score = 0.0
        if before and f"{previous} {word}" not in self._left and (found := self._left.get(f"{CASED} {word}")):
            score += logit(*found, smoothed(alone), _STRENGTH) - alone
        if after and f"{word} {following}" not in self._right and (found := self._right.get(f"{word} {CASED}")):
            score += logit(*found, smoothed(alone), _STRENGTH) - alone
        return score

    def knows(self, word: str) -> bool:
        """Whether the table has the word (in lower case) in any form."""
        return word in self.lower or word in self._alone

    def joined(self, first: str, second: str, names_second: bool) -> str | None:
        """How the other word of a pair is written beside a name, where that is certain: the "new" of "new york"."""
        found, word = (
            (self._right.get(f"{first} {second}"), first)
            if names_second
            else (self._left.get(f"{first} {second}"), second)
        )
        return self.best.get(word) if found and found[1] >= 5 and found[1] >= 30 * found[0] else None
