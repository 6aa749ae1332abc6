"""Raw dialogues to ultrachat_200k's layout: filtered, truecased, apart from evaluation prompts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from zephyr.data.filters import RULES
from zephyr.data.messages import Message, Row
from zephyr.data.overlap import Contamination, Signatures
from zephyr.data.sources import turns
from zephyr.data.truecase import Truecaser, default, load
from zephyr.data.truecase.mending import applied
from zephyr.prepare import engine
from zephyr.prepare.settings import Dialogues, job_of
from zephyr.prepare.work import Change, Outcome, Split
from zephyr.settings import build

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
_AROUND = 40  # characters of an example on either side of a change


def run(config: dict[str, Any]) -> Path:
    """The command. Raises UserError."""
    return engine.run(job(config))


def job(config: dict[str, Any]) -> engine.Job:
    """What a composed configuration asks for, to be run whole or in shares (engine.make_parts). Raises UserError."""
    settings = build(Dialogues, config)
    near = settings.near_duplicates
    files = [settings.truecase, *settings.decontaminate.files]
    return job_of(UltraChat(settings), settings, config, files, None if near is None else near.threshold)


class UltraChat:
    """A dialogue to its row, or why it is left out."""

    rules: Sequence[str] = (*RULES, "contamination")
    splits: Sequence[Split] = (
        Split("train_sft", "train"),
        Split("test_sft", "test"),
        Split("train_gen", "train", cut=True),
        Split("test_gen", "test", cut=True),
    )
    schema = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", MESSAGES)])

    def __init__(self, settings: Dialogues) -> None:
        self.settings = settings

    def __call__(self, row: Row) -> Outcome:
        """Raises BadRow where it is no dialogue at all, UserError where no row of its file can be one."""
        messages = turns(row)
        counts = Counter(f"messages/{message['role']}" for message in messages)
        met = self.settings.filters(messages) or self._contaminated(messages)
        if met is not None:
            return Outcome(None, *met, counts)
        changes: list[Change] = []
        if self._truecaser is not None:
            messages = [self._truecased(message, counts, changes) for message in messages]
        prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
        record = {"prompt": prompt, "prompt_id": prompt_id(prompt), "messages": messages}
        if self._signatures is None:
            return Outcome(record, None, "", counts, changes)
        signature = self._signatures.of(messages)
        return Outcome(record, None, "", counts, changes, self._signatures.bands(signature), signature)

    def _truecased(self, message: Message, counts: Counter[str], changes: list[Change]) -> Message:
        assert self._truecaser is not None
        text, role = message["content"], message["role"]
        faults = self._truecaser.faults(text) if role in self.settings.truecase_roles else []
        if not faults:
            return message
        counts[f"truecased/{role}"] += 1
        counts.update(f"truecased/{role}/{fault.kind}" for fault in faults)
        mended = applied(text, faults)
        first = faults[0]
        place = slice(max(0, first.start - _AROUND), first.start + len(first.before) + _AROUND)
        changes.append(Change(f"{role}/{first.kind}", text[place], mended[place]))
        return {"role": role, "content": mended}

    def _contaminated(self, messages: list[Message]) -> tuple[str, str] | None:
        if self._contamination is None or (found := self._contamination(messages)) is None:
            return None
        return "contamination", ": ".join(found)[:80]

    # Tables stay out of what is sent to processes, each of which makes its own.

    @cached_property
    def _truecaser(self) -> Truecaser | None:
        table = self.settings.truecase
        if table is None:
            return None
        return default() if table == "default" else Truecaser(load(table))

    @cached_property
    def _contamination(self) -> Contamination | None:
        return contamination(self.settings.decontaminate.files, self.settings)

    @cached_property
    def _signatures(self) -> Signatures | None:
        near = self.settings.near_duplicates
        return None if near is None else Signatures(near.threshold, near.permutations, near.run, self.settings.seed)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}


def contamination(files: Sequence[str], settings: Any) -> Contamination | None:
    """What tells evaluation prompts, of settings with files of them."""
    return Contamination(files, settings.decontaminate.n, settings.decontaminate.common) if files else None


def prompt_id(prompt: str) -> str:
    """SHA-256 of a prompt, in hexadecimal digits: what the published data sets name prompts by."""
    return hashlib.sha256(prompt.encode()).hexdigest()
