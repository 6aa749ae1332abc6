"""What a run trains: the policy, what it is compared with, and the task that fits it."""

import logging
from typing import Any, NamedTuple

import torch

from zephyr import distributed
from zephyr.data.modules import DataModule, MicroBatches, Pairs
from zephyr.dpo import DPO
from zephyr.errors import UserError
from zephyr.models.adapters import adapter_state, counted
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff, Copy, Precomputed, Reference, precompute, precomputed_file
from zephyr.models.sharding import whole
from zephyr.objectives import REFERENCE_FREE, check
from zephyr.planning import estimate
from zephyr.running.placement import Choice
from zephyr.settings import Settings
from zephyr.sft import SFT
from zephyr.training.task import Task

_log = logging.getLogger("zephyr")
_ROOM = 0.8  # of a device's memory, for what stays there from step to step when a copied reference is added


class Start(NamedTuple):
    """The model that training starts from."""

    name: str  # as the settings have it
    path: str  # folder or hub id
    revision: str | None
    config: Any  # of the transformers model
    fingerprint: str  # of its weights


def check_objective(settings: Settings) -> None:
    """Raise UserError at an objective or a reference that cannot work, before anything is loaded."""
    if settings.objective is None:
        return
    check(settings.objective)
    reference, lora = settings.reference, settings.model.lora
    assert reference is not None
    if reference.mode == "adapter" and lora is None:
        raise UserError(
            "reference=adapter switches the policy's adapter off, and all weights are trained here: there is none. "
            "Take reference=copy or precomputed, or train an adapter (trainer=lora or qlora)."
        )
    if reference.mode == "copy" and lora is not None and reference.sync_every_n_steps:
        raise UserError(
            "reference=copy holds no adapter, so it cannot follow the policy's. Take reference=adapter, which keeps a "
            "second adapter, or reference.sync_every_n_steps=null."
        )


def build_task(
    settings: Settings,
    start: Start,
    data: DataModule,
    placement: Placement,
    choice: Choice,
) -> Task:
    """Load the policy and what it is compared with, and make them a task."""
    lora, sync = settings.model.lora, settings.reference and settings.reference.sync_every_n_steps
    follower = lora is not None and bool(sync)
    policy = load_policy(start.path, start.revision, settings.model, placement, follower=follower)
    _log.info("%s.", counted(policy))
    steps_per_epoch = len(data.train.lengths) / settings.data.batch_size
    common = (policy, settings.optimizer, data.total_steps, steps_per_epoch)
    if settings.objective is None:
        return SFT(*common)
    passes = data.total_steps * settings.data.batch_size / len(data.train.lengths)
    reference = _reference(settings, start, placement, choice, passes)
    task = DPO(*common, objective=settings.objective, reference=reference, sync=settings.reference)
    if isinstance(reference, Precomputed):
        _precompute(settings, task, data, placement, start.fingerprint)
    return task


def _reference(
    settings: Settings,
    start: Start,
    placement: Placement,
    choice: Choice,
    passes: float,
) -> Reference | None:
    assert settings.objective is not None and settings.reference is not None
    if settings.objective.name in REFERENCE_FREE:
        _log.info("objective=%s takes no reference.", settings.objective.name)
        return None
    mode: str = settings.reference.mode
    follows = bool(settings.reference.sync_every_n_steps)
    if mode == "auto":
        mode, why = _cheapest(settings, start, placement, choice, follows, passes)
        _log.info("reference=%s: %s.", mode, why)
    if mode == "adapter":
        return AdapterOff(follows)
    if mode == "precomputed":
        return Precomputed()
    return Copy(load_policy(start.path, start.revision, settings.model, placement, frozen=True))


def _cheapest(
    settings: Settings, start: Start, placement: Placement, choice: Choice, follows: bool, passes: float
) -> tuple[str, str]:
    if passes > 1 and not follows:
        return "precomputed", f"each pair is met {passes:.3g} times, and compared with the same numbers each time"
    if settings.model.lora is not None:
        return "adapter", "the policy with its adapter off, no second set of weights"
    shards = 1 if placement.mesh is None else placement.mesh.size(-1)
    state = estimate.state(settings, start.config, placement, shards, "copy")
    sharing = choice.devices if placement.device.type == "cpu" else 1  # processes on one memory
    memory, total = estimate.device_memory(placement.device), state.total * sharing
    sizes = (
        f"weights, gradients, optimizer and a copied reference take {total / 2**30:.2f} GiB "
        f"({state.reference * sharing / 2**30:.2f} of it the reference) of {memory / 2**30:.0f}"
    )
    if total <= _ROOM * memory or follows:
        return "copy", sizes
    return "precomputed", sizes


def _precompute(settings: Settings, task: DPO, data: DataModule, placement: Placement, fingerprint: str) -> None:
    """The reference's log-probabilities of all pairs, from disk or onto it."""
    assert settings.objective is not None
    task.policy.eval()
    for name, examples in (("training", data.train), ("validation", data.validation)):
        if not isinstance(examples, Pairs):
            continue
        file = precomputed_file(
            data.cache,
            data=examples.report.fingerprint,
            weights=fingerprint,
            precision=settings.trainer.precision if placement.mesh is None else f"sharded {settings.trainer.precision}",
            quantization=settings.model.quantization,
            double_quantization=settings.model.double_quantization,
            ld_alpha=settings.objective.ld_alpha,
        )
        known = distributed.from_first(file.exists)
        _log.info("Reference log-probabilities of the %s pairs: %s %s.", name, "from" if known else "into", file)
        own = MicroBatches(examples, settings.data.micro_batch_tokens, distributed.rank(), distributed.world_size())
        autocast = placement.compute if placement.autocast else None
        examples.reference = precompute(
            task.policy, own.with_members(), len(examples.lengths), task.sequence_logps, file, known, autocast
        )
    task.policy.train()


def gathered(policy: Any) -> dict[str, torch.Tensor]:
    """The whole weights of a sharded policy, on the first process; of an adapter, the adapter's. All processes ask."""
    if hasattr(policy, "peft_config"):
        return adapter_state(policy)
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in policy.named_parameters():
        tensor = whole(parameter.detach())
        if distributed.rank() == 0:
            gathered[name] = tensor.cpu()
    return gathered
