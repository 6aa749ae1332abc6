"""Rows from files or the hub, and what they say: conversations for SFT, preference pairs for DPO.

Sources: .jsonl, .json, .parquet (the first two also with .gz), a folder of them, or a hub data set
`owner/name[@revision][:split]`. The layout of a row is recognised by its columns.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.data.binarise import Rejected, Rules, binarise, sides
from zephyr.data.messages import BadRow, Message, Row, checked_list, checked_messages, checked_turns
from zephyr.errors import UserError, reason

Preference = tuple[list[Message], list[Message]]  # chosen and rejected; they differ in their last turn

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_CHUNK_ROWS, _CHUNK_BYTES = 256, 4_000_000  # of a piece of a file: a quarter of a second's tokenising
_LINE_BYTES = 1 << 26  # longer lines are no rows but a mistake
_WRITE_AGAIN = "Write it again with a JSON library."
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(:(?P<split>\w+))?")
_RULES = Rules("mean", Rejected(worst=False, gap=0.0), ties="keep", truthful_qa="keep")  # the paper's


def files(source: str, key: str) -> list[Path]:
    """The files of a source; those of a hub data set are fetched (or taken from the hub's local cache).

    `key` is the configuration key that names the source, for messages. Raises UserError when there are none.
    """
    found = local_files(source, key)
    return _hub_files(key, source, **_HUB.fullmatch(source).groupdict()) if found is None else found  # type: ignore[union-attr]


def local_files(source: str, key: str) -> list[Path] | None:
    """As `files`, but None for a hub data set, of which nothing is asked."""
    path = Path(source).expanduser()
    folder, colon, split = source.rpartition(":")
    if colon and not path.exists() and (root := Path(folder).expanduser()).is_dir():
        if split not in (splits := _splits(root)):
            raise UserError(f"{key}: the folder {root} has no split {split!r}. It has: {', '.join(splits) or 'none'}.")
        return splits[split]
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{key}: {path} is none of {', '.join(SUFFIXES)}.")
        return [path]
    if path.is_dir():
        if len(splits := _splits(path)) > 1:
            raise UserError(f"{key}: the folder {path} has several splits. Name one: {path}:{', '.join(splits)}.")
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not found:
            raise UserError(f"{key}: the folder {path} holds no {', '.join(SUFFIXES)} file.")
        return found
    if _HUB.fullmatch(source) is None or source.endswith(SUFFIXES):
        raise UserError(
            f"{key}: {source!r} does not exist (looked in {Path.cwd()}). "
            "Give a file, a folder, or a hub data set as owner/name@revision:split."
        )
    return None


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of a folder that is laid out as on the hub, and as zephyr.prepare writes it."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*-of-*.parquet")):
        if match := re.match(r"(\w+)-\d{5}-of-\d{5}", file.name):
            splits.setdefault(match[1], []).append(file)
    return splits


def _hub_files(key: str, source: str, id: str, revision: str | None, split: str | None) -> list[Path]:
    from huggingface_hub import snapshot_download

    wanted = [f"**{split}-*.parquet", f"**{split}.*", f"{split}.*"] if split else ["*.parquet", "*.jsonl", "*.json"]
    try:
        folder = Path(snapshot_download(id, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client has a dozen kinds, all of which mean: not to be had
        raise UserError(
            f"{key}: no local path and no reachable hub data set {source!r}: {reason(error)} "
            "Check the name and the network, or set HF_TOKEN where it is gated."
        ) from error
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith(SUFFIXES) and (split is None or re.match(rf"{split}\b", file.name))
    )
    if not found:
        raise UserError(f"{key}: the hub data set {id!r} has no file of split {split!r}.")
    return found


class Huge(NamedTuple):
    """In place of a line too long to be held."""

    size: int  # bytes


class Chunk(NamedTuple):
    """Some rows of a file, as they stand there: what a process that parses them is handed."""

    name: str  # of the file
    first: int  # number of the first line or row
    content: Any  # lines of JSON, rows of a JSON list, or a batch of a Parquet file
    position: int = 0  # bytes of the file that were read so far, as it stands on disk

    def rows(self) -> Iterator[Row | BadRow]:
        """Its rows, and in place of one that cannot be read, the mistake."""
        if not isinstance(self.content, list):
            yield from self._parquet_rows()
            return
        for number, item in enumerate(self.content, self.first):
            kind = "line" if isinstance(item, bytes | Huge) else "row"
            if not isinstance(item, bytes) or not item.isspace():
                where = f"{self.name} {kind} {number}"
                try:
                    yield where, _checked(_json(item, where) if kind == "line" else item, where)
                except BadRow as error:
                    yield error

    def _parquet_rows(self) -> Iterator[Row | BadRow]:
        try:
            rows = self.content.to_pylist()
        except ValueError:  # somewhere in it: bytes that are not UTF-8, a date that Python has not
            rows = None
        for number in range(self.content.num_rows):
            where = f"{self.name} row {self.first + number}"
            try:
                yield where, rows[number] if rows is not None else self.content.slice(number, 1).to_pylist()[0]
            except ValueError as error:
                yield BadRow(f"{where}: holds a value that cannot be read ({reason(error)}) Write the file again.")


def read(paths: list[Path]) -> Iterator[Row]:
    """Every row of the files. Raises BadRow at text that is not JSON, UserError when there is no row at all."""
    for chunk in chunks(paths):
        for row in chunk.rows():
            if isinstance(row, BadRow):
                raise row
            yield row


def chunks(paths: list[Path]) -> Iterator[Chunk]:
    """The files in pieces, in order; how they are cut depends on nothing but the files. Raises UserError at a damaged
    file, after the piece before the damage, and when there is no row at all."""
    empty = True
    for path in paths:
        for chunk in file_chunks(path, _CHUNK_ROWS, _CHUNK_BYTES):
            empty = empty and isinstance(chunk.content, list) and all(_blank(item) for item in chunk.content)
            yield chunk
    if empty:
        raise UserError(f"{paths[0]} is empty: it holds no row.")


def _blank(item: Any) -> bool:
    return isinstance(item, bytes) and item.isspace()


def file_chunks(path: Path, rows: int, size: int) -> Iterator[Chunk]:
    """A file in pieces of so many rows, or fewer from `size` bytes of lines on. Raises UserError at a damaged file,
    after the piece before the damage."""
    try:
        yield from _parquet_chunks(path, rows) if path.suffix == ".parquet" else _json_chunks(path, rows, size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or reason(error)}.") from error


def _parquet_chunks(path: Path, rows: int) -> Iterator[Chunk]:
    import pyarrow as pa  # 0.2 s, which a wrong path need not take
    import pyarrow.parquet as pq

    first = 1
    try:
        with path.open("rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as table:
            size = path.stat().st_size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=rows):
                yield Chunk(path.name, first, batch, round((first - 1 + batch.num_rows) * size))
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the file system's word, not Arrow's
            raise
        after = f" after row {first - 1}" if first > 1 else ""
        raise UserError(
            f"{path} is not a readable Parquet file{after}: {reason(error)} Download or write it again."
        ) from error


def _json_chunks(path: Path, rows: int, most: int) -> Iterator[Chunk]:
    first, lines, size = 1, [], 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            if ".jsonl" not in path.suffixes[-2:]:
                whole = _json(file.read(), path.name)
                if not isinstance(whole, list):
                    raise UserError(f"{path.name} must hold a JSON list of rows; for one row a line name it .jsonl.")
                for start in range(0, len(whole), rows):
                    part = whole[start : start + rows]
                    yield Chunk(path.name, start + 1, part, raw.tell() * (start + len(part)) // len(whole))
                return
            for line in _lines(file):
                lines.append(line)
                size += len(line)
                if len(lines) == rows or size >= most:
                    yield Chunk(path.name, first, lines, raw.tell())
                    first, lines, size = first + len(lines), [], 0
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if lines:
            yield Chunk(path.name, first, lines)
        raise UserError(f"{path} is not a complete gzip file: {reason(error)} Compress or copy it again.") from error
    if lines:
        yield Chunk(path.name, first, lines, path.stat().st_size)


def _lines(file: io.BufferedIOBase) -> Iterator[bytes | Huge]:
    while line := file.readline(_LINE_BYTES):
        if len(line) < _LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        size = len(line)
        while not line.endswith(b"\n") and (line := file.readline(1_000_000)):
            size += len(line)
        yield Huge(size)


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a row must be a JSON object, not {type(row).__name__}. Give it columns.")
    return row


def _json(text: bytes | Huge, where: str) -> Any:
    if isinstance(text, Huge):
        raise BadRow(f"{where}: has {text.size:,} bytes, above {_LINE_BYTES:,}. Write one JSON object a line.")
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02X} at {error.start}"
        raise BadRow(f"{where}: not UTF-8 ({byte}). Re-save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        if "\0" in error.doc:
            raise BadRow(f"{where}: holds NUL bytes, as after a crash or in UTF-16. Re-save it as UTF-8.") from error
        raise BadRow(f"{where}: invalid JSON ({error.msg} at column {error.colno}). {_WRITE_AGAIN}") from error
    except _Twice as error:
        raise BadRow(f"{where}: has the key {error} twice. Keep one of them.") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: JSON beyond what Python reads ({error}). {_WRITE_AGAIN}") from error


class _Twice(Exception):
    """A JSON object has a key twice, of which Python would take the last without a word."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise _Twice(next(repr(key) for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place])))
    return columns


def conversation(row: Row) -> list[Message]:
    """The conversation of an ultrachat_200k-like row (`messages`) or a raw UltraChat row (`data`)."""
    return checked_messages(*_dialogue(row))


def question(row: Row) -> tuple[list[Message], str | None]:
    """What of a row can be put to a model, ending with a user turn, and the answer that the row has, if any.

    Of a chat it is the first turns up to an answer, of a binarised pair the prompt and the chosen answer; else the
    text in the column `prompt` or `instruction`. Raises BadRow.
    """
    where, columns = row
    if {"messages", "data"} & set(columns):
        messages = conversation(row)
        end = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    elif {"chosen", "rejected"} <= set(columns):
        messages = sides(row)[0]
        end = len(messages) - 1
    else:
        text = columns.get("prompt", columns.get("instruction"))
        if not isinstance(text, str) or not text.strip():
            raise BadRow(
                f"{where}: a prompt is a text in the column prompt or instruction, or a chat in the column messages; "
                f"found {_names(columns)}."
            )
        messages, end = [{"role": "user", "content": text}], 1
    if end == 0 or messages[end - 1]["role"] != "user":
        raise BadRow(f"{where}: holds no user turn to answer.")
    return messages[:end], messages[end]["content"] if end < len(messages) else None


def turns(row: Row) -> list[Message]:
    """The same, in whatever order roles stand."""
    return checked_turns(*_dialogue(row))


def _dialogue(row: Row) -> tuple[Any, str, str]:
    where, columns = row
    if "messages" in columns:
        return columns["messages"], where, "messages"
    if "data" in columns:
        return _alternating(columns["data"], where), where, "data"
    hint = "Preference data trains with stage=dpo." if {"chosen", "completions"} & set(columns) else ""
    raise UserError(
        f"{where}: a chat needs the column messages (or data, as raw UltraChat has); "
        f"found {_names(columns)}. {hint}".rstrip()
    )


def preference(row: Row, seed: int) -> Preference | None:
    """The pair of a binarised row (`chosen`, `rejected`) or a raw UltraFeedback row (`completions`).

    Raw feedback is binarised as in Tunstall et al. (2023), section 4.2: chosen is the completion with the best mean
    score, rejected a random other one, drawn by `seed` and the instruction. None where fewer than two have a score,
    or the others say the same as the best.
    """
    where, columns = row
    if {"chosen", "rejected"} <= set(columns):
        return sides(row)
    if {"instruction", "completions"} <= set(columns):
        pair = binarise(row, _RULES, seed).pair
        return (pair["chosen"], pair["rejected"]) if pair else None
    hint = "Chats train with stage=sft." if {"messages", "data"} & set(columns) else ""
    raise UserError(
        f"{where}: stage=dpo needs the columns chosen and rejected (or instruction and completions, as raw "
        f"UltraFeedback has); found {_names(columns)}. {hint}".rstrip()
    )


def _alternating(value: Any, where: str) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(checked_list(value, where, "data"))
    ]


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "none"
