"""The model's own answers to a fixed set of prompts, after every validation."""

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from transformers import PreTrainedTokenizerBase

from zephyr.data.render import Message
from zephyr.generate import generate


class Samples(Callback):
    """Answers conversations greedily and appends a row an answer to `path`; to Weights & Biases goes a table.

    Every conversation ends with a user turn. A row is `{"step", "prompt", "answer", "reference",
    "tokens"}`: the text of the last user turn, the answer, the reference answer or null, and the answer's
    length in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: list[list[Message]],
        max_new_tokens: int,
        path: Path,
        references: list[str] | None = None,
    ) -> None:
        self.tokenizer, self.conversations, self.max_new_tokens = tokenizer, conversations, max_new_tokens
        self.path = path
        self.references: list[str] | list[None] = references or [None] * len(conversations)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.conversations:
            return
        # Every rank generates, as a sharded model needs all of them; the first one writes.
        answers = generate(pl_module.policy, self.tokenizer, self.conversations, self.max_new_tokens)
        if not trainer.is_global_zero:
            return
        rows = [
            {
                "step": trainer.global_step,
                "prompt": conversation[-1]["content"],
                "answer": answer,
                "reference": reference,
                "tokens": len(self.tokenizer(answer, add_special_tokens=False).input_ids),
            }
            for conversation, answer, reference in zip(self.conversations, answers, self.references, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                table = [list(row.values()) for row in rows]
                logger.log_table("samples", columns=list(rows[0]), data=table, step=trainer.global_step)
