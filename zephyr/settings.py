"""Every key of a run, with its type and unit: the door between the configuration and the program.

`parse` turns the resolved configuration (plain dictionaries) into these objects, and refuses unknown keys, missing
keys, wrong types and impossible values by name. There are no defaults here: they live in conf/. Nothing heavy is
imported, so a mistake is answered in well under a second.
"""

import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from zephyr.errors import UserError

T = typing.TypeVar("T")


class Must(typing.NamedTuple):
    """What a value must be, in words and as a test."""

    be: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Must("at least 1", lambda value: value >= 1)]
Natural = Annotated[int, Must("at least 0", lambda value: value >= 0)]
Decay = Annotated[float, Must("at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Must("above 0", lambda value: value > 0)]
Share = Annotated[float, Must("in [0, 1)", lambda value: 0 <= value < 1)]
Portion = Annotated[float, Must("in [0, 1]", lambda value: 0 <= value <= 1)]
Seed = Annotated[int, Must("in [0, 2^32)", lambda value: 0 <= value < 2**32)]
Text = Annotated[str, Must("a text that is not empty", bool)]
Names = Annotated[list[Text], Must("all-linear or a list of names", bool)]


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al., 2022): W + (alpha / rank) B A."""

    rank: Count
    alpha: Positive
    dropout: Share  # probability; DPO trains without, whatever it says here
    target_modules: Literal["all-linear"] | Names  # linear layers, e.g. q_proj; all-linear: all but the head
    dora: bool  # learn each column's length apart (Liu et al., 2024)
    rslora: bool  # scale by alpha / sqrt(rank) (Kalajdzievski, 2023)


@dataclass(frozen=True)
class Model:
    """The policy."""

    path: Text | None  # folder or hub id to start from; null: the base for SFT, the SFT output for DPO
    revision: str | None  # of path, a hub commit
    base: Text  # the raw language model of the recipe
    base_revision: str | None
    lora: Lora | None  # train an adapter in place of all weights
    quantization: Literal["nf4"] | None  # frozen base weights in 4 bits; needs lora
    double_quantization: bool  # quantise the 4-bit blocks' scales too: 0.4 bits a weight less
    float8: bool  # matrix products in 8-bit floating point, on Ada, Hopper and later GPUs
    # recompute in the backward pass: each layer in full (a third more time), or what is elementwise in it (nearly free)
    activation_checkpointing: Literal["none", "full", "selective"]

    def __post_init__(self) -> None:
        if self.quantization and self.lora is None:
            raise UserError("model.quantization=nf4 cannot be trained in full: set model.lora, or quantization=null.")
        if self.quantization and self.float8:
            raise UserError(
                "model.float8=true and model.quantization exclude each other: 4-bit weights compute in bf16."
            )


@dataclass(frozen=True)
class Data:
    """Where the examples come from and how they are cut, packed and counted."""

    train: Text  # file, folder, or hub data set owner/name@revision:split
    validation: Text | None
    max_length: Count  # tokens of a packed row (sft), or of a prompt and one completion (dpo)
    batch_size: Count  # packed rows (sft) or pairs (dpo) of one optimizer step, over all ranks and micro-batches
    micro_batch_tokens: Count  # most tokens the model sees at once
    system: str | None  # system turn of conversations that have none; null adds none
    bad_rows: Literal["error", "drop"]  # what to do with a row that cannot be used
    workers: Natural  # processes that pack ahead of the training loop; 0 packs in it
    cache: Text  # folder of tokenised data


@dataclass(frozen=True)
class ChatData(Data):
    """Conversations for SFT."""

    loss_on: Literal["assistant", "all"]  # which tokens are scored


@dataclass(frozen=True)
class PreferenceData(Data):
    """Pairs for DPO."""

    max_prompt_length: Count  # tokens a prompt keeps, from its end, when a pair is too long

    def __post_init__(self) -> None:
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length={self.max_prompt_length} must be below data.max_length={self.max_length}: "
                "a completion needs room behind the prompt."
            )


@dataclass(frozen=True)
class Objective:
    """The preference loss: a function of zephyr.objectives and what modifies it."""

    name: Text
    # pull towards the reference
    beta: Annotated[float, Must("above 0 (Zephyr used 0.1; at 0 nothing is learned)", lambda value: value > 0)]
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"]  # from the reference; DPO's is reverse_kl
    divergence_alpha: Positive  # of the alpha divergence
    weighting: Literal["wpo"] | None  # weigh a pair by how likely the policy is to write it
    ld_alpha: Portion  # weight of the tokens by which one completion is longer than the other; 1: plain sums
    nll_weight: Decay  # adds so much of the chosen completion's mean negative log-likelihood
    options: dict[str, float]  # the function's own parameters; written beside the others, as objective.NAME


@dataclass(frozen=True)
class Reference:
    """What the policy is compared with: the model that it starts as."""

    # copy: a second set of weights; adapter: the policy with its new adapter off; precomputed: log-probabilities from
    # disk, made before the first step; auto: precomputed for several passes, else adapter, copy, or what fits
    mode: Literal["auto", "copy", "adapter", "precomputed"]
    sync_every_n_steps: Count | None  # TR-DPO: move the reference towards the policy so often
    sync_share: Annotated[float, Must("in (0, 1]", lambda value: 0 < value <= 1)]  # by so much; 1 replaces it

    def __post_init__(self) -> None:
        if self.mode == "precomputed" and self.sync_every_n_steps:
            raise UserError(
                "reference=precomputed cannot follow the policy: its log-probabilities are made once. "
                "Take reference=copy or adapter, or reference.sync_every_n_steps=null."
            )


@dataclass(frozen=True)
class Optimizer:
    """How the policy is stepped."""

    # adamw_8bit: both moments in a byte a number each; paged_*: they may move to the host, and weights must be whole
    name: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
    lr: Positive  # peak
    betas: Annotated[list[Share], Must("a list of two numbers", lambda value: len(value) == 2)]
    eps: Positive
    weight_decay: Decay  # on matrices; norms and biases are never decayed
    schedule: Literal["cosine", "linear", "constant_with_warmup"]  # after the warm-up
    warmup_ratio: Share  # share of all optimizer steps
    max_grad_norm: Positive | None  # clip the gradient's global L2 norm


@dataclass(frozen=True)
class Trainer:
    """Where and how long."""

    # ddp: each device holds the model; fsdp: they share it out; auto: what is there, said with its reason
    strategy: Literal["auto", "ddp", "fsdp"]
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Literal["auto"] | Count  # of each node; on a CPU, processes
    num_nodes: Count
    replicas: Count | None  # fsdp: whole copies of the sharded model (HSDP); null: one a node
    cpu_offload: bool  # fsdp: weights, gradients and optimizer live in the host's memory
    compile: bool  # torch.compile, a layer at a time
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    max_epochs: Positive  # passes over the examples
    max_steps: Count | None  # optimizer steps; when given it sets the length in place of max_epochs
    log_every_n_steps: Count
    eval_every_n_steps: Count | None  # validation, besides the first and the last step; null: only these
    threads: Count | None  # CPU threads; null leaves it to torch


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints of a run, from which resume goes on."""

    every_n_steps: Count  # optimizer steps; the last step is always saved
    keep: Count  # the newest ones; older ones are deleted


@dataclass(frozen=True)
class Samples:
    """Answers to fixed prompts as training goes on, at every validation and where asked for."""

    count: Natural  # prompts, the first ones; 0 turns it off
    prompts: Text | None  # file of prompts or conversations; null: the validation data
    every_n_steps: Count | None  # optimizer steps, besides validations; null: at validations only
    max_new_tokens: Count


@dataclass(frozen=True)
class Wandb:
    """A W&B run: offline unless logged in."""

    project: Text
    group: Text | None
    name: Text
    tags: list[str]


@dataclass(frozen=True)
class Settings:
    """One run."""

    recipe: Text
    stage: Literal["sft", "dpo"]
    seed: Seed  # order of the examples, new weights, dropout
    output_dir: Text
    resume: Text | None  # auto: go on from the newest valid checkpoint of output_dir, if any; or a checkpoint folder
    model: Model
    data: ChatData | PreferenceData
    objective: Objective | None  # dpo only
    reference: Reference | None  # dpo only
    optimizer: Optimizer
    trainer: Trainer
    checkpoint: Checkpoint
    samples: Samples
    logger: Wandb | None
    dry_run: bool  # print what the run would take, and stop
    gpu: Text  # that a dry run reckons with


def parse(config: dict[str, Any]) -> Settings:
    """Check a resolved configuration and turn it into settings. Raises UserError at the first mistake."""
    if config.get("stage") == "dpo":
        kinds: dict[str, Any] = {"data": PreferenceData, "objective": Objective, "reference": Reference}
        config = {**config, "objective": _with_options(config.get("objective"))}
    else:
        config = {"objective": None, "reference": None, **config}
        kinds = {"data": ChatData, "objective": type(None), "reference": type(None)}
    return build(Settings, config, "", kinds)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """A hint at the most similar name, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _with_options(objective: Any) -> Any:
    """An objective's own parameters are written beside the keys that all have; which they are, its function says."""
    if not isinstance(objective, dict) or "options" in objective:
        return objective
    common = [field.name for field in fields(Objective)]
    own = {key: value for key, value in objective.items() if key not in common}
    return {key: value for key, value in objective.items() if key in common} | {"options": own}


def build(kind: type[T], values: Any, where: str = "", narrowed: dict[str, Any] | None = None) -> T:
    """An object of settings from a group of keys. Raises UserError at the first mistake, naming the key."""
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a group of keys, got {values!r}.")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"{where or 'The configuration'} has no key {key!r}.{nearest(key, names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"{_dotted(where, missing[0])} is not set.")
    hints = typing.get_type_hints(kind, include_extras=True) | (narrowed or {})
    return kind(**{name: _value(hints[name], values[name], _dotted(where, name)) for name in names})


def _value(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if get_origin(kind) in (types.UnionType, typing.Union):
        if value is None and type(None) in get_args(kind):
            return None
        options = [option for option in get_args(kind) if option is not type(None)]
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        kind = next((o for o in options if get_origin(o) is not Literal), options[0])
        if value in words:
            return value
    if get_origin(kind) is Annotated:
        kind, must = get_args(kind)
        checked = _value(kind, value, where)
        if not must.holds(checked):
            raise UserError(f"{where} must be {must.be}, got {value!r}.")
        return checked
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, where)
    if get_origin(kind) in (list, Sequence):
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {value!r}.")
        return [_value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a group of keys, got {value!r}.")
        return {key: _value(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        if value not in get_args(kind) or isinstance(value, bool):
            allowed = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
            raise UserError(f"{where} must be {allowed}; got {value!r}.{nearest(str(value), choices)}")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where} must be {_SPOKEN[kind]}, got {'null' if value is None else repr(value)}.")
    return value


_SPOKEN = {type(None): "null", int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
