"""What a run would take: parameters, memory of each device by part, steps, tokens, hours. No weight is read."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MistralConfig

from zephyr import demo
from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.data.modules import ChatData, DataModule, PreferenceData
from zephyr.data.render import load_tokenizer
from zephyr.errors import UserError
from zephyr.estimate import State, state
from zephyr.models.lineage import lineage
from zephyr.models.policy import Placement, read_config, skeleton
from zephyr.objectives import REFERENCE_FREE
from zephyr.observe.throughput import PEAK_TFLOPS, ModelSize, step_flops
from zephyr.settings import PreferenceData as PreferenceSettings
from zephyr.settings import Settings, nearest
from zephyr.simulate import Run, peak

MFU = 0.4  # share of the peak that well-kept trainers of 7B models report; ours has not been measured on a GPU
MEMORY_GIB = {"A100": 80, "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200": 141, "L40S": 48, "RTX 4090": 24}
ROOM = 0.92  # of a GPU's memory that tensors can have: the rest is the context's and lost to fragments
# The recipes' base models, so that their dry runs need no network.
KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    }
}  # fmt: skip
# Examples of the recipes' training data: pairs as published, packed rows as inferred from published logs.
EXAMPLES = {"HuggingFaceH4/ultrafeedback_binarized": 61_135, "HuggingFaceH4/ultrachat_200k": 139_000}


class Work(NamedTuple):
    """How much there is to do."""

    examples: int
    steps: int
    tokens: float  # of the whole run
    exactly: bool  # counted, not an upper bound


def report(settings: Settings) -> str:
    """The estimate as text. Raises UserError for an unknown GPU or model, or data that nobody can count."""
    if settings.gpu not in MEMORY_GIB:
        raise UserError(f"gpu={settings.gpu!r} is not known.{nearest(settings.gpu, MEMORY_GIB)} {_listed(MEMORY_GIB)}")
    model = settings.model
    name, revision = (model.base, model.base_revision) if model.path is None else (model.path, model.revision)
    path = demo.locate(name)
    data = _data(settings, path)
    config = model_config(path, revision)
    devices = settings.trainer.devices
    processes = (1 if devices == "auto" else devices) * settings.trainer.num_nodes
    memory = MEMORY_GIB[settings.gpu] * 2**30
    strategy = settings.trainer.strategy
    reference = _reference(settings, "copy")
    if strategy == "auto":
        whole = _memory(settings, config, 1, None, reference)
        strategy = "fsdp" if processes > 1 and sum(whole.values()) > ROOM * memory else "ddp"
    replicas = settings.trainer.replicas or settings.trainer.num_nodes
    shards = processes // replicas if strategy == "fsdp" else 1
    mesh = (processes,) if strategy == "fsdp" else None
    parts = _memory(settings, config, shards, mesh, reference)
    wanted = settings.reference
    free = reference == "copy" and wanted is not None and wanted.mode == "auto" and not wanted.sync_every_n_steps
    if free and sum(parts.values()) > ROOM * memory:
        reference = "precomputed"
        parts = _memory(settings, config, shards, mesh, reference)
    total = sum(parts.values())
    work = _work(settings, data)
    flops = _flops(settings, config, work, live=reference in ("copy", "adapter"))
    hours = flops / (processes * PEAK_TFLOPS[settings.gpu] * 1e12 * MFU) / 3600
    count = sum(p.numel() for p in skeleton(config).parameters())
    lora = model.lora
    how = "one device" if processes == 1 and strategy != "fsdp" else f"{strategy} on {processes} devices"
    lines = [
        f"{settings.stage.upper()} of {name}, {how}, {settings.trainer.precision}"
        + (" (trainer.devices=auto is taken as 1 here)" if devices == "auto" else ""),
        f"parameters    {count:,}" + (f", frozen under an adapter of rank {lora.rank}" if lora else ""),
        *([f"reference     {reference or 'none'}"] if settings.objective else []),
        "memory of each device",
        *(f"  {name:<12}{size / 2**30:>9.2f} GiB" for name, size in parts.items() if size),
        f"  {'peak':<12}{total / 2**30:>9.2f} GiB of the {MEMORY_GIB[settings.gpu]} of a {settings.gpu}: "
        + ("it fits" if total <= ROOM * memory else "it does not fit"),
        f"steps         {work.steps:,} of {settings.data.batch_size} "
        + ("pairs" if settings.objective else "packed sequences"),
        f"tokens        {'' if work.exactly else 'at most '}{work.tokens:,.0f}"
        + ("" if work.exactly else " (the data is not here: max_length times the published number of examples)"),
        f"time          {'' if work.exactly else 'at most '}{hours:,.2f} hours on {processes} {settings.gpu} "
        f"at {MFU:.0%} of its peak, {flops:.3g} FLOPs",
    ]
    return "\n".join(lines)


def model_config(path: str, revision: str | None) -> Any:
    """The model's configuration: a known one's, or from its folder or the hub."""
    start = lineage(path, revision)
    if start is not None:
        path, revision = start.base, start.base_revision
    if path in KNOWN:
        return MistralConfig(**KNOWN[path], tie_word_embeddings=False)
    return read_config(path, revision)


def _reference(settings: Settings, otherwise: str) -> str | None:
    if settings.objective is None or settings.reference is None or settings.objective.name in REFERENCE_FREE:
        return None
    if settings.reference.mode != "auto":
        return settings.reference.mode
    return "adapter" if settings.model.lora is not None else otherwise


def _memory(
    settings: Settings, config: Any, shards: int, mesh: tuple[int, ...] | None, reference: str | None
) -> dict[str, float]:
    """Bytes of each device by part, at the peak of a step."""
    placement = Placement(torch.device("cpu"), settings.trainer.precision, mesh)  # type: ignore[arg-type]
    resting: State = state(settings, config, placement, shards, reference)
    batch, examples = _fullest(settings)
    micro_batches = max(1, math.ceil(settings.data.batch_size / examples / (mesh[0] if mesh else 1)))
    step = peak(Run(settings, config, mesh and (shards,), reference, batch, min(micro_batches, 2)))
    return {**step._asdict(), "optimizer": resting.optimizer}


def _fullest(settings: Settings) -> tuple[Batch, int]:
    """A micro-batch as full as they come, and how many examples it holds."""
    data = settings.data
    if isinstance(data, PreferenceSettings):
        answer = data.max_length - data.max_prompt_length
        count = max(1, data.micro_batch_tokens // (data.max_prompt_length + 2 * answer))
        pair = Pair([0] * data.max_prompt_length, [0] * answer, [0] * answer)
        return pack_pairs([pair] * count), count
    count = max(1, data.micro_batch_tokens // data.max_length)
    return pack_conversations([Conversation([0] * data.max_length, [True] * data.max_length)] * count), count


def _work(settings: Settings, data: DataModule | None) -> Work:
    epochs, cap = settings.trainer.max_epochs, settings.trainer.max_steps
    if data is not None:
        steps = data.total_steps
        share = steps * settings.data.batch_size / len(data.train.lengths)
        return Work(len(data.train.lengths), steps, sum(data.train.lengths) * share, True)
    source = settings.data.train.partition("@")[0]
    if source not in EXAMPLES and cap is None:
        raise UserError(f"data.train={settings.data.train} is not here to be counted: set trainer.max_steps.")
    examples = EXAMPLES.get(source, settings.data.batch_size)
    steps = cap or int(examples * epochs) // settings.data.batch_size
    batch, count = _fullest(settings)
    return Work(examples, steps, steps * settings.data.batch_size * len(batch.ids) / count, False)


def _flops(settings: Settings, config: Any, work: Work, live: bool) -> float:
    """Of the whole run: the fullest micro-batch's FLOPs a token, times the tokens."""
    model: Any = skeleton(config)
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    body = sum(p.numel() for p in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    all_train = settings.model.lora is None
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    size = ModelSize(body, body * all_train, head, head * all_train, config.num_hidden_layers, width)
    batch, _ = _fullest(settings)
    return step_flops(size, [batch], live) / len(batch.ids) * work.tokens


def _data(settings: Settings, path: str) -> DataModule | None:
    """The training data, tokenised, if it and the tokenizer are on this machine."""
    source = settings.data.train
    here = source.startswith("demo:") or Path(source.partition("@")[0]).exists()
    if not here or not Path(path).is_dir():
        return None
    kind: type[DataModule] = ChatData if settings.objective is None else PreferenceData
    length = settings.trainer.max_epochs, settings.trainer.max_steps
    cut = replace(settings.data, train=demo.locate(source), validation=None)
    data = kind(cut, load_tokenizer(path, None), *length, settings.seed)
    data.load()
    return data


def _listed(names: Iterable[str]) -> str:
    return f"Choose one of: {', '.join(names)}."
