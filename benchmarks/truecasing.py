"""Zephyr's truecaser against two others: python -m benchmarks.truecasing --text FILE --output JSON [--table FILE]."""

import argparse
import gzip
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from zephyr.data.truecase import DEFAULT_TABLE, Truecaser
from zephyr.data.truecase.casing import Table, learn, merge

Caser = Callable[[str], str]

_START = re.compile(r"(?:\A|[.!?][\"”’')\]]*\s+)[\"“‘'(\[]*([A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|No|vs|etc|e\.g|i\.e|[A-Z])|\.[A-Za-z])\.\s+\Z")
_I = re.compile(r"(?<![\w.-])I(?![\w.-])")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
PROTOCOL = (
    "A tenth of the documents, drawn by a hash of their name and the seed, is held out; sacremoses is trained on the "
    "rest, truecase and Zephyr come with tables of their own (zephyr_retrained: the rest counted "
    "onto it). Corrupted: every capital that begins a sentence, and every lone I, is lost with probability 0.5. "
    "Both others are given sentences cut at . ! ?; truecase's tokens are those of the tokeniser it uses, sacremoses' "
    "a faster one's of words and marks, and its output goes through its own detruecaser, which capitalises starts. "
    "right: share of the changed characters that are as in the original. mended: share of the lost capitals that came "
    "back. untouched: share of words (between white space) changed in text that has no fault. F1: of words that are "
    "not in lower case, form for form, from text in lower case; accuracy: of all words there. Throughput: characters "
    "by CPU second, the median of three passes."
)


def rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a JSON-lines file, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def held_out(path: Path, seed: int) -> tuple[list[str], list[str]]:
    """(texts of nine tenths of the documents, texts of the others)."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, row in enumerate(rows(path)):
        name = f"{seed} {row.get('source', '').split(':')[0]} {row.get('doc', number)}"
        parts[zlib.crc32(name.encode()) % 10 == 0].append(row["text"])
    return parts


def faults(text: str) -> list[int]:
    """Where a corruption can strike: capitals that begin sentences, and each lone I."""
    starts = [
        match.start(1)
        for match in _START.finditer(text)
        if not _ABBREVIATION.search(text, max(0, match.start() - 8), match.start(1))
    ]
    return sorted({*starts, *(match.start() for match in _I.finditer(text))})


def corrupt(text: str, dice: random.Random) -> str:
    """The text as UltraChat would have it."""
    letters = list(text)
    for position in faults(text):
        if dice.random() < 0.5:
            letters[position] = letters[position].lower()
    return "".join(letters)


def restored(texts: list[str], given: list[str], mended: list[str]) -> dict[str, float]:
    """How right the changes to corrupted texts are, and how many faults they mended."""
    changed = right = lost = back = 0
    for text, bad, good in zip(texts, given, mended, strict=True):
        for original, before, after in zip(text, bad, good, strict=True):
            changed += before != after
            right += before != after == original
            lost += original != before
            back += original != before and original == after
    return {"right": right / max(changed, 1), "mended": back / lost, "changed": changed, "lost": lost}


def touched(texts: list[str], mended: list[str]) -> dict[str, float]:
    """How much of well-cased text was changed."""
    words = changed = 0
    for text, other in zip(texts, mended, strict=True):
        pairs = list(zip(text.split(), other.split(), strict=True))
        words += len(pairs)
        changed += sum(one != two for one, two in pairs)
    return {"untouched": changed / words, "words": words}


def f1(texts: list[str], mended: list[str]) -> dict[str, float]:
    """F1 of the words that are not in lower case."""
    true = given = both = words = same = 0
    for text, other in zip(texts, mended, strict=True):
        for match in _WORD.finditer(text):
            word, found = match.group(), other[match.start() : match.end()]
            words += 1
            same += word == found
            true += word != word.lower()
            given += found != found.lower()
            both += word == found != word.lower()
    return {
        "f1": 2 * both / (true + given),
        "precision": both / max(given, 1),
        "recall": both / true,
        "accuracy": same / words,
    }


def lowered(text: str) -> str:
    """The text in lower case, letter for letter."""
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def measure(caser: Caser, texts: list[str], corrupted: list[str], lower: list[str]) -> dict[str, float]:
    """All figures of one truecaser."""
    figures: dict[str, float] = {}
    for name, given in (("corrupted", corrupted), ("well_cased", texts), ("all_lower", lower)):
        times = []
        for _ in range(3):
            began = time.process_time()
            mended = [caser(text) for text in given]
            times.append(time.process_time() - began)
        figures[f"characters_per_second_{name}"] = sum(map(len, given)) / median(times)
        if name == "corrupted":
            figures |= restored(texts, given, mended)
        elif name == "well_cased":
            figures |= touched(texts, mended)
        else:
            figures |= f1(texts, mended)
    return figures


def _by_sentence(
    text: str, spans_of: Callable[[str], Iterable[tuple[int, int]]], case: Callable[[list[str]], list[str]]
) -> str:
    """A tokens' truecaser's answer laid back over the text."""
    letters = list(text)
    cuts = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    for start, end in pairwise(cuts):
        sentence = text[start:end]
        spans = list(spans_of(sentence))
        tokens = case([sentence[first:last] for first, last in spans]) if spans else []
        for (first, last), token in zip(spans, tokens, strict=False):
            if len(token) == last - first:
                letters[start + first : start + last] = token
    return "".join(letters)


def truecase_peer() -> Caser:
    """`truecase`, with the model that comes with it and the tokeniser that it uses."""
    from nltk.tokenize import NLTKWordTokenizer
    from truecase.TrueCaser import TrueCaser

    model, words = TrueCaser(), NLTKWordTokenizer()
    return lambda text: _by_sentence(text, words.span_tokenize, model.get_true_case_from_tokens)


def sacremoses_peer(texts: list[str]) -> Caser:
    """`sacremoses`, trained on the texts."""
    from sacremoses import MosesDetruecaser, MosesTruecaser

    model, back = MosesTruecaser(), MosesDetruecaser()
    model.train([_TOKEN.findall(sentence) for text in texts for sentence in _SENTENCE.split(text)])

    def spans(sentence: str) -> Iterable[tuple[int, int]]:
        return (match.span() for match in _TOKEN.finditer(sentence))

    def case(tokens: list[str]) -> list[str]:
        return back.detruecase(" ".join(model.truecase(" ".join(tokens))))

    return lambda text: _by_sentence(text, spans, case)


def table(results: dict[str, dict[str, float]]) -> str:
    """The figures as text."""
    names = f"{'right':>9}{'mended':>9}{'untouched':>11}{'F1':>8}{'accuracy':>10}"
    lines = [f"{'':18}{names}{'MB/s cased':>12}{'corrupted':>11}{'lower':>8}"]
    for name, one in results.items():
        speeds = [one[f"characters_per_second_{kind}"] / 1e6 for kind in ("well_cased", "corrupted", "all_lower")]
        lines.append(
            f"{name:18}{one['right']:9.2%}{one['mended']:9.2%}{one['untouched']:11.4%}{one['f1']:8.4f}{one['accuracy']:10.2%}"
            f"{speeds[0]:12.3f}{speeds[1]:11.3f}{speeds[2]:8.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the file, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truecasing", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines of well-cased English: text, doc, source")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--table", type=Path, default=DEFAULT_TABLE, help="a casing table other than the default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="without the others")
    options = parser.parse_args(arguments)
    rest, texts = held_out(options.text, options.seed)
    dice = random.Random(options.seed)
    corrupted, lower = [corrupt(text, dice) for text in texts], [lowered(text) for text in texts]

    makers: dict[str, Callable[[], Caser]] = {"zephyr": lambda: Truecaser(Table.load(options.table)).truecase}
    if not options.alone:
        makers |= {
            "zephyr_retrained": lambda: Truecaser(merge([Table.load(options.table), learn(rest)]).pruned()).truecase,
            "truecase": truecase_peer,
            "sacremoses": lambda: sacremoses_peer(rest),
        }
    results: dict[str, dict[str, float]] = {}
    missing = {}
    for name, maker in makers.items():
        try:
            caser = maker()
        except ImportError as error:
            missing[name] = f"not installed: {error}"
            print(f"{name}: {missing[name]}")
            continue
        results[name] = measure(caser, texts, corrupted, lower)
    peers = [one for name, one in results.items() if not name.startswith("zephyr")]
    kinds = [key for key in results["zephyr"] if key.startswith("characters")]
    ratios = {key: min(results["zephyr"][key] / one[key] for one in peers) for key in kinds} if peers else {}
    written = {
        "results": results,
        "ratios_to_the_faster": ratios,
        "missing": missing,
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "seed": options.seed,
        "protocol": PROTOCOL,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n")
    print(table(results))
    print(
        ", ".join(f"{key.removeprefix('characters_per_second_')}: {value:.0f} times" for key, value in ratios.items())
    )


if __name__ == "__main__":
    main()
