"""Tokenised data on disk: Arrow files keyed by everything that decides their content, and read by memory map.

The key covers the source's bytes, the tokenizer with its template, the options, and the code that does the work; so
a stale file is never used. A folder is written under a temporary name and renamed when complete.
"""

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from zephyr.data import sources
from zephyr.data.batch import Conversation, Pair
from zephyr.data.render import Message, control_tokens, render, render_pairs, truncate, truncate_pair, with_system
from zephyr.errors import UserError

_HERE = Path(__file__).parent
_CODE = [_HERE / name for name in ("sources.py", "render.py", "chat.jinja", "tokenised.py")]
_CHUNK = 512  # rows tokenised at once


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


class Options(NamedTuple):
    """What decides the tokens of a row, apart from its text and the tokenizer."""

    max_length: int  # tokens of a conversation, or of a prompt and one completion
    max_prompt_length: int  # tokens a prompt keeps when a pair is too long (pairs only)
    all_tokens: bool  # score every token, not the assistant's alone (conversations only)
    system: str | None  # system turn of conversations that have none; None adds no turn
    seed: int  # draws the rejected completion of raw feedback
    drop_bad_rows: bool  # count and drop rows that cannot be used; otherwise the first one is an error


def tokenised_conversations(
    source: str, key: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache: Path
) -> tuple[Table, Report]:
    """Columns `ids` and `labels` (0 or 1) of every usable conversation of the source."""
    return _cached(source, key, tokenizer, options, cache, _Conversations)


def tokenised_pairs(
    source: str, key: str, tokenizer: PreTrainedTokenizerBase, options: Options, cache: Path
) -> tuple[Table, Report]:
    """Columns `prompt`, `chosen` and `rejected` of every usable pair of the source."""
    return _cached(source, key, tokenizer, options, cache, _Pairs)


class _Worker:
    """Turns rows into columns of token ids and keeps count."""

    columns: ClassVar[dict[str, pa.DataType]]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.forbidden = control_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def parse(self, row: sources.Row) -> Any:
        raise NotImplementedError

    def tokenise(self, parsed: list[Any]) -> Iterator[tuple[list[int], ...]]:
        raise NotImplementedError

    def usable(self, rows: Iterator[sources.Row]) -> Iterator[Any]:
        """Parsed rows that can be trained on; the others are counted by reason."""
        for row in rows:
            self.counts["rows"] += 1
            try:
                parsed = self.parse(row)
            except sources.BadRow as error:
                if not self.options.drop_bad_rows:
                    raise UserError(
                        f"{error} Mend the row, or set data.bad_rows=drop to leave such rows out."
                    ) from error
                self.dropped["unusable row"] += 1
                continue
            if isinstance(parsed, str):
                self.dropped[parsed] += 1
            else:
                yield parsed

    def finished(self, messages: list[Message]) -> list[Message]:
        self.counts["escaped"] += sum(any(token in m["content"] for token in self.forbidden) for m in messages)
        return with_system(messages, self.options.system)

    def count_cut(self, before: int, after: int) -> None:
        self.counts["truncated"] += before > after
        self.counts["tokens_cut"] += before - after
        self.counts["tokens"] += after


class _Conversations(_Worker):
    columns: ClassVar = {"ids": pa.list_(pa.int32()), "labels": pa.list_(pa.uint8())}

    def parse(self, row: sources.Row) -> list[Message] | str:
        messages = sources.conversation(row)
        spoken = [message["content"] for message in messages if message["role"] == "assistant"]
        if not spoken:
            return "no assistant turn"
        if not all(text.strip() for text in spoken):
            return "empty assistant turn"
        return self.finished(messages)

    def tokenise(self, parsed: list[list[Message]]) -> Iterator[tuple[list[int], ...]]:
        for whole in render(self.tokenizer, parsed, self.options.all_tokens):
            cut: Conversation = truncate(whole, self.options.max_length)
            if not any(cut.labels[1:]):
                self.dropped["no scored token within max_length"] += 1
                continue
            self.count_cut(len(whole.ids), len(cut.ids))
            yield cut.ids, [int(label) for label in cut.labels]


class _Pairs(_Worker):
    columns: ClassVar = {name: pa.list_(pa.int32()) for name in Pair._fields}

    def parse(self, row: sources.Row) -> sources.Preference | str:
        pair = sources.preference(row, self.options.seed)
        if pair is None:
            return "fewer than two scored completions"
        chosen, rejected = pair
        if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise sources.BadRow(f"{row[0]}: chosen and rejected must end with an assistant turn.")
        if not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip():
            return "empty completion"
        if chosen == rejected:
            return "identical completions"
        return self.finished(chosen), self.finished(rejected)

    def tokenise(self, parsed: list[sources.Preference]) -> Iterator[tuple[list[int], ...]]:
        for whole in render_pairs(self.tokenizer, parsed):
            if whole is None:
                self.dropped["prompt is not a token prefix of its completions"] += 1
                continue
            cut = truncate_pair(whole, self.options.max_length, self.options.max_prompt_length)
            if cut.chosen == cut.rejected:
                self.dropped["completions identical within max_length"] += 1
                continue
            self.count_cut(sum(map(len, whole)), sum(map(len, cut)))
            yield tuple(cut)


def _cached(
    source: str,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    cache: Path,
    worker_type: Callable[[PreTrainedTokenizerBase, Options], _Worker],
) -> tuple[Table, Report]:
    paths = sources.files(source, key)
    fingerprint = _fingerprint(paths, tokenizer, options, worker_type.__name__)
    folder = cache / fingerprint
    if not (folder / "report.json").exists():
        worker = worker_type(tokenizer, options)
        _write(worker, paths, folder, fingerprint)
    report = Report(**json.loads((folder / "report.json").read_text()))
    if report.kept == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{key}: none of the {report.rows} rows of {source} can be used: {reasons}.")
    return Table(folder / "tokens.arrow"), report


def _write(worker: _Worker, paths: list[Path], folder: Path, fingerprint: str) -> None:
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    schema = pa.schema(list(worker.columns.items()))
    kept = 0
    try:
        temporary.mkdir(parents=True)
        with pa.ipc.new_file(str(temporary / "tokens.arrow"), schema) as writer:
            usable = worker.usable(sources.read(paths))
            while parsed := list(islice(usable, _CHUNK)):
                rows = list(worker.tokenise(parsed))
                kept += len(rows)
                if rows:
                    columns = zip(*rows, strict=True)
                    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
        counts = {name: worker.counts[name] for name in ("rows", "truncated", "tokens_cut", "escaped", "tokens")}
        report = Report(**counts, kept=kept, dropped=dict(worker.dropped), fingerprint=fingerprint)
        (temporary / "report.json").write_text(json.dumps(report._asdict(), indent=2))
        if not folder.exists():
            temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # otherwise another process wrote the same content first
            raise UserError(f"Cannot write tokenised data under {folder.parent} (data.cache): {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
