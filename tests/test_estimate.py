"""What a dry run says, against real steps, measured, and against figures worked by hand.

`python -m tests.test_estimate` prints the whole table of predicted and measured peaks.
"""

import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from tests import tiny
from tests.ranks import spawn
from tests.test_conf import load
from zephyr import distributed
from zephyr.assemble import Start, build_task
from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.estimate import state
from zephyr.models.policy import Placement, check_policy
from zephyr.placement import choose, placed
from zephyr.settings import Settings, parse
from zephyr.simulate import Run, peak
from zephyr.strategy import Ranks


class Case(NamedTuple):
    """A way to train the small model."""

    overrides: tuple[str, ...]
    stage: str = "sft"
    reference: str | None = None
    processes: int = 1
    micro_batches: int = 2


LORA = ("trainer=lora", "model.lora.rank=16")
MIXED, BF16 = ("trainer.precision=bf16-mixed",), ("trainer.precision=bf16-true",)
ALL, SOME = ("model.activation_checkpointing=full",), ("model.activation_checkpointing=selective",)
CASES = {
    "full, fp32": Case(()),
    "full, fp32, one micro-batch": Case((), micro_batches=1),
    "full, fp32, checkpointing": Case(ALL),
    "full, bf16-mixed": Case(MIXED),
    "full, bf16-mixed, checkpointing": Case(MIXED + ALL),
    "full, bf16-mixed, selective": Case(MIXED + SOME),
    "full, bf16": Case(BF16),
    "LoRA, fp32": Case(LORA),
    "LoRA, bf16-mixed, checkpointing": Case(LORA + MIXED + ALL),
    "DoRA, fp32": Case((*LORA, "model.lora.dora=true")),
    "QLoRA, bf16-mixed": Case(("trainer=qlora", "optimizer.name=adamw", *MIXED)),
    "DPO, full, copy": Case((), "dpo", "copy"),
    "DPO, full, bf16-mixed, copy, checkpointing": Case(MIXED + ALL, "dpo", "copy"),
    "DPO, full, no reference": Case(("objective=simpo",), "dpo"),
    "DPO, LoRA, adapter": Case(LORA, "dpo", "adapter"),
    "DPO, QLoRA, adapter": Case(("trainer=qlora", "optimizer.name=adamw"), "dpo", "adapter"),
    "FSDP 2, full, fp32": Case((), processes=2),
    "FSDP 2, full, bf16-mixed, checkpointing": Case(MIXED + ALL, processes=2),
    "FSDP 2, full, bf16-mixed, selective": Case(MIXED + SOME, processes=2),
    "FSDP 2, LoRA, bf16-mixed": Case(LORA + MIXED, processes=2),
    "FSDP 2, QLoRA, bf16-mixed": Case(("trainer=qlora", *MIXED), processes=2),
    "FSDP 2, DPO, bf16-mixed, copy, checkpointing": Case(MIXED + ALL, "dpo", "copy", processes=2),
}


def batch_of(stage: str, tokens: int) -> Batch:
    ids = torch.randint(0, 250, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if stage == "sft":
        half = tokens // 2
        return pack_conversations([Conversation(part, [True] * half) for part in (ids[:half], ids[half:])])
    cuts = [round(tokens * share / 8) for share in range(9)]
    parts = [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return pack_pairs([Pair(parts[0], parts[1] + parts[2], parts[3]), Pair(parts[4], parts[5], parts[6] + parts[7])])


def settings_of(case: Case, model: str) -> Settings:
    strategy = ("trainer.strategy=fsdp",) if case.processes > 1 else ()
    reference = (f"reference={case.reference}",) if case.reference else ()
    return parse(
        load(
            f"stage={case.stage}", *case.overrides, *strategy, *reference, f"model.path={model}", "trainer.threads=1",
            f"trainer.devices={case.processes}",
        )
    )  # fmt: skip


def predicted(case: Case, model: str, tokens: int) -> float:
    settings = settings_of(case, model)
    mesh = (case.processes,) if case.processes > 1 else None
    config = check_policy(model, None)
    run = Run(settings, config, mesh, case.reference, batch_of(case.stage, tokens), case.micro_batches)
    placement = Placement(torch.device("cpu"), settings.trainer.precision, mesh)  # type: ignore[arg-type]
    resting = state(settings, config, placement, case.processes, case.reference)
    return peak(run).total + resting.optimizer


class Meter(Callback):
    """The most bytes alive in the second step: what is there before it, and the allocator's records from then on."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, step: int) -> None:
        if step == 1:
            module.zero_grad()  # as the step itself would; of what was there before, the records have no end
            self.before = resting(trainer, module)
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, step: int) -> None:
        if step == 1:
            self.profiler.__exit__(None, None, None)
            records = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            alive = most = self.before
            for record in sorted(records, key=lambda record: record.start_ns()):
                alive += record.nbytes()
                most = max(most, alive)
            self.peak = most


def resting(trainer: L.Trainer, module: Any) -> int:
    """Bytes of weights, optimizer and the scales of 4-bit weights, each once."""
    tensors = [*module.parameters(), *module.buffers()]
    for values in trainer.optimizers[0].state.values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    for layer in module.modules():
        if (packed := getattr(layer, "quant_state", None)) is not None:
            tensors += [packed.absmax, packed.code, *([packed.state2.absmax] if packed.nested else [])]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.data_ptr(): t.nbytes for t in local}.values())


def measured(names: list[str], model: str, tokens: int) -> dict[str, float]:
    """The peaks of real runs of three steps, in bytes, of this process."""
    found = {}
    several = distributed.world_size() > 1
    with distributed.process_group("cpu") if several else nullcontext():
        if several:
            distributed.process_group = lambda _: nullcontext()
        for name in names:
            found[name] = measured_one(CASES[name], model, tokens)
    return found


def measured_one(case: Case, model: str, tokens: int) -> float:
    settings = settings_of(case, model)
    choice = choose(settings.trainer, lambda: 0.0)
    with placed(choice, settings) as placement, tempfile.TemporaryDirectory() as folder:
        start = Start("base", model, None, check_policy(model, None), "")
        data: Any = SimpleNamespace(train=SimpleNamespace(lengths=[0] * 100), total_steps=3)
        task = build_task(settings, start, data, placement, choice)
        steps = [[batch_of(case.stage, tokens)] * case.micro_batches] * 3
        meter = Meter()
        trainer = L.Trainer(
            accelerator="cpu", devices=choice.devices, strategy=Ranks() if case.processes > 1 else "auto",
            precision="bf16-mixed" if placement.autocast else "32-true", max_epochs=1, callbacks=[meter], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, plugins=[LightningEnvironment()], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(task, DataLoader(steps, batch_size=None))
    return float(meter.peak)


def table(names: list[str], model: str, tokens: int, folder: Path) -> list[tuple[str, float, float]]:
    single = [name for name in names if CASES[name].processes == 1]
    double = [name for name in names if CASES[name].processes == 2]
    found = measured(single, model, tokens)
    if double:
        found |= spawn(measured, 2, folder, double, model, tokens)[0]
    return [(name, predicted(CASES[name], model, tokens), found[name]) for name in names]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        tiny.model(
            hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, vocab_size=4096,
            max_position_embeddings=4096,
        ).save_pretrained(base)  # fmt: skip
        names = [name for name in CASES if not sys.argv[1:] or sys.argv[1] in name]
        print(f"{'MiB at the peak of a step':48} predicted  measured")
        for name, guess, truth in table(names, str(base), 2048, Path(scratch)):
            print(f"{name:48} {guess / 2**20:9.1f} {truth / 2**20:9.1f} {guess / truth - 1:+7.1%}")
