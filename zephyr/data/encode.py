"""Rows to token ids and labels at the speed of the Rust tokenizer: in this process, or in one for each CPU core.

Imports neither torch nor transformers: each process starts as a fresh interpreter, in a fraction of a second.
"""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from zephyr.data import sources
from zephyr.data.pool import cores as cores
from zephyr.data.pool import ordered
from zephyr.data.sources import Message
from zephyr.errors import UserError

Ids = np.ndarray  # [tokens] int32
_AT_ONCE = 256  # rows the tokenizer gets at once (200 bytes a token); by 32 it takes a tenth longer
_POOL_FROM = 16  # chunks; fewer are done here before processes have started
_LOST = (
    "A process that tokenises the data was killed, perhaps for want of memory. Free some, or let the run "
    "have fewer CPU cores (taskset)."
)


class Options(NamedTuple):
    """What decides the tokens of a row, apart from its text and the tokenizer."""

    max_length: int  # tokens of a conversation, or of a prompt and one completion
    max_prompt_length: int  # tokens a prompt keeps when a pair is too long (pairs only)
    all_tokens: bool  # score every token, not the assistant's alone (conversations only)
    system: str | None  # system turn of conversations that have none; None adds no turn
    seed: int  # draws the rejected completion of raw feedback
    drop_bad_rows: bool  # count and drop rows that cannot be used; otherwise the first one is an error


class Format(NamedTuple):
    """A tokenizer and Zephyr's chat format in it, as another process can be told it."""

    tokenizer: str  # tokenizer.json
    split_special_tokens: bool
    eos: str
    forbidden: tuple[str, ...]  # what no message may contain

    def encoder(self) -> "Encoder":
        """Ready to encode."""
        tokenizer = Tokenizer.from_str(self.tokenizer)
        return Encoder(tokenizer, self.split_special_tokens, self.eos, self.forbidden)


class Encoder:
    """Conversations to tokens.

    The text is that of chat.jinja, put together here, as Jinja would take longer than the tokenizer does; the tests
    hold the two equal on any text.
    """

    def __init__(self, tokenizer: Tokenizer, split_special_tokens: bool, eos: str, forbidden: Sequence[str]) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = split_special_tokens
        self.tokenizer, self.eos, self.forbidden = tokenizer, eos, tuple(forbidden)
        self._first = tuple({token[0] for token in forbidden})

    def forges(self, text: str) -> bool:
        """Whether a message contains what only the format may write."""
        return any(first in text for first in self._first) and any(token in text for token in self.forbidden)

    def text(self, messages: Sequence[Message], opening: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and where in it the assistant's turns are, in characters; `opening` adds the
        header of an assistant's turn to come."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for message in messages:
            header, body = f"<|{message['role']}|>\n", message["content"]
            if self.forges(body):
                for token in self.forbidden:
                    body = body.replace(token, f"{token[0]} {token[1:]}")
            body += self.eos
            start = length + len(header)
            length = start + len(body) + 1
            if message["role"] == "assistant":
                spans.append((start, length - 1))
            parts += header, body, "\n"
        if opening:
            parts.append("<|assistant|>\n")
        return "".join(parts), spans

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Tokens of rendered texts; nothing is added to them."""
        return self.tokenizer.encode_batch(texts, add_special_tokens=False)


def spoken(encoding: Encoding, spans: list[tuple[int, int]]) -> np.ndarray:
    """[tokens] uint8: 1 where a token holds a character of these spans, by position, as transformers reckons it."""
    labels = np.zeros(len(encoding), np.uint8)
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None:
            break
        labels[first : last + 1 if last else None] = 1
    return labels


def with_system(messages: list[Message], text: str | None) -> list[Message]:
    """The conversation with a system turn of this text in front, unless it has one or the text is None."""
    if text is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def completion(prompt: list[int], whole: list[int], labels: np.ndarray) -> list[int] | None:
    """What the last assistant's turn adds to its prompt, its end included; None if the prompt is not its beginning."""
    labelled = labels.nonzero()[0]
    end = int(labelled[-1]) + 1 if len(labelled) else 0
    if whole[: len(prompt)] != prompt or end <= len(prompt):
        return None
    return whole[len(prompt) : end]


def shortened(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int], list[int]]:
    """A pair whose longer side exceeds `max_length` tokens, cut the same way on both sides.

    First the prompt keeps its last `max_prompt_length` tokens, then both completions keep their first tokens, as many
    as fit. The order is that of the original recipe; unlike it, a short prompt leaves its room to the completions.
    """
    if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return prompt, chosen, rejected
    prompt = prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


class Encoded(NamedTuple):
    """What a chunk of rows came to."""

    columns: list[tuple[np.ndarray, np.ndarray]]  # lengths of the kept rows [rows], and their entries one after another
    counts: Counter[str]  # rows, truncated, tokens_cut, escaped, tokens
    dropped: Counter[str]  # rows by reason


class Rows(ABC):
    """Turns chunks of rows into columns of numbers."""

    columns: ClassVar[dict[str, Any]]  # name -> dtype

    def __init__(self, encoder: Encoder, options: Options, at_once: int) -> None:
        self.encoder, self.options, self.at_once = encoder, options, at_once

    def __call__(self, chunk: sources.Chunk) -> Encoded:
        """Raises UserError at the first row that cannot be used, unless those are to be dropped."""
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        usable = self._usable(chunk)
        kept: list[tuple[np.ndarray, ...]] = []
        while parsed := list(islice(usable, self.at_once)):
            kept += self.tokenise(parsed)
        columns = []
        for place, dtype in enumerate(self.columns.values()):
            entries = [row[place] for row in kept]
            lengths = np.fromiter(map(len, entries), np.int32, len(entries))
            columns.append((lengths, np.concatenate(entries) if entries else np.empty(0, dtype)))
        return Encoded(columns, self.counts, self.dropped)

    @abstractmethod
    def parse(self, row: sources.Row) -> Any:
        """What a row says, or why it is left out."""

    @abstractmethod
    def tokenise(self, parsed: list[Any]) -> Iterator[tuple[np.ndarray, ...]]:
        """The columns of each parsed row that can be trained on."""

    def _usable(self, chunk: sources.Chunk) -> Iterator[Any]:
        for row in chunk.rows():
            self.counts["rows"] += 1
            try:
                if isinstance(row, sources.BadRow):
                    raise row
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

    def _finished(self, messages: list[Message]) -> list[Message]:
        self.counts["escaped"] += sum(self.encoder.forges(message["content"]) for message in messages)
        return with_system(messages, self.options.system)

    def _count_cut(self, before: int, after: int) -> None:
        self.counts["truncated"] += before > after
        self.counts["tokens_cut"] += before - after
        self.counts["tokens"] += after


class ConversationRows(Rows):
    """Conversations: their tokens, and which of them are scored."""

    columns: ClassVar = {"ids": np.int32, "labels": np.uint8}

    def parse(self, row: sources.Row) -> list[Message] | str:
        """Its messages."""
        messages = sources.conversation(row)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            return "no assistant turn"
        if not all(text.strip() for text in answers):
            return "empty assistant turn"
        return self._finished(messages)

    def tokenise(self, parsed: list[list[Message]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Ids and labels, cut to length."""
        texts, spans = zip(*map(self.encoder.text, parsed), strict=True)
        for encoding, assistant in zip(self.encoder.encode(list(texts)), spans, strict=True):
            tokens, most = len(encoding), self.options.max_length
            labels = np.ones(tokens, np.uint8) if self.options.all_tokens else spoken(encoding, assistant)
            labels = labels[:most]
            if not labels[1:].any():
                self.dropped["no scored token within max_length"] += 1
                continue
            self._count_cut(tokens, len(labels))
            yield np.array(encoding.ids[:most], np.int32), labels


class PairRows(Rows):
    """Preference pairs: the tokens of the prompt and of either completion."""

    columns: ClassVar = {"prompt": np.int32, "chosen": np.int32, "rejected": np.int32}

    def parse(self, row: sources.Row) -> sources.Preference | str:
        """Its two conversations."""
        pair = sources.preference(row, self.options.seed)
        if pair is None:
            return "fewer than two different scored completions"
        chosen, rejected = pair
        if not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip():
            return "empty completion"
        if chosen == rejected:
            return "identical completions"
        return self._finished(chosen), self._finished(rejected)

    def tokenise(self, parsed: list[sources.Preference]) -> Iterator[tuple[np.ndarray, ...]]:
        """Prompt, chosen and rejected, cut to length."""
        for whole in split_pairs(self.encoder, parsed):
            if whole is None:
                self.dropped["prompt is not a token prefix of its completions"] += 1
                continue
            cut = shortened(*whole, self.options.max_length, self.options.max_prompt_length)
            if cut[1] == cut[2]:
                self.dropped["completions identical within max_length"] += 1
                continue
            self._count_cut(sum(map(len, whole)), sum(map(len, cut)))
            yield tuple(np.array(part, np.int32) for part in cut)


def split_pairs(
    encoder: Encoder, pairs: Sequence[sources.Preference]
) -> Iterator[tuple[list[int], list[int], list[int]] | None]:
    """The tokens of prompt, chosen and rejected of each pair; see zephyr.data.render.render_pairs."""
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for chosen, rejected in pairs:
        for messages, opening in ((chosen[:-1], True), (chosen, False), (rejected, False)):
            text, assistant = encoder.text(messages, opening)
            texts.append(text)
            spans.append(assistant)
    encodings = encoder.encode(texts)
    for first in range(0, len(texts), 3):
        prompt = encodings[first].ids
        sides = [
            completion(prompt, encodings[side].ids, spoken(encodings[side], spans[side]))
            for side in (first + 1, first + 2)
        ]
        yield None if sides[0] is None or sides[1] is None else (prompt, sides[0], sides[1])


def encoded(
    chunks: Iterable[sources.Chunk], kind: type[Rows], form: Format, options: Options, processes: int
) -> Generator[Encoded, None, None]:
    """Each chunk encoded, in order, whatever the number of processes; a few chunks are done in this one.

    No more than two chunks a process are in memory. What goes wrong is raised where it would be with one process.
    """
    waiting = iter(chunks)
    first: list[sources.Chunk] = []
    failure: Exception | None = None
    if processes > 1:
        try:
            first += islice(waiting, _POOL_FROM)
        except Exception as error:  # a damaged file: what was read of it comes before
            failure = error
    if len(first) == _POOL_FROM and failure is None:
        yield from ordered(partial(_alone, kind, form, options), chain(first, waiting), processes, _LOST)
        return
    rows = kind(form.encoder(), options, at_once=_AT_ONCE * 2)  # the tokenizer itself takes every core
    yield from map(rows, chain(first, waiting))
    if failure is not None:
        raise failure


def _alone(kind: type[Rows], form: Format, options: Options) -> Rows:
    """What encodes in a process of the pool."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    return kind(form.encoder(), options, _AT_ONCE)
