"""Rows from files or the hub, and what they say: conversations for SFT, preference pairs for DPO.

Sources: .jsonl, .json, .parquet (the first two also with .gz), a folder of them, or a hub data set
`owner/name[@revision][:split]`. The layout of a row is recognised by its columns.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.errors import UserError, reason

Message = dict[str, str]  # role (system, user or assistant) and content
Row = tuple[str, dict[str, Any]]  # where it stands ("file.jsonl line 7"), and its columns
Preference = tuple[list[Message], list[Message]]  # chosen and rejected; they differ in their last turn

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_CHUNK_ROWS, _CHUNK_BYTES = 256, 4_000_000  # of a piece of a file: a quarter of a second's tokenising
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(:(?P<split>\w+))?")
_ROLES = ("system", "user", "assistant")
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


class BadRow(UserError):
    """A row that cannot be used: where it stands, what is wrong with it, how to mend it."""


def files(source: str, key: str) -> list[Path]:
    """The files of a source; those of a hub data set are fetched (or taken from the hub's local cache).

    `key` is the configuration key that names the source, for messages. Raises UserError when there are none.
    """
    found = local_files(source, key)
    return _hub_files(key, source, **_HUB.fullmatch(source).groupdict()) if found is None else found  # type: ignore[union-attr]


def local_files(source: str, key: str) -> list[Path] | None:
    """As `files`, but None for a hub data set, of which nothing is asked."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{key}: {path} is none of {', '.join(SUFFIXES)}.")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"{key}: the folder {path} holds no {', '.join(SUFFIXES)} file.")
        return found
    if _HUB.fullmatch(source) is None or source.endswith(SUFFIXES):
        raise UserError(
            f"{key}: {source!r} does not exist (looked in {Path.cwd()}). "
            "Give a file, a folder, or a hub data set as owner/name@revision:split."
        )
    return None


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


class Chunk(NamedTuple):
    """Some rows of a file, as they stand there: what a process that parses them is handed."""

    name: str  # of the file
    first: int  # number of the first line or row
    content: Any  # lines of JSON, rows of a JSON list, or a batch of a Parquet file

    def rows(self) -> Iterator[Row]:
        """Its rows. Raises BadRow at text that is not JSON."""
        if not isinstance(self.content, list):
            for number, columns in enumerate(self.content.to_pylist(), self.first):
                yield f"{self.name} row {number}", columns
            return
        for number, item in enumerate(self.content, self.first):
            if not isinstance(item, bytes):
                yield (where := f"{self.name} row {number}"), _checked(item, where)
            elif not item.isspace():
                yield (where := f"{self.name} line {number}"), _checked(_json(item, where), where)


def read(paths: list[Path]) -> Iterator[Row]:
    """Every row of the files. Raises BadRow at text that is not JSON, UserError when there is no row at all."""
    for chunk in chunks(paths):
        yield from chunk.rows()


def chunks(paths: list[Path]) -> Iterator[Chunk]:
    """The files in pieces, in order; how they are cut depends on nothing but the files. Raises UserError at a damaged
    file, after the piece before the damage, and when there is no row at all."""
    empty = True
    for path in paths:
        for chunk in _file_chunks(path):
            empty = empty and isinstance(chunk.content, list) and all(_blank(item) for item in chunk.content)
            yield chunk
    if empty:
        raise UserError(f"{paths[0]} is empty: it holds no row.")


def _blank(item: Any) -> bool:
    return isinstance(item, bytes) and item.isspace()


def _file_chunks(path: Path) -> Iterator[Chunk]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq  # 0.2 s, which a wrong path need not take

        try:
            table = pq.ParquetFile(path)
        except Exception as error:
            raise UserError(f"{path} is not a readable Parquet file: {reason(error)}") from error
        first = 1
        for batch in table.iter_batches(batch_size=_CHUNK_ROWS):
            yield Chunk(path.name, first, batch)
            first += batch.num_rows
        return
    opener = gzip.open if path.suffix == ".gz" else open
    first, lines, size = 1, [], 0
    try:
        with opener(path, "rb") as file:
            if ".jsonl" not in path.suffixes[-2:]:
                rows = _json(file.read(), path.name)
                if not isinstance(rows, list):
                    raise UserError(f"{path.name} must hold a JSON list of rows; for one row a line name it .jsonl.")
                for start in range(0, len(rows), _CHUNK_ROWS):
                    yield Chunk(path.name, start + 1, rows[start : start + _CHUNK_ROWS])
                return
            for line in file:
                lines.append(line)
                size += len(line)
                if len(lines) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
                    yield Chunk(path.name, first, lines)
                    first, lines, size = first + len(lines), [], 0
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if lines:
            yield Chunk(path.name, first, lines)
        raise UserError(f"{path} is not a complete gzip file: {reason(error)} Compress or copy it again.") from error
    if lines:
        yield Chunk(path.name, first, lines)


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a row must be a JSON object, not {type(row).__name__}.")
    return row


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02X} at {error.start}"
        raise BadRow(f"{where}: not UTF-8 ({byte}). Re-save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"{where}: invalid JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: JSON beyond what Python reads ({error}).") from error


def conversation(row: Row) -> list[Message]:
    """The conversation of an ultrachat_200k-like row (`messages`) or a raw UltraChat row (`data`)."""
    where, columns = row
    if "messages" in columns:
        return _messages(columns["messages"], where, "messages")
    if "data" in columns:
        return _messages(_alternating(columns["data"], where), where, "data")
    hint = "Preference data trains with stage=dpo." if {"chosen", "completions"} & set(columns) else ""
    raise UserError(
        f"{where}: stage=sft needs the column messages (or data, as raw UltraChat has); "
        f"found {_names(columns)}. {hint}".rstrip()
    )


def preference(row: Row, seed: int) -> Preference | None:
    """The pair of a binarised row (`chosen`, `rejected`) or a raw UltraFeedback row (`completions`).

    Raw feedback is binarised as in Tunstall et al. (2023), section 4.2: chosen is the completion with the best mean
    score, rejected a random other one, drawn by `seed` and the instruction. None where fewer than two have a score.
    """
    where, columns = row
    if {"chosen", "rejected"} <= set(columns):
        prompt = columns.get("prompt")
        chosen, rejected = (_side(columns[side], prompt, where, side) for side in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise BadRow(f"{where}: chosen and rejected do not share one prompt; only their last turn may differ.")
        return chosen, rejected
    if {"instruction", "completions"} <= set(columns):
        return _binarise(columns, where, seed)
    hint = "Chats train with stage=sft." if {"messages", "data"} & set(columns) else ""
    raise UserError(
        f"{where}: stage=dpo needs the columns chosen and rejected (or instruction and completions, as raw "
        f"UltraFeedback has); found {_names(columns)}. {hint}".rstrip()
    )


def mean_score(completion: dict[str, Any]) -> float | None:
    """Mean of a completion's aspect ratings, N/A left out; without aspects its own mean or overall score."""
    annotations = completion.get("annotations") or {}
    ratings = [_number((annotations.get(aspect) or {}).get("Rating")) for aspect in _ASPECTS]
    known = [rating for rating in ratings if rating is not None]
    if known:
        return sum(known) / len(known)
    fine = _number(completion.get("fine-grained_score"))
    return fine if fine is not None else _number(completion.get("overall_score"))


def _binarise(columns: dict[str, Any], where: str, seed: int) -> Preference | None:
    scored = []
    for number, completion in enumerate(_list(columns["completions"], where, "completions")):
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise BadRow(f"{where}: completions[{number}].response is not a text.")
        try:
            score = mean_score(completion)
        except AttributeError as error:
            raise BadRow(f"{where}: completions[{number}].annotations must hold a Rating for each aspect.") from error
        if score is not None and completion["response"].strip():
            scored.append((score, completion["response"]))
    if len(scored) < 2:
        return None
    best = max(range(len(scored)), key=lambda i: scored[i][0])
    draw = random.Random(f"{seed} {columns['instruction']}")
    other = draw.choice([i for i in range(len(scored)) if i != best])
    prompt = _message("user", columns["instruction"], where, "instruction")
    return tuple([prompt, {"role": "assistant", "content": scored[i][1]}] for i in (best, other))  # type: ignore[return-value]


def _side(value: Any, prompt: Any, where: str, name: str) -> list[Message]:
    """One side of a pair: a whole conversation, or the completion of an explicit prompt (text or messages)."""
    if isinstance(value, str):
        if prompt is None:
            raise BadRow(f"{where}: {name} is a text, so the row needs a prompt.")
        start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(prompt, where, "prompt")
        return _messages([*start, {"role": "assistant", "content": value}], where, name)
    messages = _list(value, where, name)
    if isinstance(prompt, list) and len(messages) == 1:
        messages = [*prompt, *messages]
    return _messages(messages, where, name)


def _messages(value: Any, where: str, name: str) -> list[Message]:
    """Check a conversation: an optional system turn, then user and assistant in turn."""
    messages: list[Message] = []
    for number, message in enumerate(_list(value, where, name)):
        place = f"{name}[{number}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f"{where}: {place} must have the keys role and content.")
        role = message["role"]
        if role not in _ROLES:
            raise BadRow(f"{where}: {place}.role={role!r} is not one of {', '.join(_ROLES)}.")
        if role == "system" and number > 0:
            raise BadRow(f"{where}: {place}.role is 'system'; only the first message may be.")
        due = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role not in ("system", due):
            raise BadRow(f"{where}: {place}.role is {role!r} where {due!r} is due; join turns of one speaker.")
        messages.append(_message(role, message["content"], where, f"{place}.content"))
    if not messages:
        raise BadRow(f"{where}: {name} is empty.")
    return messages


def _message(role: str, content: Any, where: str, place: str) -> Message:
    if not isinstance(content, str):
        raise BadRow(f"{where}: {place} is {'null' if content is None else type(content).__name__}, not a text.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {place} holds half a character (a lone surrogate) at {error.start}.") from error
    return {"role": role, "content": content}


def _alternating(value: Any, where: str) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(_list(value, where, "data"))
    ]


def _list(value: Any, where: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{where}: {name} is {'null' if value is None else type(value).__name__}, not a list.")
    return value


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "none"
