"""Feedback to ultrafeedback_binarized's layout: of several scored completions, one chosen and one rejected."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from zephyr.data.binarise import RULES, Rules, binarise, parse_rejected
from zephyr.data.messages import Row
from zephyr.data.overlap import Contamination
from zephyr.prepare import engine
from zephyr.prepare.settings import Feedback, job_of
from zephyr.prepare.ultrachat import MESSAGES, contamination
from zephyr.prepare.work import Outcome, Split
from zephyr.settings import build


def run(config: dict[str, Any]) -> Path:
    """The command. Raises UserError."""
    return engine.run(job(config))


def job(config: dict[str, Any]) -> engine.Job:
    """What a composed configuration asks for, to be run whole or in shares (engine.make_parts). Raises UserError."""
    settings = build(Feedback, config)
    return job_of(UltraFeedback(settings), settings, config, settings.decontaminate.files)


class UltraFeedback:
    """A record to its pair, or why it is left out."""

    rules: Sequence[str] = (*RULES, "contamination")
    splits: Sequence[Split] = (
        Split("train_prefs", "train"),
        Split("test_prefs", "test"),
        Split("train_sft", "train"),
        Split("test_sft", "test"),
        Split("train_gen", "train"),
        Split("test_gen", "test"),
    )
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("prompt_id", pa.string()),
            ("chosen", MESSAGES),
            ("rejected", MESSAGES),
            ("messages", MESSAGES),
            ("score_chosen", pa.float64()),
            ("score_rejected", pa.float64()),
        ]
    )

    def __init__(self, settings: Feedback) -> None:
        self.settings = settings
        rejected = parse_rejected(settings.rejected, "rejected")
        self.choice = Rules(settings.score, rejected, settings.ties, settings.truthful_qa)

    def __call__(self, row: Row) -> Outcome:
        """Raises BadRow at a structure that cannot be read, UserError at a file of something else."""
        found = binarise(row, self.choice, self.settings.seed)
        counts = Counter({f"fault/{name}": count for name, count in found.faults.items()})
        if found.pair is None:
            return Outcome(None, found.rule, found.evidence, counts)
        if self._contamination is not None and (met := self._contamination(found.pair["chosen"][:-1])) is not None:
            return Outcome(None, "contamination", ": ".join(met)[:80], counts)
        return Outcome(found.pair, None, "", counts)

    @cached_property
    def _contamination(self) -> Contamination | None:
        return contamination(self.settings.decontaminate.files, self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "choice": self.choice}
