"""A preparation from beginning to end: pieces of the input to parts, near-duplicates, splits, files, the report.

The result depends on the input files, the settings and the seed alone; never on the number of processes or machines,
nor on how often a run was killed.
"""

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, EIO, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zephyr.data import pool, sources
from zephyr.errors import UserError
from zephyr.prepare import parts, report, written
from zephyr.prepare.duplicates import near_duplicates
from zephyr.prepare.folder import Input, durable, fingerprint, inputs, locked, partial, settle, there, write_json
from zephyr.prepare.parts import Made, Maker, Piece
from zephyr.prepare.progress import Shown
from zephyr.prepare.splits import intervals
from zephyr.prepare.work import Size, Work

NEAR, BEYOND = "near_duplicate", "beyond_the_splits"  # rules of the engine's own
_DISK = {EACCES, EDQUOT, EFBIG, EIO, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS}
_POOL_FROM = 20_000  # rows; fewer are written before processes have started
_LOST = "A process that prepares the data was killed, perhaps for want of memory. Free some, or set processes=1."

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """What is prepared, how, and where to."""

    work: Work
    input: str  # file, folder, or hub data set owner/name@revision:split
    output: str  # folder; OUTPUT.partial beside it is worked in
    settings: Mapping[str, Any]  # JSON values: all that decides the outcome of a row, digests of other files included
    seed: int  # draws the sides of the prompts
    sizes: Mapping[str, Size]  # of each split of the work
    bad_rows: Literal["error", "drop"]
    similarity: float | None  # from this estimated Jaccard on, a row is a near-duplicate; None: none is
    processes: int | None = None  # None: one for each core


def run(job: Job) -> Path:
    """Prepare, or go on where an earlier run was stopped. The folder of the result.

    Raises UserError for mistakes: of the input, of an output that is in the way, of a disk that is full.
    """
    output = Path(job.output).expanduser()
    with _disk(output):
        paths = _paths(job, output)
        with locked(output, shared=False) as folder:
            try:
                return _run(job, output, folder, inputs(paths, folder))
            except BaseException:
                if not any((folder / "parts").glob("*.json")):  # nothing to go on with
                    shutil.rmtree(folder, ignore_errors=True)
                raise


def make_parts(job: Job, rank: int = 0, world_size: int = 1) -> int:
    """One machine's share of the parts, in the same OUTPUT.partial as the others'; `run` afterwards does the rest. The
    rows that were read for it now.

    Whole files are shared out where there are as many as machines, else pieces of files.
    """
    output = Path(job.output).expanduser()
    with _disk(output):
        paths = _paths(job, output)
        with locked(output, shared=True) as folder:
            files = inputs(paths, folder)
            settle(folder, _marks(job, files)[0], alone=False)
            return _make(job, folder, files, rank, world_size)[0]


def _run(job: Job, output: Path, folder: Path, files: list[Input]) -> Path:
    started = time.monotonic()
    parts_mark, mark = _marks(job, files)
    if there(output, mark):
        print(f"{output} is already there, of the same input and settings.")
        shutil.rmtree(folder)
        return output
    if said := settle(folder, parts_mark, alone=True):
        print(said)
    rows, names = _make(job, folder, files)
    final = folder / f"final-{mark}"
    for old in folder.glob("final-*"):
        if old != final:
            shutil.rmtree(old)
    for name in ("data", "plots"):
        (final / name).mkdir(parents=True, exist_ok=True)
    totals, splits = _finish(job, folder, final, names)
    seconds = time.monotonic() - started
    rules = [*job.work.rules, *([NEAR] if job.similarity is not None else []), BEYOND]
    rules += sorted(set(totals.dropped) - set(rules))
    told = {"seconds": round(seconds, 2), "rows": rows, "rows_per_second": round(rows / seconds, 1)}
    account = report.as_json(
        totals, rules, splits, {**job.settings, **_whole(job)}, files, mark, {**told, "processes": _processes(job)}
    )
    assert account["rows_in"] == account["rows_out"] + account["bad_rows"] + sum(account["dropped"].values())
    from zephyr.prepare import histograms  # matplotlib, which the processes of the pool need not load

    drawn = [f"plots/{path.name}" for path in histograms.draw(totals.lengths, final / "plots")]
    with durable(final / "report.md") as path:
        path.write_text(report.as_markdown(account, totals, rules, drawn), encoding="utf-8")
    write_json(final / "report.json", account)
    final.rename(output)
    shutil.rmtree(folder, ignore_errors=True)
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in splits.items())
    print(f"{totals.rows:,} rows in, {totals.kept:,} kept ({sizes}) in {seconds:,.0f} s: {output}/report.md")
    return output


def _marks(job: Job, files: list[Input]) -> tuple[str, str]:
    """Fingerprints of the parts, and of the whole."""
    ours = [dict(job.settings), job.seed, job.similarity is None, parts.ROWS, parts.BYTES]
    mark = fingerprint([ours, [(file.name, file.size, file.digest) for file in files]], job.work)
    return mark, fingerprint([mark, _whole(job)], job.work)


def _whole(job: Job) -> dict[str, Any]:
    """What decides the result beside the parts."""
    return {"seed": job.seed, "sizes": dict(job.sizes), "bad_rows": job.bad_rows, "similarity": job.similarity}


def _processes(job: Job) -> int:
    return job.processes or pool.cores()


def _make(job: Job, folder: Path, files: list[Input], rank: int = 0, world_size: int = 1) -> tuple[int, list[str]]:
    """Make the parts that are not there. The rows that were read for it, and the names of all parts."""
    names: list[str] = []
    maker = Maker(job.work, folder / "parts", job.seed, job.bad_rows == "drop")
    with Shown(sum(file.size for file in files)) as shown:

        def missing() -> Iterator[Piece]:
            for piece in _pieces(files, rank, world_size):
                names.append(piece.part)
                said = parts.whole(maker.folder, piece.part)
                if said is None or (said["bad"] and not maker.drop):
                    yield piece
                else:
                    shown.skipped(piece.done)

        done: Iterator[Made] = _each(maker, missing(), _processes(job))
        with closing(done):  # type: ignore[type-var]
            for made in done:
                shown.advance(made.rows, made.done)
        return shown.rows, names


def _pieces(files: list[Input], rank: int, world_size: int) -> Iterator[Piece]:
    """The input in pieces, in order: those of one of several machines."""
    before = 0
    apart = len(files) >= world_size
    for number, file in enumerate(files):
        if not apart or number % world_size == rank:
            for place, chunk in enumerate(sources.file_chunks(file.path, parts.ROWS, parts.BYTES)):
                if apart or (number + place) % world_size == rank:
                    named = chunk._replace(name=file.name)
                    yield Piece(f"{number:05d}-{place:06d}", named, before + chunk.position)
        before += file.size


def _each(work: Callable[[Item], Result], items: Iterator[Item], processes: int) -> Iterator[Result]:
    """`work` of each item, in order; a single item is done in this process."""
    first = list(islice(items, 2)) if processes > 1 else []
    if len(first) == 2:
        # Arrow's own pools keep what they once had, and would grow with the largest of many rows
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        yield from pool.ordered(functools.partial(_alone, work), chain(first, items), processes, _LOST)
    else:
        yield from map(_alone(work), chain(first, items))


def _alone(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The work, with no threads of Arrow's beside it."""
    pa.set_cpu_count(1)
    return work


def _finish(job: Job, folder: Path, final: Path, names: list[str]) -> tuple[report.Totals, dict[str, int]]:
    """Near-duplicates, splits, their files. The sums, and the rows of each split."""
    totals, starts = report.Totals(), [0]
    with durable(final / "bad_rows.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for name in names:
            part = parts.whole(folder / "parts", name)
            assert part is not None, name
            totals.add(part, file)
            starts.append(totals.kept)
    if not totals.rows:
        raise UserError(f"input: {job.input} is empty: it holds no row.")
    if not totals.kept:
        unusable = {f"unusable, the first: {message}": totals.bad for message in totals.first}
        left_out = {rule: count for rule, count in totals.dropped.items() if count} | unusable
        why = ", ".join(f"{count:,} {rule}" for rule, count in left_out.items())
        raise UserError(f"input: none of the {totals.rows:,} rows is left: {why}")
    stays = None
    if job.similarity is not None:
        stays = _near(job, folder, names, starts, totals)
    job_splits = list(job.work.splits)
    writer = written.Writer(
        folder / "parts", names, stays, starts, final / "data", {}, job.work.schema
    )  # fmt: skip

    def keys() -> Iterator[np.ndarray]:
        for number in range(len(names)):
            found, left = writer.keys(number)
            yield found[left]

    writer.intervals = intervals(job_splits, job.sizes, keys, totals.kept)
    files = list(writer.files(job_splits))
    splits = {split.name: sum(file.rows for file in files if file.split == split) for split in job_splits}
    inside = sum(
        max((splits[split.name] for split in job_splits if split.side == side), default=0) for side in ("train", "test")
    )
    totals.dropped[BEYOND] = totals.kept - inside
    totals.kept = inside
    _tell(f"Writing {len(files)} files.", totals.kept)
    processes = _processes(job) if totals.kept > _POOL_FROM else 1
    for _ in _each(writer, iter(files), processes):
        pass
    return totals, splits


def _tell(line: str, rows: int) -> None:
    if rows > _POOL_FROM:  # what takes a moment only need not be said
        print(line, file=sys.stderr, flush=True)


def _near(job: Job, folder: Path, names: list[str], starts: list[int], totals: report.Totals) -> Path:
    """Find the near-duplicates. The file of who stays, [rows] bool."""
    assert job.similarity is not None

    def signed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in names:
            path = folder / "parts" / f"{name}.bands.npy"
            if path.exists():
                yield np.load(path), np.load(path.with_name(f"{name}.signatures.npy"))

    _tell(f"Comparing {totals.kept:,} rows for near-duplicates.", totals.kept)
    scratch = folder / "near"
    near = near_duplicates(signed(), totals.kept, job.similarity, scratch)
    shutil.rmtree(scratch)
    stays = folder / "stays"
    (~near.dropped).tofile(stays)
    found = np.flatnonzero(near.dropped)
    # a few, spread over the whole: by a hash of the row's number
    some = sorted(found.tolist(), key=lambda row: row * 0x9E3779B1 & 0xFFFFFFFF)[:5] if len(found) else []
    for row in some:
        (where, text), (other, _) = (_prompt(folder, names, starts, at) for at in (row, int(near.of[row])))
        totals.examples.add(f"drop/{NEAR}", where, (f"as {other}: {text}",))
    totals.dropped[NEAR] = len(found)
    totals.kept -= len(found)
    return stays


def _prompt(folder: Path, names: list[str], starts: list[int], row: int) -> tuple[str, str]:
    """Where a kept row stood, and its prompt."""
    number = int(np.searchsorted(starts, row, "right")) - 1
    path = folder / "parts" / f"{names[number]}.parquet"
    table = pq.read_table(path, columns=[parts.WHERE, "prompt"]).slice(row - starts[number], 1)
    return table[parts.WHERE][0].as_py(), table["prompt"][0].as_py()


def _paths(job: Job, output: Path) -> list[Path]:
    """The files of the input. Raises UserError where the output is none that could be beside it."""
    paths = sources.files(job.input, "input")
    if output.is_file():
        there(output, "")
    source = Path(job.input).expanduser()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"output: {output} lies in the input, {source}, and would become a part of it. Give another.")
    return paths


class _disk:
    """Inside, what the file system refuses is the user's to mend."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        if isinstance(error, OSError) and error.errno in _DISK:
            what = os.strerror(error.errno)
            place = error.filename or partial(self.output)
            full = error.errno in (ENOSPC, EDQUOT, EFBIG)
            advice = "Free some space" if full else "Mend that, or give another output"
            raise UserError(f"output: cannot write {place}: {what}. {advice}; the same command goes on.") from error
