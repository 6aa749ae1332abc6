"""Every key of a run, with its type and unit: the door between the configuration and the program.

`parse` turns the resolved configuration (plain dictionaries) into these objects, and refuses unknown keys, missing
keys, wrong types and impossible values by name. There are no defaults here: they live in conf/. Nothing heavy is
imported, so a mistake is answered in well under a second.
"""

import difflib
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from zephyr.errors import UserError


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al., 2022): W + (alpha / rank) B A."""

    rank: int
    alpha: float
    dropout: float  # probability; DPO trains without, whatever it says here
    target_modules: list[str]  # names of linear layers, e.g. q_proj


@dataclass(frozen=True)
class Model:
    """The policy."""

    path: str | None  # folder or hub id to start from; null: the base for SFT, the SFT output for DPO
    revision: str | None  # of path, a hub commit
    base: str  # the raw language model of the recipe
    base_revision: str | None
    lora: Lora | None  # train an adapter in place of all weights
    quantization: Literal["nf4"] | None  # frozen base weights in 4 bits; needs lora
    activation_checkpointing: bool  # recompute each layer in the backward pass: less memory, a third more time

    def __post_init__(self) -> None:
        if self.quantization and self.lora is None:
            raise UserError("model.quantization=nf4 cannot be trained in full: set model.lora, or quantization=null.")


@dataclass(frozen=True)
class Data:
    """Where the examples come from and how they are cut, packed and counted."""

    train: str  # file, folder, or hub data set owner/name@revision:split
    validation: str | None
    max_length: int  # tokens of a packed row (sft), or of a prompt and one completion (dpo)
    batch_size: int  # packed rows (sft) or pairs (dpo) of one optimizer step, over all ranks and micro-batches
    micro_batch_tokens: int  # most tokens the model sees at once
    system: str | None  # system turn of conversations that have none; null adds none
    bad_rows: Literal["error", "drop"]  # what to do with a row that cannot be used
    workers: int  # processes that pack ahead of the training loop; 0 packs in it
    cache: str  # folder of tokenised data

    def __post_init__(self) -> None:
        for key in ("max_length", "batch_size", "micro_batch_tokens"):
            _at_least(f"data.{key}", getattr(self, key), 1)
        _at_least("data.workers", self.workers, 0)
        for key in ("train", "validation"):
            if getattr(self, key) == "":
                raise UserError(f"data.{key} is empty: give a file, a folder or a hub data set.")


@dataclass(frozen=True)
class ChatData(Data):
    """Conversations for SFT."""

    loss_on: Literal["assistant", "all"]  # which tokens are scored


@dataclass(frozen=True)
class PreferenceData(Data):
    """Pairs for DPO."""

    max_prompt_length: int  # tokens a prompt keeps, from its end, when a pair is too long

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_prompt_length < self.max_length:
            raise UserError(
                f"data.max_prompt_length={self.max_prompt_length} must lie between 1 and data.max_length="
                f"{self.max_length}: a completion needs room behind the prompt."
            )


@dataclass(frozen=True)
class Objective:
    """The preference loss."""

    name: Literal["sigmoid"]
    beta: float  # pull towards the reference

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"objective.beta must be above 0, got {self.beta:g}: at 0 nothing is learned. Zephyr used 0.1.")


@dataclass(frozen=True)
class Optimizer:
    """How the policy is stepped."""

    name: Literal["adamw", "paged_adamw_32bit"]
    lr: float  # peak
    betas: list[float]
    eps: float
    weight_decay: float  # on matrices; norms and biases are never decayed
    schedule: Literal["cosine", "linear", "constant_with_warmup"]  # after the warm-up
    warmup_ratio: float  # share of all optimizer steps
    max_grad_norm: float | None  # clip the gradient's global L2 norm

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optimizer.lr must be above 0, got {self.lr:g}.")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"optimizer.warmup_ratio is a share of all steps, in [0, 1); got {self.warmup_ratio:g}.")
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas must be two numbers, got {self.betas}.")


@dataclass(frozen=True)
class Trainer:
    """Where and how long."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Literal[1]
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    max_epochs: float  # passes over the examples
    max_steps: int | None  # optimizer steps; when given it sets the length in place of max_epochs
    log_every_n_steps: int
    eval_every_n_steps: int | None  # validation, besides the first and the last step; null: only these
    threads: int | None  # CPU threads; null leaves it to torch

    def __post_init__(self) -> None:
        _at_least("trainer.log_every_n_steps", self.log_every_n_steps, 1)
        for key in ("max_steps", "eval_every_n_steps"):
            if getattr(self, key) is not None:
                _at_least(f"trainer.{key}", getattr(self, key), 1)
        if self.max_epochs <= 0:
            raise UserError(f"trainer.max_epochs must be above 0, got {self.max_epochs:g}.")


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints of a run, from which resume goes on."""

    every_n_steps: int  # optimizer steps; the last step is always saved
    keep: int  # the newest ones; older ones are deleted

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_n_steps", self.every_n_steps, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True)
class Samples:
    """Answers to fixed validation prompts, at every validation."""

    count: int  # prompts; 0 turns it off
    max_new_tokens: int


@dataclass(frozen=True)
class Wandb:
    """A W&B run: offline unless logged in."""

    project: str
    group: str | None
    name: str
    tags: list[str]


@dataclass(frozen=True)
class Settings:
    """One run."""

    recipe: str
    stage: Literal["sft", "dpo"]
    seed: int  # order of the examples, new weights, dropout
    output_dir: str
    resume: str | None  # auto: go on from the newest valid checkpoint of output_dir, if any; or a checkpoint folder
    model: Model
    data: ChatData | PreferenceData
    objective: Objective | None  # dpo only
    optimizer: Optimizer
    trainer: Trainer
    checkpoint: Checkpoint
    samples: Samples
    logger: Wandb | None


def parse(config: dict[str, Any]) -> Settings:
    """Check a resolved configuration and turn it into settings. Raises UserError at the first mistake."""
    stage = config.get("stage")
    data = PreferenceData if stage == "dpo" else ChatData
    if stage == "sft":
        config = {**config, "objective": None}
    return typing.cast(Settings, _build(Settings, config, "", {"data": data}))


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """A hint at the most similar name, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _build(kind: Any, values: Any, where: str, narrowed: dict[str, Any] | None = None) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a group of keys, got {values!r}.")
    names = [field.name for field in fields(kind)]
    for key in values:
        if key not in names:
            raise UserError(f"{where or 'The configuration'} has no key {key!r}.{nearest(key, names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"{_dotted(where, missing[0])} is not set.")
    hints = typing.get_type_hints(kind) | (narrowed or {})
    return kind(**{name: _value(hints[name], values[name], _dotted(where, name)) for name in names})


def _value(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) in (types.UnionType, typing.Union):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None and type(None) in get_args(kind):
            return None
        kind = options[0]
    if is_dataclass(kind):
        return _build(kind, value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {value!r}.")
        return [_value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise UserError(f"{where} must be one of {choices}; got {value!r}.{nearest(str(value), choices.split(', '))}")
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where} must be {_SPOKEN[kind]}, got {value!r}.")
    return value


_SPOKEN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _at_least(where: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{where} must be at least {least}, got {value}.")
