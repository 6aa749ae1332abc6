"""Lightning data modules: a Lightning batch is one optimizer step, a list of packed micro-batches.

The loader yields every step of the run, across epochs. Which examples a step holds is a pure function of
(seed, step): epoch e visits the examples in the order drawn from seed + e, and a step takes the next `batch_size` of
them, also across the seam of two epochs. So the position in the data is one number, and resuming is exact.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from zephyr import settings
from zephyr.data import sources
from zephyr.data.batch import IDLE, Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.data.encode import Options
from zephyr.data.packing import deal, pack
from zephyr.data.render import Message, with_system
from zephyr.data.tokenised import Report, Table, tokenised_conversations, tokenised_pairs
from zephyr.errors import UserError

_log = logging.getLogger(__name__)


class Examples(ABC):
    """What a step counts: packed rows of conversations, or pairs."""

    unit: str
    lengths: Sequence[int]  # tokens of each example
    report: Report
    fill: float | None = None  # share of the packed rows that tokens take

    @abstractmethod
    def pack(self, examples: list[int]) -> Batch:
        """One packed row of these examples."""


class PackedConversations(Examples):
    """Conversations in rows of at most `max_length` tokens."""

    unit = "packed sequences"

    def __init__(self, table: Table, report: Report, max_length: int) -> None:
        self.table, self.report = table, report
        lengths = table.lengths("ids").tolist()
        self.rows = pack(lengths, max_length)
        self.lengths = [sum(lengths[i] for i in row) for row in self.rows]
        self.fill = sum(lengths) / (len(self.rows) * max_length)

    def pack(self, examples: list[int]) -> Batch:
        chosen = [conversation for example in examples for conversation in self.rows[example]]
        row = self.table.row
        return pack_conversations(Conversation(row("ids", i), [*map(bool, row("labels", i))]) for i in chosen)


class Pairs(Examples):
    """Preference pairs, each with its prompt once."""

    unit = "pairs"

    def __init__(self, table: Table, report: Report) -> None:
        self.table, self.report = table, report
        self.lengths = np.sum([table.lengths(name) for name in Pair._fields], 0).tolist()
        self.reference: np.ndarray | None = None  # [pairs, 2] log-probabilities of (chosen, rejected), precomputed

    def pack(self, examples: list[int]) -> Batch:
        row = self.table.row
        batch = pack_pairs([Pair(*(row(name, i) for name in Pair._fields)) for i in examples])
        if self.reference is None:
            return batch
        return batch._replace(reference=torch.from_numpy(self.reference[examples].T.reshape(-1)))


class Steps(Dataset[list[Batch]]):
    """One rank's part of the optimizer steps of a run: step s holds exactly `batch_size` examples over all ranks."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        micro_batch_tokens: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.examples, self.batch_size, self.micro_batch_tokens = examples, batch_size, micro_batch_tokens
        self.steps, self.seed, self.rank, self.ranks = steps, seed, rank, ranks
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        first = step * self.batch_size
        chosen = [self._example(position) for position in range(first, first + self.batch_size)]
        lengths = [self.examples.lengths[i] for i in chosen]
        hands = deal(lengths, self.micro_batch_tokens, self.ranks)
        own = [self.examples.pack([chosen[i] for i in members]) for members in hands[self.rank]]
        return own + [IDLE] * (max(map(len, hands)) - len(own))

    def _example(self, position: int) -> int:
        epoch, index = divmod(position, len(self.examples.lengths))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.examples.lengths), generator=generator).tolist()
        return self._order[1][index]


class MicroBatches(Dataset[list[Batch]]):
    """One rank's part of every example once, in micro-batches, as many as the others': what validation reads."""

    def __init__(self, examples: Examples, micro_batch_tokens: int, rank: int = 0, ranks: int = 1) -> None:
        self.examples = examples
        hands = deal(examples.lengths, micro_batch_tokens, ranks)
        self.members, self.count = hands[rank], max(map(len, hands))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Batch]:
        return [self.examples.pack(self.members[index]) if index < len(self.members) else IDLE]

    def with_members(self) -> Iterator[tuple[list[int], Batch]]:
        """Each micro-batch and which examples it holds."""
        for index in range(self.count):
            yield self.members[index] if index < len(self.members) else [], self[index][0]


class _From(Sampler[int]):
    """Steps start, start + 1, ...; its length stays the whole run's, which is how Lightning knows the last step."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


class _Ahead(DataLoader[list[Batch]]):
    """Packs the next step in a thread while this one trains.

    Worker processes do that too, but each tensor of each micro-batch then costs a file descriptor and its transfer:
    for 128 rows in micro-batches of one, as long as packing them here.
    """

    def __iter__(self) -> Iterator[list[Batch]]:  # type: ignore[override]
        batches = super().__iter__()
        return batches if self.num_workers else _ahead(batches)


def _ahead(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    with ThreadPoolExecutor(1, "packing") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class DataModule(L.LightningDataModule, ABC):
    """Training and validation examples as steps of exactly `batch_size` of them.

    Args:
        settings: where the examples come from and how they are cut, packed and counted.
        max_epochs: passes over the examples.
        max_steps: length of the run in optimizer steps, whatever `max_epochs` says; None leaves it to the epochs.
        seed: order of the examples.
        rank, ranks: which part of each step this process packs; together the ranks hold the same steps as one would.
    """

    def __init__(
        self,
        settings: settings.Data,
        tokenizer: PreTrainedTokenizerBase,
        max_epochs: float,
        max_steps: int | None,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        self.settings, self.tokenizer = settings, tokenizer
        self.max_epochs, self.max_steps, self.seed = max_epochs, max_steps, seed
        self.cache = Path(settings.cache).expanduser()
        self.rank, self.ranks = rank, ranks
        self.start_step = 0
        self.train: Examples
        self.validation: Examples | None = None

    @abstractmethod
    def examples(self, source: str, key: str) -> Examples:
        """Tokenise a source, or find it tokenised."""

    def load(self) -> None:
        """Read both sources. Raises UserError when they cannot fill one optimizer step."""
        for key in ("train", "validation"):  # both are there, before either is read
            if (source := getattr(self.settings, key)) is not None:
                sources.files(source, f"data.{key}")
        self.train = self._load("data.train", self.settings.train)
        if self.settings.validation is not None:
            self.validation = self._load("data.validation", self.settings.validation)
        if len(self.train.lengths) < self.settings.batch_size or self.total_steps == 0:
            raise UserError(
                f"data.train holds {len(self.train.lengths):,} {self.train.unit}, but one optimizer step takes "
                f"data.batch_size={self.settings.batch_size} (trainer.max_epochs={self.max_epochs:g}). "
                "Lower data.batch_size."
            )
        if self.settings.batch_size < self.ranks:
            raise UserError(
                f"data.batch_size={self.settings.batch_size} {self.train.unit} cannot be shared out to {self.ranks} "
                "processes. Raise it, or take fewer devices."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, counted after packing; a last step that would not be full is left out."""
        if self.max_steps is not None:
            return self.max_steps
        return int(len(self.train.lengths) * self.max_epochs) // self.settings.batch_size

    @property
    def fingerprints(self) -> dict[str, str]:
        """What identifies the tokenised data, by source."""
        loaded = {"train": self.train, "validation": self.validation}
        return {name: examples.report.fingerprint for name, examples in loaded.items() if examples is not None}

    @abstractmethod
    def exchange(self, row: sources.Row) -> list[Message]:
        """A short conversation of a row: it ends with an assistant turn, the answer to compare with."""

    def prompts(self, count: int, source: str | None = None) -> tuple[list[list[Message]], list[str | None]]:
        """The first `count` prompts of a source, each ending with a user turn, and their answers where it has any.

        None stands for the validation source, of which rows that cannot be used are passed over.
        """
        if count == 0 or (source or self.settings.validation) is None:
            return [], []
        prompts: list[list[Message]] = []
        answers: list[str | None] = []
        for prompt, answer in islice(self._questions(source), count):
            prompts.append(with_system(prompt, self.settings.system))
            answers.append(answer)
        return prompts, answers

    def _questions(self, source: str | None) -> Iterator[tuple[list[Message], str | None]]:
        if source is not None:
            yield from map(sources.question, sources.read(sources.files(source, "samples.prompts")))
            return
        assert self.settings.validation is not None
        for row in sources.read(sources.files(self.settings.validation, "data.validation")):
            try:
                *prompt, answer = self.exchange(row)
            except (UserError, ValueError):
                continue  # loading has counted it
            yield prompt, answer["content"]

    def train_dataloader(self) -> DataLoader[list[Batch]]:
        s = self.settings
        steps = Steps(
            self.train, s.batch_size, s.micro_batch_tokens, self.total_steps, self.seed, self.rank, self.ranks
        )
        return self._loader(steps, _From(self.start_step, len(steps)))

    def val_dataloader(self) -> DataLoader[list[Batch]] | list[Any]:
        if self.validation is None:
            return []
        batches = MicroBatches(self.validation, self.settings.micro_batch_tokens, self.rank, self.ranks)
        return self._loader(batches, _From(0, len(batches)))

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        consumed = self.trainer.global_step * self.settings.batch_size
        return {"epoch": consumed // len(self.train.lengths), "examples": consumed, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        batch_size = self.settings.batch_size
        if state_dict["seed"] != self.seed or state_dict["examples"] % batch_size:
            raise UserError(
                f"The checkpoint stands after {state_dict['examples']} examples in the order of seed "
                f"{state_dict['seed']}; data.batch_size={batch_size}, seed={self.seed} cannot go on from there."
            )
        self.start_step = state_dict["examples"] // batch_size

    def _load(self, key: str, source: str) -> Examples:
        examples = self.examples(source, key)
        filled = f", {examples.fill:.2%} full" if examples.fill else ""
        _log.info("%s: %s; %s %s%s", key, examples.report, f"{len(examples.lengths):,}", examples.unit, filled)
        return examples

    def _loader(self, dataset: Dataset[list[Batch]], sampler: Sampler[int]) -> DataLoader[list[Batch]]:
        return _Ahead(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.settings.workers,
            generator=torch.Generator(),  # or making an iterator would draw from the run's random state
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )


class ChatData(DataModule):
    """Conversations for SFT, packed whole into rows of at most `max_length` tokens; a step counts rows."""

    settings: settings.ChatData

    def exchange(self, row: sources.Row) -> list[Message]:
        messages = sources.conversation(row)
        roles = [message["role"] for message in messages]
        return messages[: roles.index("assistant") + 1]

    def examples(self, source: str, key: str) -> PackedConversations:
        s = self.settings
        options = Options(s.max_length, 0, s.loss_on == "all", s.system, 0, s.bad_rows == "drop")
        table, report = tokenised_conversations(source, key, self.tokenizer, options, self.cache)
        return PackedConversations(table, report, s.max_length)


class PreferenceData(DataModule):
    """Preference pairs for DPO; see zephyr.data.render.truncate_pair for what the two lengths mean."""

    settings: settings.PreferenceData

    def exchange(self, row: sources.Row) -> list[Message]:
        pair = sources.preference(row, self.seed)
        return pair[0] if pair else []

    def examples(self, source: str, key: str) -> Pairs:
        s = self.settings
        options = Options(s.max_length, s.max_prompt_length, False, s.system, self.seed, s.bad_rows == "drop")
        table, report = tokenised_pairs(source, key, self.tokenizer, options, self.cache)
        return Pairs(table, report)
