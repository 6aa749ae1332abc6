"""What texts have in common: MinHash signatures of prompts, and n-grams shared with evaluation prompts.

Both see texts as words: NFKC and case folded, letters and digits only. So neither spacing nor punctuation nor casing
tells two texts apart.
"""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zephyr.data.messages import Message
from zephyr.data.sources import SUFFIXES, read
from zephyr.errors import UserError, reason

PROMPTS = ("turns", "instruction", "question", "prompt", "text")
ANSWERS = ("reference", "canonical_solution")

_WORD = re.compile(r"[^\W_]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: Knuth's multiplicative hashing
_EVALUATION_SUFFIXES = (*SUFFIXES, ".csv", ".txt")
_LEAST_WORDS = 4  # of a prompt that a whole message may be held against: "Go on." is nobody's property
_LEAST_CHANCE = 0.99  # of two texts exactly as similar as the threshold to share a band


def words(text: str) -> list[str]:
    """The words of a text, normalised: what two texts are compared by."""
    return _WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Signatures:
    """MinHash (Broder, 1997) of a text's runs of words, for finding near-duplicates without comparing every pair.

    Two rows are candidates if they share a band hash; `jaccard` of their signatures then estimates the share of runs
    that they have in common, with standard deviation sqrt(J (1 - J) / permutations).
    """

    threshold: float  # Jaccard index from which two texts are duplicates, in (0, 1]
    permutations: int  # numbers a signature holds, 4 bytes each
    run: int  # words of a shingle; a shorter text is one shingle
    seed: int

    @cached_property
    def layout(self) -> tuple[int, int]:
        """Bands, and rows of each: as many rows as let a pair at the threshold meet with 99 % chance.

        Two texts of Jaccard index s share a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and
        Ullman, "Mining of Massive Datasets", section 3.4).
        """
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= _LEAST_CHANCE:
                return bands, rows
        return self.permutations, 1

    def of(self, messages: list[Message]) -> NDArray[np.uint32]:
        """[permutations] of a dialogue's prompt, the first user turn. Where that is shorter than a shingle ("Hi"), of
        all that is said: a greeting does not make duplicates of two dialogues."""
        prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
        if len(words(prompt)) < self.run:
            prompt = "\n".join(message["content"] for message in messages)
        return self.signature(prompt)

    def signature(self, text: str) -> NDArray[np.uint32]:
        """[permutations]. The same on every 64-bit machine and in every process."""
        from rensa import RMinHash

        tokens = words(text) or [" ".join(text.split())]  # signs alone, a smiley say, are a word
        shingles = [" ".join(tokens[i : i + self.run]) for i in range(max(1, len(tokens) - self.run + 1))]
        encoded = [[shingle.encode(errors="replace") for shingle in shingles]]
        return np.array(
            RMinHash.digest_matrix_from_token_byte_sets(encoded, self.permutations, self.seed).to_rows()[0], np.uint32
        )

    def bands(self, signature: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """[..., bands] of [..., permutations]: a hash of each band. Equal rows in different bands hash differently."""
        bands, rows = self.layout
        cells = signature[..., : bands * rows].astype(np.uint64).reshape(*signature.shape[:-1], bands, rows)
        mixed = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64) * _MIX, cells.shape[:-1])
        for row in range(rows):
            mixed = (mixed ^ cells[..., row]) * _MIX
            mixed = mixed ^ (mixed >> np.uint64(29))
        return mixed


def jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated Jaccard index of texts by their signatures, [..., permutations] each; shapes broadcast."""
    return np.mean(first == second, axis=-1)


class Contamination:
    """Tells whether a dialogue holds text of evaluation prompts: n words in a row, or a message that is a prompt.

    An n-gram that `common` or more prompts of one file share is a template ("Answer the question below in ...") and
    counts for none of them; those prompts are still found by their other n-grams, and as whole messages. Prompts of
    fewer than n words are found as whole messages only.
    """

    def __init__(self, paths: Sequence[str | Path], n: int, common: int) -> None:
        """Reads the files, and folders of files: .jsonl, .json, .parquet, .csv, and .txt with a prompt a line.

        Raises UserError at one that cannot be read, holds no prompt, or has a row without any of `PROMPTS`, `ANSWERS`.
        """
        self.n = n
        self.whole: dict[str, str] = {}  # prompt -> file
        self.grams: dict[str, str] = {}
        for path in _evaluation_files(paths):
            self._learn(f"{path.parent.name}/{path.name}", path, common)
        vocabulary = {word for gram in self.grams for word in gram.split(" ")}
        ids = np.arange(1, len(vocabulary) + 1, dtype=np.uint64) * _MIX
        self._ids = dict(zip(sorted(vocabulary), ids.tolist(), strict=True))
        self._longest = max(prompt.count(" ") for prompt in self.whole) + 1 if self.whole else 0
        # Whether any n-gram has a short hash: 15 in 16 windows that are no n-gram of an evaluation fall through this
        # table, and those left over are compared as text.
        bits = max(10, (16 * len(self.grams)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        flat = [word for gram in self.grams for word in gram.split(" ")]
        self._table[self._windows(flat)[:: self.n] >> self._shift] = True

    def __call__(self, messages: list[Message]) -> tuple[str, str] | None:
        """The evaluation file and the text that a dialogue shares with it (at most 80 characters), None if clean."""
        flat: list[str] = []
        for message in messages:
            tokens = words(message["content"])
            if len(tokens) <= self._longest:
                text = " ".join(tokens)
                if text in self.whole:
                    return self.whole[text], text[:80]
            flat += tokens
            flat.append("\n")  # no word: keeps n-grams within a message
        for start in np.flatnonzero(self._table[self._windows(flat) >> self._shift]).tolist():
            gram = " ".join(flat[start : start + self.n])
            if gram in self.grams:
                return self.grams[gram], gram[:80]
        return None

    def _windows(self, tokens: list[str]) -> NDArray[np.uint64]:
        """A hash of each n words in a row."""
        get = self._ids.get
        ids = np.array([get(token, 0) for token in tokens], np.uint64)
        count = max(0, len(ids) - self.n + 1)
        mixed = np.zeros(count, np.uint64)
        for offset in range(self.n):
            mixed = (mixed ^ ids[offset : offset + count]) * _MIX
            mixed ^= mixed >> np.uint64(31)
        return mixed

    def _learn(self, name: str, path: Path, common: int) -> None:
        texts: dict[str, bool] = {}
        for text, whole in _texts(path):
            if key := " ".join(words(text)):
                texts[key] = texts.get(key, False) or whole
        if not texts:
            raise UserError(f"evaluation prompts: {path} holds none.")
        sharing: Counter[str] = Counter()
        for text, whole in texts.items():
            tokens = text.split(" ")
            if whole and len(tokens) >= _LEAST_WORDS:
                self.whole.setdefault(text, name)
            sharing.update({" ".join(tokens[i : i + self.n]) for i in range(len(tokens) - self.n + 1)})
        for gram, count in sharing.items():
            if count < common:
                self.grams.setdefault(gram, name)


def _evaluation_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(_EVALUATION_SUFFIXES))
            if not found:
                raise UserError(f"the folder {path} of evaluation prompts holds no {', '.join(_EVALUATION_SUFFIXES)}.")
            yield from found
        elif not path.exists():
            raise UserError(f"evaluation prompts: {path} does not exist.")
        elif not path.name.endswith(_EVALUATION_SUFFIXES):
            raise UserError(f"evaluation prompts: {path} is none of {', '.join(_EVALUATION_SUFFIXES)}.")
        else:
            yield path


def _texts(path: Path) -> Iterator[tuple[str, bool]]:
    """The texts of a file, and whether a message may be held against them whole: prompts, but not short answers."""
    try:
        if path.suffix == ".txt":
            for line in path.read_text("utf-8-sig").splitlines():
                yield line, True
            return
        for where, row in _rows(path):
            yield from _row_texts(where, row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"evaluation prompts: {path} cannot be read: {reason(error)}") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".csv":
        yield from read([path])
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{path.name} line {reader.line_num}", row


def _row_texts(where: str, row: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    known = {name: name.lower() in PROMPTS for name in row if name and name.lower() in PROMPTS + ANSWERS}
    if not known:
        raise UserError(
            f"{where}: an evaluation prompt needs one of the fields {', '.join(PROMPTS + ANSWERS)}; "
            f"found {', '.join(sorted(filter(None, row))) or 'none'}. Rename one, or give prompts as .txt, one a line."
        )
    for name, whole in known.items():
        for text in row[name] if isinstance(row[name], list) else [row[name]]:
            if isinstance(text, str):
                yield text, whole
            elif text is not None:
                raise UserError(f"{where}: {name} is {type(text).__name__}, not a text or a list of texts.")
