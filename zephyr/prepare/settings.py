"""Every key of `python -m zephyr.prepare`, with its type and unit. Defaults live in conf/prepare/."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from zephyr.data.filters import Filters
from zephyr.prepare.engine import Job
from zephyr.prepare.work import Work
from zephyr.settings import Count, Must, Seed, Text

Rows = Annotated[  # of a split
    float,
    Must(
        "a share in (0, 1) or a whole number of rows", lambda value: value >= 0 and (value < 1 or value == int(value))
    ),
]
Jaccard = Annotated[float, Must("in (0, 1]", lambda value: 0 < value <= 1)]


@dataclass(frozen=True)
class NearDuplicates:
    """Rows whose prompt resembles an earlier one's, by MinHash over runs of words."""

    threshold: Jaccard  # share of runs in common, from which a row is a duplicate
    permutations: Count  # entries of a signature; the estimate's standard deviation is sqrt(J (1 - J) / permutations)
    run: Count  # words


@dataclass(frozen=True)
class Decontaminate:
    """Rows that hold text of evaluation prompts."""

    files: list[Text]  # evaluation prompts on disk, files or folders; none: off
    n: Count  # words in a row that are too many to have in common
    common: Count  # n-grams that so many prompts of a file share are a template and count for none


@dataclass(frozen=True)
class ChatSplits:
    """Rows of each split."""

    train_sft: Rows | None
    test_sft: Rows | None
    train_gen: Rows | None
    test_gen: Rows | None


@dataclass(frozen=True)
class PairSplits:
    """Rows of each split."""

    train_prefs: Rows | None
    test_prefs: Rows | None
    train_sft: Rows | None
    test_sft: Rows | None
    train_gen: Rows | None
    test_gen: Rows | None


@dataclass(frozen=True)
class Preparation:
    """What both kinds of data share."""

    input: Text  # file, folder, or hub data set owner/name@revision:split
    output: Text  # folder that is not there yet
    seed: Seed  # of the splits, of random choices
    processes: Count | None  # null: one for each CPU core
    bad_rows: Literal["error", "drop"]  # what to do with a row that cannot be used
    decontaminate: Decontaminate


@dataclass(frozen=True)
class Dialogues(Preparation):
    """python -m zephyr.prepare ultrachat"""

    truecase: Text | None  # default: the table that comes with Zephyr; a table of your own; null: off
    truecase_roles: list[Literal["system", "user", "assistant"]]  # whose messages
    filters: Filters
    near_duplicates: NearDuplicates | None
    splits: ChatSplits


@dataclass(frozen=True)
class Feedback(Preparation):
    """python -m zephyr.prepare ultrafeedback"""

    score: Literal["mean", "overall"]  # of the aspects' ratings, or the critique's one score
    rejected: Text  # random: one of the rest; worst; gap>=x: a random one of those at least x below chosen
    ties: Literal["keep", "drop", "redraw"]  # where the one drawn scores as chosen does
    truthful_qa: Literal["drop", "keep"]  # prompts of the benchmark of that name, which are among UltraFeedback's
    splits: PairSplits


@dataclass(frozen=True)
class Casing:
    """python -m zephyr.prepare truecaser"""

    input: Text
    output: Text  # file of the table
    onto: Text | None  # the table that the counts are added to; default: the one that comes with Zephyr
    processes: Count | None


def job_of(
    work: Work,
    settings: Dialogues | Feedback,
    config: dict[str, Any],
    files: Sequence[str | None],
    similarity: float | None = None,
) -> Job:
    """The work with what both kinds of data share. The outcome depends on `files` too; None where one is not set."""
    return Job(
        work=work,
        input=settings.input,
        output=settings.output,
        settings=_deciding(config, files),
        seed=settings.seed,
        sizes={
            name: size if size is None or 0 < size < 1 else int(size) for name, size in vars(settings.splits).items()
        },
        bad_rows=settings.bad_rows,
        similarity=similarity,
        processes=settings.processes,
    )


def _deciding(config: dict[str, Any], files: Sequence[str | None]) -> dict[str, Any]:
    """What of a configuration decides the outcome of a row: with the digests of the files that it names."""
    digests = {}
    for name in filter(None, files):
        for path in _files(Path(name).expanduser()):
            with path.open("rb") as file:
                digests[str(path)] = hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
    elsewhere = ("input", "output", "processes", "bad_rows", "splits")
    return {key: value for key, value in config.items() if key not in elsewhere} | {"files": digests}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
