"""Tokenised data on disk: Arrow files keyed by everything that decides their content, and read by memory map.

The key covers the source's bytes, the tokenizer with its template, the options, and the code that does the work; so
a stale file is never used. A folder is written under a temporary name and renamed when complete.
"""

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from zephyr.data import encode, sources
from zephyr.data.encode import ConversationRows, Options, PairRows, Rows
from zephyr.data.render import chat_format
from zephyr.errors import UserError

_HERE = Path(__file__).parent
_CODE = [
    _HERE / name
    for name in ("messages.py", "binarise.py", "sources.py", "encode.py", "render.py", "chat.jinja", "tokenised.py")
]


class Report(NamedTuple):
    """What became of a source's rows: rows = kept + the sum of dropped."""

    rows: int
    kept: int
    dropped: dict[str, int]  # reason -> rows
    truncated: int  # rows that lost tokens
    tokens_cut: int
    escaped: int  # messages in which a control token was made harmless
    tokens: int
    fingerprint: str

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.rows:,} rows, {self.tokens:,} tokens"]
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to length ({self.tokens_cut:,} tokens)")
        if self.escaped:
            parts.append(f"{self.escaped:,} messages held control tokens, now escaped")
        return "; ".join(parts)


class Table:
    """Columns of variable-length integer rows in a memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._columns = {
            name: [
                (column.offsets.to_numpy(), column.values.to_numpy()) for column in (b.column(name) for b in batches)
            ]
            for name in reader.schema.names
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, name: str) -> np.ndarray:
        """Number of entries of every row of a column."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._columns[name]])

    def row(self, name: str, index: int) -> list[int]:
        """The entries of one row of a column."""
        chunk = int(np.searchsorted(self._starts, index, "right")) - 1
        offsets, values = self._columns[name][chunk]
        at = index - self._starts[chunk]
        row: list[int] = values[offsets[at] : offsets[at + 1]].tolist()
        return row


def tokenised_conversations(
    source: str, key: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache: Path
) -> tuple[Table, Report]:
    """Columns `ids` and `labels` (0 or 1) of every usable conversation of the source."""
    return _cached(source, key, tokenizer, options, cache, ConversationRows)


def tokenised_pairs(
    source: str, key: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache: Path
) -> tuple[Table, Report]:
    """Columns `prompt`, `chosen` and `rejected` of every usable pair of the source."""
    return _cached(source, key, tokenizer, options, cache, PairRows)


def _cached(
    source: str, key: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache: Path, kind: type[Rows]
) -> tuple[Table, Report]:
    paths = sources.files(source, key)
    fingerprint = _fingerprint(paths, tokenizer, options, kind.__name__)
    folder = cache / fingerprint
    if not (folder / "report.json").exists():
        encoded = encode.encoded(sources.chunks(paths), kind, chat_format(tokenizer), options, encode.cores())
        _write(encoded, kind, folder, fingerprint)
    report = Report(**json.loads((folder / "report.json").read_text()))
    if report.kept == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{key}: none of the {report.rows} rows of {source} can be used: {reasons}.")
    return Table(folder / "tokens.arrow"), report


def _write(encoded: Generator[encode.Encoded, None, None], kind: type[Rows], folder: Path, fingerprint: str) -> None:
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    schema = pa.schema([(name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in kind.columns.items()])
    kept, totals, dropped = 0, Counter[str](), Counter[str]()
    try:
        temporary.mkdir(parents=True)
        with pa.ipc.new_file(str(temporary / "tokens.arrow"), schema) as writer, closing(encoded):
            for columns, counted, reasons in encoded:
                totals.update(counted)
                dropped.update(reasons)
                if rows := len(columns[0][0]):
                    writer.write_batch(pa.record_batch([_lists(*column) for column in columns], schema=schema))
                    kept += rows
        counts = {name: totals[name] for name in ("rows", "truncated", "tokens_cut", "escaped", "tokens")}
        report = Report(**counts, kept=kept, dropped=dict(dropped), fingerprint=fingerprint)
        (temporary / "report.json").write_text(json.dumps(report._asdict(), indent=2))
        if not folder.exists():
            temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # otherwise another process wrote the same content first
            raise UserError(f"Cannot write tokenised data under {folder.parent} (data.cache): {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lists(lengths: np.ndarray, values: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _fingerprint(paths: list[Path], tokenizer: PreTrainedTokenizerBase, options: Options, kind: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in (*paths, *_CODE):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    digest.update(json.dumps([kind, tokenizer.eos_token, *options]).encode())
    return digest.hexdigest()
