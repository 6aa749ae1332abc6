"""Statistics of how words are cased, counted in well-cased text: learned, merged, pruned, saved, loaded.

Counted are words in the middle of a sentence, where the case is the word's own, and pairs of neighbouring words. The
table holds words, pairs of words and numbers: no text can be read out of it.
"""

import gzip
import io
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from zephyr.data.truecase.prose import is_code, kept_spans
from zephyr.data.truecase.words import NEVER_LAST
from zephyr.errors import UserError

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_POSSESSIVE = re.compile(r"['’](?:s|S)\Z")
CASED = "^"  # stands in a pair for any word that is not in lower case
_MAGIC = "zephyr casing 1"
_LIMIT = 3_000_000  # entries of a kind held while counting: about a gigabyte
_GAP_ENDS = re.compile(r"[.!?:;…\n\"“”(\[*|•–—]")
_TITLE_SHARE = 0.5
_TITLE_WORDS = 4


def base(word: str) -> str:
    """The word without the possessive ending, with plain apostrophes."""
    return _POSSESSIVE.sub("", word).replace("’", "'")


def _shape(word: str) -> int:
    """0 lower case, 1 anything else."""
    return int(word != word.lower())


@dataclass
class Table:
    """Counts: of each form of a word, and of a word being lower case or not behind and before another word.

    `forms` maps a word as it is written to its count; `left` and `right` map "previous word" and "word next" (both in
    lower case) to (times the word was in lower case, times it was not); `words` is how many words were read.
    """

    forms: Counter[str] = field(default_factory=Counter)
    left: dict[str, tuple[int, int]] = field(default_factory=dict)
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    words: int = 0

    def __add__(self, other: "Table") -> "Table":
        """The table of both texts together."""
        return merge([self, other])

    def pruned(self, lower: int = 4, cased: int = 2, pairs: int = 3, surprise: float = 1.0) -> "Table":
        """What decides something: no rare words, and only pairs that say another thing than their word alone.

        `lower` and `cased` are the least counts of a word with and without forms that are not lower case, `pairs` that
        of a pair; `surprise` is how far, in nats of log-odds, a pair must move its word.
        """
        totals: Counter[str] = Counter()
        cased_totals: Counter[str] = Counter()
        for form, count in self.forms.items():
            key = form.lower()
            totals[key] += count
            cased_totals[key] += count * _shape(form)
        forms = Counter(
            {
                form: count
                for form, count in self.forms.items()
                if totals[form.lower()] >= (cased if 2 * cased_totals[form.lower()] > totals[form.lower()] else lower)
                and 100 * count >= totals[form.lower()]
            }
        )

        def telling(found: dict[str, tuple[int, int]], position: int) -> dict[str, tuple[int, int]]:
            kept = {}
            for pair, (low, high) in found.items():
                word = pair.split(" ")[position]
                total = totals[word]
                if low + high < pairs or word not in totals or not cased_totals[word] > 0:
                    continue
                alone = logit(total - cased_totals[word], cased_totals[word], 0.5)
                here = logit(low, high, smoothed(alone), 2.0)
                # a pair that only makes surer what is sure decides nothing
                if (abs(here - alone) >= surprise and (here > 0) != (alone > 0)) or abs(alone) < 2 * surprise:
                    kept[pair] = (low, high)
            return kept

        return Table(forms, telling(self.left, 1), telling(self.right, 0), self.words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, compressed; equal tables give equal bytes."""
        lines = [f"{_MAGIC}\t{self.words}"]
        lines += [f"{form}\t{count}" for form, count in sorted(self.forms.items())]
        for title, pairs in (("left", self.left), ("right", self.right)):
            lines.append(f"={title}")
            lines += [f"{pair}\t{low}\t{high}" for pair, (low, high) in sorted(pairs.items())]
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as packed:
            packed.write("\n".join(lines).encode())
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Table":
        """Read a table that `save` wrote; raises UserError where it is none."""
        try:
            head, *lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
            magic, words = head.split("\t")
            if magic != _MAGIC:
                raise ValueError(magic)
            left_at, right_at = lines.index("=left"), lines.index("=right")
            table = cls(words=int(words))
            for line in lines[:left_at]:
                form, count = line.split("\t")
                table.forms[form] = int(count)
            for pairs, some in ((table.left, lines[left_at + 1 : right_at]), (table.right, lines[right_at + 1 :])):
                for line in some:
                    pair, low, high = line.split("\t")
                    pairs[pair] = (int(low), int(high))
        except (gzip.BadGzipFile, ValueError, EOFError, zlib.error):
            raise UserError(
                f"{path} is no casing table. Make one with `python -m zephyr.prepare truecaser`, or leave the key out "
                "for the one that comes with Zephyr."
            ) from None
        except OSError as error:
            raise UserError(f"{path}: the casing table cannot be read: {error.strerror or error}.") from None
        return table


def logit(low: float, high: float, prior: float, strength: float = 1.0) -> float:
    """Log-odds of not being lower case, with `strength` observations added of which the share `prior` is not."""
    return math.log((high + strength * prior) / (low + strength * (1 - prior)))


def smoothed(log_odds: float) -> float:
    """The probability with these log-odds, kept away from 0 and 1."""
    return min(max(1 / (1 + math.exp(-log_odds)), 1e-4), 1 - 1e-4)


class _Counts:
    """Counters of one pass, thinned where they grow too large."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.left: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.right: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.words = 0

    def add(self, text: str) -> None:
        """Count one text."""
        for start, end in reversed(kept_spans(text)):
            text = f"{text[:start]}\n{text[end:]}"
        for line in text.split("\n"):
            if line and not is_code(line):
                self._line(line)

    def _line(self, line: str) -> None:
        matches = list(WORD.finditer(line))
        words = [match.group() for match in matches]
        self.words += len(words)
        long = [word for word in words[1:] if len(word) > 3]
        # a heading says nothing about its words, and so does a line all in capitals
        if not long or (
            sum(not word.islower() for word in long) > _TITLE_SHARE * len(long) and len(long) >= _TITLE_WORDS
        ):
            return
        previous = ""
        named = False
        end = 0
        for match, word in zip(matches, words, strict=True):
            gap = line[end : match.start()]
            inside = bool(end) and (not _GAP_ENDS.search(gap) or (gap == ". " and previous in NEVER_LAST))
            end = match.end()
            if gap[-1:].isdigit() or gap[-1:] == "_" or line[end : end + 1].isdigit():
                previous = ""  # part of an identifier
                continue
            key = base(word)
            low = key.lower()
            if inside and len(key) == len(word.replace("’s", "").replace("'s", "")):
                self.forms[key] += 1
                case = int(key != low)
                if gap == " " and previous:
                    self.left[case][f"{previous} {low}"] += 1
                    if named:
                        self.left[case][f"{CASED} {low}"] += 1
                if line[end : end + 1] == " " and (following := WORD.match(line, end + 1)):
                    other = base(following.group())
                    self.right[case][f"{low} {other.lower()}"] += 1
                    if other != other.lower() and other != "I":
                        self.right[case][f"{low} {CASED}"] += 1
            previous = low
            named = inside and key != low and low != "i"

    def thin(self) -> None:
        """Forget what was seen once, where there is too much."""
        for counter in (self.forms, *self.left, *self.right):
            if len(counter) > _LIMIT:
                for key in [key for key, count in counter.items() if count == 1]:
                    del counter[key]

    def table(self) -> Table:
        """What was counted."""
        left, right = (
            {pair: (low[pair], high[pair]) for pair in sorted(low.keys() | high.keys())}
            for low, high in (self.left, self.right)
        )
        return Table(self.forms, left, right, self.words)


def learn(texts: Iterable[str]) -> Table:
    """The counts of well-cased English texts.

    The tables of parts add up to the table of the whole, in any order, as long as no part has more than three million
    different words or pairs; beyond that, what was seen once is forgotten, and memory stays bounded. Prune the sum.
    """
    counts = _Counts()
    for number, text in enumerate(texts, 1):
        counts.add(text)
        if number % 1000 == 0:
            counts.thin()
    return counts.table()


def merge(tables: Iterable[Table]) -> Table:
    """The sum of the tables of parts."""
    total = Table()
    for table in tables:
        total.forms.update(table.forms)
        total.words += table.words
        for into, pairs in ((total.left, table.left), (total.right, table.right)):
            for pair, (low, high) in pairs.items():
                had = into.get(pair, (0, 0))
                into[pair] = (had[0] + low, had[1] + high)
    return total
