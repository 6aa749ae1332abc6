"""The model's own answers to a fixed set of prompts as it trains, and what can be said of them without a judge."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from zephyr.checkpoints.randomness import random_state, set_random_state
from zephyr.data.batch import Batch, Conversation, pack_conversations
from zephyr.data.render import Message
from zephyr.generation.generate import Answer, answer, evaluating
from zephyr.models.logps import sequence_sums, token_logps
from zephyr.observe.throughput import Throughput

Scorer = Callable[[list[Message], str], float | None]  # (conversation, answer) -> what it is worth; None: no telling
NGRAM = 4


class Samples(Callback):
    """Answers conversations greedily after every validation and, where asked for, every so many steps.

    Every conversation ends with a user turn. A row an answer is appended to `path`, and put into a table of Weights &
    Biases: "step"; "prompt", the last user turn; "answer"; "reference", an answer to compare with, or null; and

        tokens     its length, without the end-of-turn token
        ended      1 if the model ended it, 0 if it was stopped
        repeated   share of its 4-grams of tokens that stood in it before, 0 if it has none
        logp       mean log-probability of its tokens and its end under the policy, in nats a token
        reward     its implicit reward, beta (log pi - log pi_ref), in nats; only with `beta`
        score      what `scorer` says of it; only with one

    The means of these are the metrics `samples/...`. Training goes on as if nothing had been asked: modes and random
    states are those of before.

    Args:
        every_n_steps: optimizer steps between two sets of answers besides those at validations, the last step among
            them; None: at validations only.
        beta: of the implicit reward; None where the policy's reference is not at hand.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: list[list[Message]],
        max_new_tokens: int,
        path: Path,
        references: list[str | None] | None = None,
        every_n_steps: int | None = None,
        beta: float | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        self.tokenizer, self.conversations, self.max_new_tokens = tokenizer, conversations, max_new_tokens
        self.path, self.every_n_steps, self.beta, self.scorer = path, every_n_steps, beta, scorer
        self.references = references or [None] * len(conversations)
        self._sampled = -1  # the last step with answers

    def state_dict(self) -> dict[str, Any]:
        return {"sampled": self._sampled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sampled = state_dict["sampled"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps is not None and trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        if self.every_n_steps is not None and (trainer.global_step % self.every_n_steps == 0 or trainer.is_last_batch):
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.conversations or self._sampled == trainer.global_step:
            return
        self._sampled = trainer.global_step
        # A sharded model needs every process; any other answers on the first one alone.
        if not trainer.is_global_zero and not _is_sharded(module.policy):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.stop()
        with _undisturbed(), torch.no_grad():
            found = self._rows(trainer, module)
        if trainer.is_global_zero:
            self._write(trainer, found)

    def _rows(self, trainer: L.Trainer, module: Any) -> list[dict[str, Any]]:
        rows = []
        answers = answer(module.policy, self.tokenizer, self.conversations, self.max_new_tokens)
        for conversation, found, reference in zip(self.conversations, answers, self.references, strict=True):
            row: dict[str, Any] = {
                "step": trainer.global_step,
                "prompt": conversation[-1]["content"],
                "answer": found.text,
                "reference": reference,
                "tokens": len(found.tokens),
                "ended": int(found.end is not None),
                "repeated": repeated(found.tokens),
            }
            with evaluating(module.policy), trainer.precision_plugin.val_step_context():
                row |= self._likelihood(module, found)
            if self.scorer is not None:
                row["score"] = self.scorer(conversation, found.text)
            rows.append(row)
        return rows

    def _likelihood(self, module: Any, found: Answer) -> dict[str, float]:
        tokens = found.tokens + ([] if found.end is None else [found.end])
        labels = [False] * len(found.prompt) + [True] * len(tokens)
        batch = pack_conversations([Conversation(found.prompt + tokens, labels)]).to(module.device)
        logp = float(_total(module.policy, batch))
        row = {"logp": logp / len(tokens)}
        if self.beta is not None:
            row["reward"] = self.beta * (logp - float(module.reference.logps(module.policy, batch, _total)))
        return row

    def _write(self, trainer: L.Trainer, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        values = {name: [row[name] for row in rows if row[name] is not None] for name in [*rows[0]][4:]}
        means = {f"samples/{name}": fmean(numbers) for name, numbers in values.items() if numbers}
        for logger in trainer.loggers:
            logger.log_metrics(means, trainer.global_step)
            if isinstance(logger, WandbLogger):
                table = [list(row.values()) for row in rows]
                logger.log_table("samples", columns=list(rows[0]), data=table, step=trainer.global_step)


def repeated(tokens: list[int]) -> float:
    """The share of a text's 4-grams that stood in it before; 0 for one without any."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _total(model: Any, batch: Batch) -> Tensor:
    """Log-probability of the one answer, [1], in nats."""
    return sequence_sums(token_logps(model, batch), batch, 1)


def _is_sharded(policy: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What draws random numbers inside leaves none fewer to what comes after."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
