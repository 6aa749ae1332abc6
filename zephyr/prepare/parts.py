"""A piece of the input to a part: the kept records, and what the report and the later steps need to know.

A part is files of one name: .parquet (records and where they stood), .keys.npy ([rows] uint64, see splits),
.bands.npy and .signatures.npy (if the work gives any) and .json (counts), which comes last and says that it is whole.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zephyr.data.sources import BadRow, Chunk, Row
from zephyr.errors import UserError
from zephyr.prepare.folder import durable, write_json
from zephyr.prepare.tally import Examples, edge, lengths
from zephyr.prepare.work import Outcome, Work

ROWS, BYTES = 2_000, 8_000_000  # of a piece, at most: seconds of work, and what a kill loses
WHERE = "_where"  # column of the place in the input; not in the output


class Piece(NamedTuple):
    """A chunk of the input, and the part it becomes."""

    part: str  # sorts as the input does
    chunk: Chunk
    done: int  # bytes of the whole input up to its end


class Made(NamedTuple):
    """A finished part, for who shows the progress."""

    rows: int  # read
    done: int  # bytes of the whole input up to its end


class Maker:
    """Makes parts in a folder. `drop`: unusable rows are counted and named; otherwise the first is an error."""

    def __init__(self, work: Work, folder: Path, seed: int, drop: bool) -> None:
        self.work, self.folder, self.seed, self.drop = work, folder, seed, drop

    def __call__(self, piece: Piece) -> Made:
        """Raises UserError at an unusable row, unless those are dropped."""
        rows = 0
        bad: list[str] = []
        kept: list[tuple[str, Outcome]] = []
        dropped, counts, measured = Counter[str](), Counter[str](), Counter[tuple[str, int]]()
        examples = Examples()
        for row in piece.chunk.rows():
            rows += 1
            try:
                where, outcome = self._outcome(row, piece.chunk.first == rows == 1)
            except BadRow as error:
                bad.append(self._bad(error))
                continue
            counts.update(outcome.counts)
            for change in outcome.changes:
                examples.add(f"change/{change.what}", where, (change.before, change.after))
            if outcome.record is not None:
                kept.append((where, outcome))
            else:
                rule = outcome.rule or "dropped"
                dropped[rule] += 1
                examples.add(f"drop/{rule}", where, (outcome.evidence,))
        table, kept = self._table(kept, bad)
        for _, outcome in kept:
            measured.update((name, edge(length)) for name, length in lengths(outcome.record or {}))
        self._write(piece.part, table, kept)
        histograms: dict[str, dict[int, int]] = {}
        for (name, length), count in sorted(measured.items()):
            histograms.setdefault(name, {})[length] = count
        write_json(
            self.folder / f"{piece.part}.json",
            {
                "rows": rows,
                "kept": len(kept),
                "bad": bad,
                "dropped": dropped,
                "counts": counts,
                "examples": examples.as_json(),
                "lengths": histograms,
                "bytes": (self.folder / f"{piece.part}.parquet").stat().st_size,
            },
        )
        return Made(rows, piece.done)

    def _outcome(self, row: Row | BadRow, first: bool) -> tuple[str, Outcome]:
        if isinstance(row, BadRow):
            raise row
        try:
            return row[0], self.work(row)
        except UserError as error:
            # a file that begins with rows of another kind is another file; a single such row further on is unusable
            raise error if first or isinstance(error, BadRow) else BadRow(str(error)) from error
        except Exception as error:
            error.add_note(f"at {row[0]}")
            raise

    def _bad(self, error: BadRow) -> str:
        if self.drop:
            return str(error)
        raise UserError(f"{error} Mend the row, or set bad_rows=drop to leave such rows out.") from error

    def _table(self, kept: list[tuple[str, Outcome]], bad: list[str]) -> tuple[pa.Table, list[tuple[str, Outcome]]]:
        schema = self.work.schema.append(pa.field(WHERE, pa.string()))
        records = [{**(outcome.record or {}), WHERE: where} for where, outcome in kept]
        try:
            return pa.Table.from_pylist(records, schema), kept
        except (pa.ArrowException, ValueError, TypeError):
            pass  # one of them at least is nothing that Parquet can hold
        fine = []
        for record, (where, outcome) in zip(records, kept, strict=True):
            try:
                pa.Table.from_pylist([record], schema)
                fine.append((where, outcome))
            except UnicodeEncodeError:
                bad.append(self._bad(BadRow(f"{where}: holds half a character (a lone surrogate). Remove it.")))
            except (pa.ArrowException, ValueError, TypeError) as error:
                what = f"{where}: cannot be written ({str(error).splitlines()[0]}). Mend its types."
                bad.append(self._bad(BadRow(what)))
        records = [{**(outcome.record or {}), WHERE: where} for where, outcome in fine]
        return pa.Table.from_pylist(records, schema), fine

    def _write(self, part: str, table: pa.Table, kept: list[tuple[str, Outcome]]) -> None:
        outcomes = [outcome for _, outcome in kept]
        with durable(self.folder / f"{part}.parquet") as path:
            pq.write_table(table, path, compression="zstd", compression_level=1)
        keys = [key(self.seed, (outcome.record or {})["prompt"]) for outcome in outcomes]
        _save(self.folder / f"{part}.keys.npy", np.array(keys, np.uint64))
        bands = [outcome.bands for outcome in outcomes if outcome.bands is not None]
        signatures = [outcome.signature for outcome in outcomes if outcome.signature is not None]
        if bands:
            assert len(bands) == len(signatures) == len(outcomes)
            _save(self.folder / f"{part}.bands.npy", np.stack(bands))
            _save(self.folder / f"{part}.signatures.npy", np.stack(signatures))


def key(seed: int, prompt: str) -> int:
    """What decides the side of a prompt: a 64-bit hash of seed and text."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).digest(), "big")


def whole(folder: Path, part: str) -> dict[str, Any] | None:
    """What a finished part says of itself; None if it is missing or not whole."""
    try:
        said: dict[str, Any] = json.loads((folder / f"{part}.json").read_bytes())
        return said if (folder / f"{part}.parquet").stat().st_size == said["bytes"] else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _save(path: Path, array: np.ndarray) -> None:
    with durable(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
