"""What a dry run says, against real steps, measured, and against figures worked by hand.

`python -m tests.test_estimate` prints the whole table of predicted and measured peaks.
"""

import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import MistralConfig

from tests import tiny
from tests.ranks import spawn
from tests.test_conf import load
from zephyr import distributed
from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.models import products
from zephyr.models.attention import undivided
from zephyr.models.policy import Placement, check_policy
from zephyr.planning.estimate import State, counts, state
from zephyr.planning.simulate import Run, peak
from zephyr.running.assemble import Start, build_task
from zephyr.running.placement import choose, placed
from zephyr.running.strategy import Ranks
from zephyr.settings import Settings, parse


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
    parts = [ids[a:b] for a, b in pairwise(cuts)]
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
    """The most bytes alive in a step: what is there before it, and the allocator's records from then on.

    The first step is left out, as it makes the optimizer's state. Of several processes the median of three steps
    counts: the profiler misses what gloo's threads allocate for others, or let go.
    """

    def __init__(self) -> None:
        self.peaks: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, step: int) -> None:
        if step > 0:
            module.zero_grad()  # as the step itself would; of what was there before, the records have no end
            self.before = resting(trainer, module)
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, step: int) -> None:
        if step > 0:
            self.profiler.__exit__(None, None, None)
            records = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            alive = [record.nbytes() for record in sorted(records, key=lambda record: record.start_ns())]
            self.peaks.append(self.before + max(accumulate(alive)))


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
    """The peaks of real runs, in bytes, of this process."""
    found = {}
    several = distributed.world_size() > 1
    with distributed.process_group("cpu") if several else nullcontext():
        if several:
            distributed.process_group = lambda _: nullcontext()
        for name in names:
            train(CASES[name], model, tokens, meter := Meter())
            found[name] = float(median(meter.peaks))
    return found


def train(case: Case, model: str, tokens: int, *callbacks: Callback) -> None:
    """A few steps of a task assembled as a run assembles it; attention as on a GPU, which is what is predicted."""
    settings = settings_of(case, model)
    choice = choose(settings.trainer, lambda: 0.0)
    with undivided(), placed(choice, settings) as placement, tempfile.TemporaryDirectory() as folder:
        start = Start("base", model, None, check_policy(model, None), "")
        data: Any = SimpleNamespace(train=SimpleNamespace(lengths=[0] * 100), total_steps=4)
        task = build_task(settings, start, data, placement, choice)
        steps = [[batch_of(case.stage, tokens)] * case.micro_batches] * (2 if case.processes == 1 else 4)
        trainer = L.Trainer(
            accelerator="cpu", devices=choice.devices, strategy=Ranks() if case.processes > 1 else "auto",
            precision="bf16-mixed" if placement.autocast else "32-true", max_epochs=1, callbacks=[*callbacks], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, plugins=[LightningEnvironment()], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(task, DataLoader(steps, batch_size=None))


def base(folder: Path, layers: int, width: int, vocabulary: int) -> str:
    """A model folder."""
    tiny.model(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=vocabulary, max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def compare(names: list[str], model: str, tokens: int, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Predicted and measured peaks, in bytes."""
    for processes, found in groupby(
        sorted(names, key=lambda name: CASES[name].processes), lambda n: CASES[n].processes
    ):
        group = list(found)
        peaks = (
            measured(group, model, tokens) if processes == 1 else spawn(measured, 2, folder, group, model, tokens)[0]
        )
        yield from ((name, predicted(CASES[name], model, tokens), peaks[name]) for name in group)


def resident(name: str, model: str, small: str, tokens: int) -> int:
    """By how much a process has grown at most, in bytes. It is a fresh one."""
    with patch("zephyr.training.task.keep_freed"):  # it would set aside what `grown` asks of the allocator
        train(CASES[name], small, 64)  # loads every library
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        train(CASES[name], model, tokens)
        return memory("VmHWM") - before


def memory(kind: str) -> int:
    """Bytes of this process, from Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def grown(name: str, model: str, small: str, tokens: int) -> int:
    command = [sys.executable, "-m", "tests.test_estimate", "--resident", name, model, small, str(tokens)]
    # what is freed goes back to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return base(tmp_path_factory.mktemp("estimate") / "base", layers=2, width=128, vocabulary=2048)


SINGLE = (
    "full, fp32", "full, fp32, one micro-batch", "full, bf16-mixed, checkpointing", "full, bf16-mixed, selective",
    "LoRA, bf16-mixed, checkpointing", "QLoRA, bf16-mixed", "DPO, full, bf16-mixed, copy, checkpointing",
    "DPO, full, no reference", "DPO, LoRA, adapter",
)  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_real_step_takes_the_memory_that_was_predicted(small, tmp_path, name):
    ((_, guess, truth),) = compare([name], small, 512, tmp_path)
    # oneDNN's bf16 product takes a copy of its operands for itself, which counts where the head is the peak
    assert guess == pytest.approx(truth, rel=0.05 if "bf16" in name else 0.02)


@pytest.mark.parametrize("name", ["full, fp32", "DPO, LoRA, adapter"])
def test_a_prediction_does_not_depend_on_the_cpu_it_is_made_on(small, name, monkeypatch):
    found = []
    for held_back in (True, False):
        monkeypatch.setattr(products, "_held_back", lambda held_back=held_back: held_back)
        settings = settings_of(CASES[name], small)
        run = Run(settings, check_policy(small, None), None, CASES[name].reference, batch_of(CASES[name].stage, 512), 1)
        found.append(peak(run))
    assert found[0] == found[1]


def test_a_real_step_of_two_processes_takes_the_memory_that_was_predicted(small, tmp_path):
    """Within what gloo, unlike NCCL, takes from torch for its own copies."""
    names = ["FSDP 2, full, fp32", "FSDP 2, full, bf16-mixed, checkpointing", "FSDP 2, QLoRA, bf16-mixed"]
    for name, guess, truth in compare(names, small, 512, tmp_path):
        assert guess == pytest.approx(truth, rel=0.15), name


@pytest.mark.parametrize(
    "name",
    [
        "full, fp32",
        "DPO, full, bf16-mixed, copy, checkpointing",
        "DPO, LoRA, adapter",
        "FSDP 2, full, bf16-mixed, selective",
    ],
)
def test_few_layers_tell_of_many(name):
    case, config = CASES[name], tiny.model(num_hidden_layers=9).config
    mesh = (2, 2) if case.processes > 1 else None
    run = Run(settings_of(case, "base"), config, mesh, case.reference, batch_of(case.stage, 256), 2)
    assert peak(run) == pytest.approx(peak(run, whole=True))


MISTRAL = MistralConfig()  # its defaults are Mistral-7B-v0.1
PARAMETERS = 7_241_732_096
LINEAR = 6_979_321_856  # of them, in the linear layers of its 32 layers


def of_mistral(*overrides: str, mesh: tuple[int, ...] | None = None, reference: str | None = None) -> State:
    settings = parse(load("recipe=zephyr-7b-beta", "stage=dpo", *overrides))
    placement = Placement(torch.device("cpu"), settings.trainer.precision, mesh)  # type: ignore[arg-type]
    return state(settings, MISTRAL, placement, 1 if mesh is None else mesh[-1], reference)


def test_full_weights_take_sixteen_bytes_a_parameter():
    """Weights, gradients and two moments in fp32; a copy in fp32 on one device, in bf16 where layers are gathered."""
    alone = of_mistral(reference="copy")
    assert alone == pytest.approx([4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS, 4 * PARAMETERS])
    assert (alone.total - alone.reference) / 2**30 == pytest.approx(107.9, abs=0.05)
    shared = of_mistral(mesh=(8,), reference="copy")
    assert (shared.total - shared.reference) / 2**30 == pytest.approx(13.49, abs=0.005)
    assert shared.reference == pytest.approx(2 * PARAMETERS / 8)
    assert of_mistral("trainer.precision=bf16-true").total == pytest.approx(12 * PARAMETERS)


def test_four_bits_and_an_adapter_by_hand():
    """Rank 16 on all linear layers; half a byte a weight, and 4 bytes for each 64, which every device holds."""
    adapter = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    frozen = 2 * (PARAMETERS - LINEAR)
    qlora = ("trainer=qlora", "model.double_quantization=false", "trainer.precision=bf16-mixed")
    assert of_mistral(*qlora).weights == pytest.approx(frozen + LINEAR * 9 / 16 + 4 * adapter)
    assert of_mistral(*qlora)[1:3] == pytest.approx([4 * adapter, 8 * adapter])
    assert of_mistral(*qlora, "optimizer.name=paged_adamw_8bit").optimizer == pytest.approx(2 * adapter)
    shared = of_mistral(*qlora, mesh=(8,)).weights
    assert shared == pytest.approx((frozen + LINEAR / 2 + 4 * adapter) / 8 + LINEAR / 16)
    numbers = counts(parse(load(*qlora)).model, MISTRAL)
    assert numbers == (PARAMETERS + adapter, adapter, 224, LINEAR)


def main(wanted: str) -> None:
    def show(name: str, guess: float, truth: float) -> None:
        print(f"{name:48} {guess / 2**20:9.1f} {truth / 2**20:9.1f} {guess / truth - 1:+7.1%}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = base(folder / "model", layers=6, width=256, vocabulary=4096)
        print(f"{'MiB at the peak of a step, by torch.profiler':48} predicted  measured")
        for row in compare([name for name in CASES if wanted in name], model, 2048, folder):
            show(*row)
        model, small = base(folder / "large", 8, 768, 8192), base(folder / "small", 2, 64, 258)
        print(f"{'MiB of a fresh process, by the kernel':48} predicted  measured")
        for name in ("full, fp32", "full, bf16-mixed, checkpointing", "DPO, LoRA, adapter"):
            if wanted in name:
                show(name, predicted(CASES[name], model, 2048), grown(name, model, small, 2048))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--resident"]:
        print(resident(*sys.argv[2:5], int(sys.argv[5])))
    else:
        main(" ".join(sys.argv[1:]))
