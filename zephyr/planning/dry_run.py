"""What a run would take: parameters, memory of each device by part, steps, tokens, hours by part. No weight is read."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MistralConfig

from zephyr import demo
from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.data.modules import ChatData, DataModule, PreferenceData
from zephyr.data.render import load_tokenizer
from zephyr.data.sources import local_files
from zephyr.errors import UserError
from zephyr.models import decoder
from zephyr.models.lineage import lineage
from zephyr.models.policy import Placement, read_config, skeleton
from zephyr.objectives import REFERENCE_FREE, STEPWISE
from zephyr.planning.estimate import State, counts, state
from zephyr.planning.flops import model_size
from zephyr.planning.gpus import chosen
from zephyr.planning.scaling import Estimate, Examples, FullRows, Job, TypicalPairs, estimate, ultrafeedback
from zephyr.planning.simulate import Run, peak
from zephyr.settings import PreferenceData as PreferenceSettings
from zephyr.settings import Settings

ROOM = 0.92  # of a GPU's memory that tensors can have: the rest is the context's and lost to fragments
# The recipes' base models, so that their dry runs need no network.
KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    }
}  # fmt: skip
# Examples of the recipes' training data: pairs as published, packed rows as inferred from published logs.
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
EXAMPLES = {ULTRAFEEDBACK: 61_135, "HuggingFaceH4/ultrachat_200k": 139_000}
ON_DEVICE = ("activations", "logits", "casts", "gathered")  # parts that are there even if weights rest in the host


class Work(NamedTuple):
    """How much there is to do."""

    examples: int
    steps: int
    known: str  # "": counted; about: by published numbers; at most: an upper bound


def report(settings: Settings) -> str:
    """The estimate as text. Raises UserError for an unknown GPU or model, or data that nobody can count."""
    gpu, model, trainer = chosen(settings.gpu), settings.model, settings.trainer
    name, revision = (model.base, model.base_revision) if model.path is None else (model.path, model.revision)
    path = demo.locate(name)
    data = _data(settings, path)
    config = model_config(path, revision)
    processes = (1 if trainer.devices == "auto" else trainer.devices) * trainer.num_nodes
    _check(settings, processes)
    memory = gpu.memory * 2**30
    strategy = trainer.strategy
    work, examples = _work(settings, data)
    reference = _reference(settings, work.steps * settings.data.batch_size / work.examples)
    if strategy == "auto":
        whole = _memory(settings, config, 1, None, reference)
        strategy = "fsdp" if processes > 1 and sum(whole.values()) > ROOM * memory else "ddp"
    replicas = trainer.replicas or trainer.num_nodes
    shards = processes // replicas if strategy == "fsdp" else 1
    mesh = (processes,) if strategy == "fsdp" else None
    parts = _memory(settings, config, shards, mesh, reference)
    wanted = settings.reference
    free = reference == "copy" and wanted is not None and wanted.mode == "auto" and not wanted.sync_every_n_steps
    if free and sum(parts.values()) > ROOM * memory:
        reference = "precomputed"
        parts = _memory(settings, config, shards, mesh, reference)
    offloaded = {}
    if trainer.cpu_offload and strategy == "fsdp":
        offloaded = {part: size for part, size in parts.items() if part not in ON_DEVICE}
        parts = {part: size for part, size in parts.items() if part in ON_DEVICE}
    total = sum(parts.values())
    job = make_job(settings, config, processes, replicas if strategy == "fsdp" else None, reference)
    found = estimate(job, examples, settings.data.batch_size, settings.data.micro_batch_tokens, settings.seed)
    count = sum(p.numel() for p in skeleton(config).parameters())
    lora = model.lora
    how = "one device" if processes == 1 and strategy != "fsdp" else f"{strategy} on {processes} devices"
    lines = [
        f"{settings.stage.upper()} of {name}, {how}, {trainer.precision}"
        + (" (trainer.devices=auto is taken as 1 here)" if trainer.devices == "auto" else ""),
        f"parameters    {count:,}" + (f", frozen under an adapter of rank {lora.rank}" if lora else ""),
        *([f"reference     {reference or 'none'}"] if settings.objective else []),
        "memory of each device",
        *(f"  {name:<12}{size / 2**30:>9.2f} GiB" for name, size in parts.items() if size),
        f"  {'peak':<12}{total / 2**30:>9.2f} GiB of the {gpu.memory:g} of a {settings.gpu}: "
        + ("it fits" if total <= ROOM * memory else "it does not fit"),
        *([f"  {'in the host':<12}{sum(offloaded.values()) / 2**30:>9.2f} GiB"] if offloaded else []),
        f"steps         {work.steps:,} of {settings.data.batch_size} "
        + ("pairs" if settings.objective else "packed sequences"),
        *_time(settings, job, work, found, data, reference == "precomputed"),
    ]
    return "\n".join(lines)


def _time(
    settings: Settings, job: Job, work: Work, found: Estimate, data: DataModule | None, precomputed: bool
) -> list[str]:
    """Lines on tokens and hours, by part."""
    tokens = work.steps * found.tokens
    if data is not None:
        tokens = sum(data.train.lengths) * work.steps * settings.data.batch_size / len(data.train.lengths)
    before = found.forward * work.examples / settings.data.batch_size * precomputed
    rate, mfu = found.rates(job)
    known = f"{work.known} " if work.known else ""
    why = {"": "", "about": " (by published numbers: the data is not here)", "at most": " (nothing was counted)"}
    seconds = work.steps * found.step.seconds + before
    step = found.step
    return [
        f"tokens        {known}{tokens:,.0f}{why[work.known]}",
        f"time          {known}{seconds / 3600:,.2f} hours on {job.processes} {settings.gpu}, validation and "
        "checkpoints apart",
        f"  a step      {_s(step.seconds)}: computing {_s(step.compute)}, waiting for the slowest {_s(step.waiting)}, "
        f"communication not hidden {_s(step.communication)}, optimizer {_s(step.optimizer)}",
        *([f"  before it   {before / 3600:.2f} hours for the reference's log-probabilities"] if before else []),
        f"  a GPU       {rate:,.0f} tokens/s, {mfu:.0%} of its peak (MFU)",
    ]


def _s(seconds: float) -> str:
    return f"{round(seconds, 6):.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _check(settings: Settings, processes: int) -> None:
    """Raises UserError where so many processes could not start."""
    if settings.data.batch_size < processes:
        raise UserError(
            f"data.batch_size={settings.data.batch_size} cannot be shared out to {processes} processes. "
            "Raise it, or take fewer devices."
        )
    copies = settings.trainer.replicas or settings.trainer.num_nodes
    if settings.trainer.strategy == "fsdp" and processes % copies:
        raise UserError(f"trainer.replicas={copies} does not divide the {processes} processes.")


def model_config(path: str, revision: str | None) -> Any:
    """The model's configuration: a known one's, or from its folder or the hub."""
    start = lineage(path, revision)
    if start is not None:
        path, revision = start.base, start.base_revision
    if path in KNOWN:
        return MistralConfig(**KNOWN[path], tie_word_embeddings=False)
    return read_config(path, revision)


def _reference(settings: Settings, passes: float) -> str | None:
    """How the reference is had, as zephyr.running.assemble decides, but for a copy that does not fit."""
    if settings.objective is None or settings.reference is None or settings.objective.name in REFERENCE_FREE:
        return None
    if settings.reference.mode != "auto":
        return settings.reference.mode
    if passes > 1 and not settings.reference.sync_every_n_steps:
        return "precomputed"
    return "adapter" if settings.model.lora is not None else "copy"


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


def _work(settings: Settings, data: DataModule | None) -> tuple[Work, Examples]:
    """How much there is to do, and examples to draw from."""
    epochs, cap, cut = settings.trainer.max_epochs, settings.trainer.max_steps, settings.data
    if data is not None:
        return Work(len(data.train.lengths), data.total_steps, ""), data.train
    source = cut.train.partition("@")[0]
    if source not in EXAMPLES and cap is None:
        raise UserError(f"data.train={cut.train} is not here to be counted: set trainer.max_steps.")
    number = EXAMPLES.get(source, cut.batch_size)
    work = Work(number, cap or int(number * epochs) // cut.batch_size, "about" if source in EXAMPLES else "at most")
    if not isinstance(cut, PreferenceSettings):
        return work, FullRows(cut.max_length)
    if source == ULTRAFEEDBACK:
        return work, ultrafeedback(cut.max_length, cut.max_prompt_length)
    answer = cut.max_length - cut.max_prompt_length
    return work, TypicalPairs([(cut.max_prompt_length, answer, answer)])


def make_job(settings: Settings, config: Any, processes: int, replicas: int | None, reference: str | None) -> Job:
    """The run as far as its time goes; sharded unless `replicas` is None."""
    model, trainer, lora = settings.model, settings.trainer, settings.model.lora
    bare: Any = skeleton(config)
    number, size = counts(model, config), model_size(bare)
    outside = sum(p.numel() for p in bare.parameters()) - size.body
    whole = lora is None
    if not whole:
        size = size._replace(body=size.body + number.trained, body_trained=number.trained, head_trained=0)
    layer = [m.weight for m in bare.get_decoder().layers[0].modules() if isinstance(m, nn.Linear)]
    wide = sum(w.numel() for w in layer if w.shape[0] > config.hidden_size) / sum(w.numel() for w in layer)
    placement = Placement(torch.device("cpu"), trainer.precision)
    live = reference in ("copy", "adapter")
    stepwise = settings.objective is not None and settings.objective.name in STEPWISE
    return Job(
        chosen(settings.gpu),
        size,
        outside=outside,
        outside_trained=outside if whole else 0,
        packed=number.packed,
        processes=processes,
        nodes=trainer.num_nodes,
        sharded=replicas is not None,
        replicas=replicas or 1,
        offload=trainer.cpu_offload and replicas is not None,
        compiled=trainer.compile,
        recomputed={"none": 0.0, "selective": wide, "full": 1.0}[model.activation_checkpointing],
        forwards=(1 + live) * (1 + stepwise),
        reference=live,
        # as AdapterOff.beside decides
        together=reference == "adapter" and not (trainer.compile or (lora and lora.dora)) and decoder.written(bare),
        single=trainer.precision == "32-true",
        use=placement.compute.itemsize,
        kept=placement.trained.itemsize,
        eight_bits=settings.optimizer.name.endswith("_8bit"),
    )


def _data(settings: Settings, path: str) -> DataModule | None:
    """The training data, tokenised, if it and the tokenizer are on this machine. Raises UserError where they are not
    and nothing else tells how long the run is."""
    source, alone = settings.data.train, settings.trainer.max_steps is not None
    try:
        here = source.startswith("demo:") or local_files(source, "data.train") is not None
    except UserError as error:  # planned for another machine, it may be
        if not alone:
            raise UserError(f"{error} Or set trainer.max_steps, to do without it.") from error
        here = False
    if not here:
        return None
    if not Path(path).is_dir():
        if not alone:
            raise UserError(
                f"data.train={source} is counted by the tokenizer of {path}, which is no folder here: "
                "set model.path=FOLDER, or trainer.max_steps."
            )
        return None
    kind: type[DataModule] = ChatData if settings.objective is None else PreferenceData
    length = settings.trainer.max_epochs, settings.trainer.max_steps
    cut = replace(settings.data, train=demo.locate(source), validation=None)
    data = kind(cut, load_tokenizer(path, None), *length, settings.seed)
    data.load()
    return data
