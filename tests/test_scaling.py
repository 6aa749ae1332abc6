"""The model of step time: by hand, against published runs, and against real runs of one and two processes over gloo.

`python -m tests.test_scaling` prints both comparisons; docs/scaling.md says where the published figures are from.
"""

import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader
from transformers import GemmaConfig

from tests.ranks import spawn
from tests.test_conf import load as load_conf
from tests.test_decoder import KINDS, SIZES
from tests.test_estimate import base, batch_of
from zephyr import distributed
from zephyr.data.packing import deal
from zephyr.models.policy import check_policy
from zephyr.planning.dry_run import make_job
from zephyr.planning.flops import Load, ModelSize, load
from zephyr.planning.gpus import GPU, GPUS, named
from zephyr.planning.scaling import (
    MEMORY,
    PAIRS,
    PRODUCTS,
    WIRE,
    FullRows,
    Job,
    estimate,
    micro_batch,
    optimizer,
    ring,
    step,
    ultrafeedback,
)
from zephyr.running.assemble import Start, build_task
from zephyr.running.placement import choose, placed
from zephyr.running.strategy import Ranks
from zephyr.settings import Settings, parse

# 1 TFLOP/s of products, links of 1 and 0.2 GB/s once their shares are taken; its memory costs no time
TOY = GPU(1, 1 / PRODUCTS, 1, 1, 1e9, 1 / WIRE, 0.2 / WIRE, 1)
BODY = ModelSize(500_000_000, 500_000_000, 0, 0, layers=4, width=0)
THOUSAND = Load(1000, 0, 0.0)  # a forward pass is 1 s, a backward pass 2 s, over four layers


def test_a_ring_sends_all_but_ones_own_part():
    assert ring(8e9, 8, 1e9) == 7 and ring(8e9, 1, 1e9) == 0


def test_communication_hides_behind_computing_but_for_its_ends():
    """Gathers: 1 GB in bf16, half of which comes from the other: 0.125 s a layer. Sums: in fp32, twice that."""
    job = Job(TOY, BODY, processes=2, sharded=True)
    assert micro_batch(job, THOUSAND) == pytest.approx((3, 3 + 0.125 + (0.125 + 0.25)))
    # on the slow network every layer waits: a gather 0.625 s, a sum 1.25 s
    apart = replace(job, nodes=2)
    assert micro_batch(apart, THOUSAND) == pytest.approx((3, 5 * 0.625 + 4 * (0.625 + 1.25) + 0.625 + 1.25))
    # what does not overlap is added up
    in_turn = replace(job, overlapping=False)
    assert micro_batch(in_turn, THOUSAND) == pytest.approx((3, 3 + 5 * 0.125 + 5 * (0.125 + 0.25)))


def test_embedding_and_head_are_gathered_before_everything():
    job = Job(TOY, BODY, outside=100_000_000, outside_trained=100_000_000, processes=2, sharded=True)
    compute, total = micro_batch(job, THOUSAND)
    assert total - compute == pytest.approx(0.5 + 2 * 0.1 + 0.2)  # as above; two gathers, one sum


def test_a_reference_beside_the_policy_reads_no_weight_of_its_own():
    """Gathers as above: one before everything in place of two, and one a layer behind which both compute."""
    job = Job(TOY, BODY, processes=2, sharded=True, forwards=2)
    beside = replace(job, together=True)
    assert micro_batch(job, THOUSAND) == pytest.approx((4, 4 + 2 * 0.125 + 0.375))
    assert micro_batch(beside, THOUSAND) == pytest.approx((4, 4 + 0.125 + 0.375))
    apart = [micro_batch(replace(each, nodes=2), THOUSAND)[1] for each in (job, beside)]
    assert apart[0] - apart[1] == pytest.approx(5 * 0.625)
    # 10^9 weights in four bits, 2.5 bytes moved for each: the loss of a whole step computes all of it twice
    slow = TOY._replace(bandwidth=1 / MEMORY)
    of_a_step = Job(slow, BODY._replace(body_trained=0), packed=1_000_000_000, forwards=4)
    apart = [micro_batch(replace(of_a_step, together=each), THOUSAND)[0] for each in (False, True)]
    assert apart == pytest.approx([4 + 1 + 5 * 2.5, 4 + 1 + 3 * 2.5])


def test_the_reference_goes_beside_the_policy_where_the_run_lets_it():
    """As AdapterOff.beside: not with DoRA, compiled layers, or layers of other architectures."""

    def together(*changes: str, config: Any = KINDS["mistral"], reference: str = "adapter") -> bool:
        settings = parse(load_conf("stage=dpo", "trainer=lora", "model.path=mine", *changes))
        return make_job(settings, config, 1, None, reference).together

    assert together() and together("trainer.strategy=fsdp", "model.activation_checkpointing=full")
    assert not together("model.lora.dora=true") and not together("trainer.compile=true")
    assert not together(config=GemmaConfig(**SIZES, head_dim=16)) and not together(reference="precomputed")


def test_copies_of_a_sharded_model_sum_their_shards():
    """Two nodes of two: within a node as above; then each rank's half of a layer's 0.5 GB goes there and back."""
    job = Job(TOY, BODY, processes=4, nodes=2, replicas=2, sharded=True)
    across = 2 * 0.25 / 2 / 0.2
    expected = 1 + 0.125 + 0.125 + 4 * (0.125 + 0.25 + across) + 0.25 + across
    assert micro_batch(job, THOUSAND) == pytest.approx((3, expected))


def test_ddp_sums_once_a_step():
    job = Job(TOY, BODY, processes=2)
    once, twice = (step(job, [[THOUSAND] * n] * 2) for n in (1, 2))
    assert once.communication == pytest.approx(2.0) == twice.communication  # 2 GB, half of it, twice
    assert (once.compute, twice.compute) == pytest.approx((3, 6))


def test_sharded_ranks_wait_in_each_round_others_once():
    half = Load(500, 0, 0.0)
    crossed = [[THOUSAND, half], [half, THOUSAND]]
    assert step(Job(TOY, BODY, processes=2), crossed).waiting == pytest.approx(0)
    sharded = step(Job(TOY, BODY, processes=2, sharded=True), crossed)
    assert (sharded.compute, sharded.waiting) == pytest.approx((4.5, 1.5))


def test_what_is_computed_again_and_what_is_not_computed():
    def seconds(**changes: Any) -> float:
        return micro_batch(replace(Job(TOY, BODY), **changes), THOUSAND)[0]

    assert seconds() == pytest.approx(3)
    assert seconds(recomputed=1.0) == pytest.approx(4)
    assert seconds(recomputed=0.5) == pytest.approx(3.5)
    assert seconds(forwards=2) == pytest.approx(4)
    assert seconds(size=BODY._replace(body_trained=0)) == pytest.approx(2)  # frozen: no gradients of weights
    assert seconds(single=True) == pytest.approx(3 / PRODUCTS)


def test_the_optimizer_streams_its_state():
    """Mistral-7B in fp32 on an H200: 40 bytes a weight at 4.32 TB/s; an eighth of it on each of eight."""
    job = Job(GPUS["H200"], BODY._replace(body_trained=7_241_732_096))
    assert optimizer(job) == pytest.approx(7_241_732_096 * 40 / 4.32e12)
    assert optimizer(replace(job, processes=8, sharded=True)) == pytest.approx(optimizer(job) / 8)


def test_more_processes_give_the_same_tokens_in_less_time():
    job = Job(GPUS["H100"], LLAMA.size, sharded=True)
    found = [
        estimate(replace(job, processes=n, nodes=max(1, n // 8)), FullRows(2048), 64, 16384, draws=64)
        for n in (1, 8, 32)
    ]
    assert found[0].tokens == found[1].tokens == found[2].tokens == 64 * 2048
    assert found[0].step.seconds > 7 * found[1].step.seconds > 3 * 7 * found[2].step.seconds
    assert found[0].flops == pytest.approx(found[2].flops)
    tokens_a_second, mfu = found[1].rates(replace(job, processes=8))
    assert tokens_a_second == pytest.approx(64 * 2048 / 8 / found[1].step.seconds) and 0.3 < mfu < 0.6


def test_typical_pairs_are_as_long_as_real_ones():
    """1,193 pairs of UltraFeedback: 182, 299 and 269 tokens in the mean after cutting."""
    means = [fmean(column) for column in zip(*PAIRS, strict=True)]
    assert means == pytest.approx([181.6, 298.8, 269.2], rel=0.01)
    assert ultrafeedback(1024, 512).pairs == PAIRS
    assert max(p + max(c, r) for p, c, r in ultrafeedback(512, 256).pairs) == 512


def test_a_device_is_known_by_its_drivers_name():
    assert named("NVIDIA H100 80GB HBM3") is GPUS["H100"] and named("NVIDIA H100 PCIe") is GPUS["H100 PCIe"]
    assert named("NVIDIA A100-SXM4-80GB") is GPUS["A100"] and named("Tesla T4") is None


# --- dealing out -----------------------------------------------------------------------------------------------------


def lasting(lengths: list[int], budget: int, ranks: int) -> tuple[int, int]:
    """Tokens until all ranks are done if they meet after each micro-batch, and micro-batches."""
    hands = deal(lengths, budget, ranks)
    assert sorted(i for hand in hands for members in hand for i in members) == list(range(len(lengths)))
    tokens = [[sum(lengths[i] for i in members) for members in hand] for hand in hands]
    rounds = max(map(len, tokens))
    return sum(max(own[r] if r < len(own) else 0 for own in tokens) for r in range(rounds)), rounds


def test_a_round_with_a_long_item_is_filled_up_to_it():
    """Nobody is done before 10; beside it 8 + 2 goes for nothing, and 3 + 2 is all that is left for the other round."""
    assert lasting([10, 8, 2, 3, 2, 2, 3], 12, 2) == (15, 2)


def test_ranks_wait_little_for_each_other():
    """The mean over ranks, and by how much the longest pair alone exceeds it, bound what can be had."""
    draw = random.Random(0)
    for batch, budget, ranks, worst in ((32, 8192, 8, 1.04), (128, 8192, 32, 1.04), (128, 2048, 32, 1.08)):
        ratios = []
        for _ in range(20):
            lengths = [sum(draw.choice(PAIRS)) for _ in range(batch)]
            bound = max(max(lengths), sum(lengths) / ranks)
            ratios.append(lasting(lengths, budget, ranks)[0] / bound)
        assert fmean(ratios) < worst


# --- published runs --------------------------------------------------------------------------------------------------


def model(layers: int, width: int, head: int, body: int) -> Job:
    """All weights in training; `head` is also the embedding's size."""
    return Job(
        GPUS["H100"], ModelSize(body, body, head, head, layers, width), outside=2 * head, outside_trained=2 * head
    )


def tied(layers: int, width: int, total: int) -> Job:
    head = 50_432 * width
    return replace(model(layers, width, head, total - head), outside=head, outside_trained=head)


LLAMA = model(32, 4096, 128_256 * 4096, 6_979_321_856)
QWEN = model(28, 3584, 152_064 * 3584, 28 * 233_046_016)
MISTRAL = model(32, 4096, 32_000 * 4096, 6_979_321_856)
MPT = {1: tied(24, 2048, 1_315_950_592), 3: tied(32, 2560, 2_651_837_440), 7: tied(32, 4096, 6_658_859_008),
       13: tied(40, 5120, 12_853_954_560), 30: tied(48, 7168, 29_975_214_080)}  # fmt: skip
# Meta's: 500 W and 2.4 TB/s; the cap on power is taken to cost products a quarter
CAPPED = GPUS["H100"]._replace(product=0.75 * 790, bandwidth=2400)


class Published(NamedTuple):
    """A run that somebody measured."""

    name: str
    tokens: float  # a second and GPU
    job: Job
    micro_batch: Load


def rows(length: int, count: int) -> Load:
    return Load(length * count, length * count, count * length * (length + 1) / 2)


def sharded(job: Job, gpu: GPU, processes: int, **changes: Any) -> Job:
    return replace(job, gpu=gpu, processes=processes, nodes=math.ceil(processes / 8), sharded=True, **changes)


def adapted(job: Job, trained: int) -> Job:
    size = job.size._replace(body=job.size.body + trained, body_trained=trained, head_trained=0)
    return replace(job, size=size, outside_trained=0, compiled=True)


def pairs(shared: bool) -> tuple[float, Load]:
    """A micro-batch of 8,000 tokens of UltraFeedback, with the prompt of a pair once or twice; and its pairs."""
    found = [load(ultrafeedback(1024, 512).pack([i])) for i in range(len(PAIRS))]
    if not shared:
        again = [rows(p + c, 1).context + rows(p + r, 1).context for p, c, r in PAIRS]
        found = [Load(of.tokens + p, of.scored, c) for of, (p, *_), c in zip(found, PAIRS, again, strict=True)]
    tokens, scored, context = (fmean(column) for column in zip(*found, strict=True))
    count = 8000 / tokens
    return count, Load(8000, round(scored * count), context * count)


def published() -> Iterator[Published]:
    full = {"recomputed": 1.0}
    h100, h200, a100 = GPUS["H100"], GPUS["H200"], GPUS["A100"]
    kempner = replace(LLAMA, gpu=h200, compiled=True, kept=2, **full)
    yield Published("KempnerForge 8B, 1 H200, full, compiled", 10_471, kempner, rows(4096, 4))
    yield Published("KempnerForge 8B, 4 H200", 9_746, sharded(kempner, h200, 4), rows(4096, 4))
    half = {"recomputed": 0.5}  # every other product
    for processes, eager, compiled in ((8, 5_762, 6_667), (128, 5_605, 6_514)):
        titan = sharded(LLAMA, CAPPED, processes, **half)
        yield Published(f"torchtitan 8B, {processes} H100 500 W", eager, titan, rows(8192, 2))
        faster = replace(titan, compiled=True)
        yield Published(f"torchtitan 8B, {processes} H100 500 W, compiled", compiled, faster, rows(8192, 2))
    yield Published(
        "torchao 8B, 8 H100 500 W, compiled", 6_150, sharded(LLAMA, CAPPED, 8, compiled=True, **half), rows(8192, 1)
    )
    for size, processes, length, count, again, tokens in (
        (7, 8, 2048, 6, 0, 10_643), (7, 8, 1024, 64, 1, 10_203), (7, 8, 4096, 16, 1, 8_611), (7, 8, 8192, 8, 1, 6_935),
        (13, 8, 2048, 2, 0, 4_792), (13, 64, 2048, 2, 0, 4_800), (30, 8, 2048, 3, 1, 2_002), (30, 32, 2048, 14, 1, 2_308),
        (3, 16, 2048, 10, 0, 24_142), (1, 8, 2048, 14, 0, 45_455), (1, 64, 2048, 20, 0, 44_402),
    ):  # fmt: skip
        name = f"llm-foundry {size}B, {processes} H100, {length}{', full' if again else ''}"
        yield Published(name, tokens, sharded(MPT[size], h100, processes, recomputed=float(again)), rows(length, count))
    for size, processes, length, count, again, tokens in (
        (7, 8, 2048, 6, 0, 4_641), (7, 8, 1024, 64, 1, 4_357), (7, 8, 4096, 16, 1, 3_684), (7, 8, 8192, 8, 1, 3_206),
        (13, 8, 2048, 2, 0, 2_262), (7, 128, 2048, 18, 1, 3_623),
    ):  # fmt: skip
        name = f"llm-foundry {size}B, {processes} A100, {length}{', full' if again else ''}"
        yield Published(name, tokens, sharded(MPT[size], a100, processes, recomputed=float(again)), rows(length, count))
    yield Published("NeMo AutoModel 8B LoRA, 1 H100", 12_473, adapted(LLAMA, 41_943_040), rows(4096, 2))
    yield Published("NeMo AutoModel Qwen 7B LoRA, 1 H100", 14_110, adapted(QWEN, 40_370_176), rows(4096, 2))


def preferences() -> Iterator[Published]:
    """DPO of a 7B on eight H100, live reference, full recomputation: 8,000 tokens a micro-batch are assumed."""
    for name, shared, pairs_a_second in (("prompts shared", True, 53.21), ("prompts twice", False, 45.46)):
        count, of = pairs(shared)
        job = sharded(MISTRAL, GPUS["H100"], 8, recomputed=1.0, forwards=2, reference=True)
        yield Published(f"prefix-sharing DPO 7B, 8 H100, {name}", pairs_a_second / 8 / count * of.tokens, job, of)


def predicted(run: Published) -> float:
    return run.micro_batch.tokens / step(run.job, [[run.micro_batch]] * run.job.processes).seconds


@pytest.mark.parametrize("run", [*published()], ids=lambda run: run.name)
def test_a_published_run_is_predicted(run):
    assert predicted(run) == pytest.approx(run.tokens, rel=0.25)


def test_predictions_are_neither_too_fast_nor_too_slow_in_the_mean():
    errors = [math.log(predicted(run) / run.tokens) for run in published()]
    assert abs(fmean(errors)) < 0.08 and fmean(map(abs, errors)) < 0.12


@pytest.mark.parametrize("run", [*preferences()], ids=lambda run: run.name)
def test_published_dpo_is_slower_than_predicted(run):
    """By a trainer that does more than the mathematics (ZeRO-3, FlexAttention, whole logits), whose batch is unknown."""
    assert 1 < predicted(run) / run.tokens < 1.5


# --- real runs over gloo ---------------------------------------------------------------------------------------------

Cases = dict[str, tuple[str, ...]]
FULL = "model.activation_checkpointing=full"
ALONE: Cases = {"one process": (), "recomputing": (FULL,), "LoRA": ("trainer=lora",)}
TOGETHER: Cases = {
    "DDP, two processes": ("trainer=ddp",), "FSDP, two processes": ("trainer=fsdp",),
    "FSDP, two processes, recomputing": ("trainer=fsdp", FULL),
}  # fmt: skip
TOKENS, MICRO_BATCHES, STEPS = 512, 2, 3


def settings_of(case: tuple[str, ...], folder: str, processes: int) -> Settings:
    return parse(
        load_conf("stage=sft", *case, f"model.path={folder}", f"trainer.devices={processes}", "trainer.threads=1")
    )


class Clock(Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        self.since = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.since)


class Machine(NamedTuple):
    """What each of some processes finds here while the others do the same."""

    products: float  # fp32 FLOP/s of a layer's widest product
    memory: float  # bytes/s of a copy, read and written
    wire: float  # bytes/s of a layer's two gathers and one sum

    def gpu(self, share: float) -> GPU:
        single = self.products * share / PRODUCTS / 1e12
        return GPU(1, single, single, 1, self.memory / MEMORY / 1e9, self.wire / WIRE / 1e9, 1, 1)


def timed(what: Any, times: int = 8) -> float:
    """CPU seconds of this process with all its threads: others on the machine hardly change them."""
    what()
    found = []
    for _ in range(times):
        if dist.is_initialized():
            dist.barrier()
        since = time.process_time()
        what()
        found.append(time.process_time() - since)
    return min(found)


def machine(config: Any) -> Machine:
    narrow, wide = config.hidden_size, config.intermediate_size
    x, w, big = torch.randn(TOKENS, narrow), torch.randn(narrow, wide), torch.randn(8_000_000)
    products = 2 * TOKENS * narrow * wide / timed(lambda: x @ w)
    memory = 2 * big.nbytes / timed(big.clone)
    if not dist.is_initialized():
        return Machine(products, memory, 1e12)
    ranks = dist.get_world_size()
    own = torch.zeros(3 * narrow * wide // ranks)
    whole = torch.zeros(ranks * len(own))
    gather = timed(lambda: dist.all_gather_into_tensor(whole, own))
    scatter = timed(lambda: dist.reduce_scatter_tensor(own, whole))
    return Machine(products, memory, 3 * own.nbytes * (ranks - 1) / (2 * gather + scatter))


def run_all(cases: Cases, folder: str, processes: int) -> dict[str, list[float]]:
    """Seconds of a step of each, and what the machine did for so many processes right then."""
    torch.set_num_threads(1)
    found = {}
    with distributed.process_group("cpu") if processes > 1 else nullcontext():
        if processes > 1:
            distributed.process_group = lambda _: nullcontext()
        for name, case in cases.items():
            before = machine(check_policy(folder, None))
            train(settings_of(case, folder, processes), folder, clock := Clock())
            after = machine(check_policy(folder, None))
            found[name] = [min(clock.seconds[1:]), *map(max, zip(before, after, strict=True))]
    return found


def train(settings: Settings, folder: str, clock: Clock) -> None:
    choice = choose(settings.trainer, lambda: 0.0)
    with placed(choice, settings) as placement, tempfile.TemporaryDirectory() as scratch:
        start = Start("base", folder, None, check_policy(folder, None), "")
        data: Any = SimpleNamespace(train=SimpleNamespace(lengths=[0] * 100), total_steps=9)
        task = build_task(settings, start, data, placement, choice)
        trainer = L.Trainer(
            accelerator="cpu", devices=choice.devices, strategy=Ranks() if choice.processes > 1 else "auto",
            max_epochs=1, callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, plugins=[LightningEnvironment()],
            default_root_dir=scratch,
        )  # fmt: skip
        trainer.fit(task, DataLoader([[batch_of("sft", TOKENS)] * MICRO_BATCHES] * STEPS, batch_size=None))


def expected(case: tuple[str, ...], folder: str, processes: int, gpu: GPU) -> float:
    settings = settings_of(case, folder, processes)
    replicas = 1 if settings.trainer.strategy == "fsdp" else None
    job = make_job(settings, check_policy(folder, None), processes, replicas, None)
    job = replace(job, gpu=gpu, overlapping=False)
    return step(job, [[load(batch_of("sft", TOKENS))] * MICRO_BATCHES] * processes).seconds


def measured(folder: str, scratch: Path, alone: Cases, together: Cases) -> dict[str, tuple[float, float]]:
    """CPU seconds of a step, expected and measured. The first of one process says how well products do in real steps."""
    found: dict[str, tuple[float, float]] = {}
    share = 1.0
    for processes, cases in ((1, alone), (2, together)):
        run = spawn(run_all, 2, scratch, cases, folder, 2)[0] if processes > 1 else run_all(cases, folder, 1)
        for name, (seconds, *rest) in run.items():
            here = Machine(*rest)
            if not found:
                for _ in range(20):  # the share of the measured rate that explains the first case
                    share *= expected(cases[name], folder, processes, here.gpu(share)) / seconds
            found[name] = expected(cases[name], folder, processes, here.gpu(share)), seconds
    return found


def small(folder: Path) -> str:
    return base(folder, layers=4, width=384, vocabulary=2048)


def test_real_steps_of_one_and_two_processes_take_what_is_expected(tmp_path):
    """Roughly: gloo's share, and what FSDP does on a CPU beside it, vary."""
    alone = {name: ALONE[name] for name in ("one process", "recomputing")}
    together = {name: TOGETHER[name] for name in ("DDP, two processes", "FSDP, two processes")}
    found = measured(small(tmp_path / "base"), tmp_path / "ranks", alone, together)
    for name, (guess, truth) in found.items():
        assert 0.6 < guess / truth < 1.6, f"{name}: expected {guess:.2f} s, took {truth:.2f} s"
    assert found["FSDP, two processes"][0] > found["DDP, two processes"][0] > found["one process"][0]


def main() -> None:
    print(f"{'published run':<58}{'tokens/s a GPU':>15}{'predicted':>11}")
    for run in [*published(), *preferences()]:
        guess = predicted(run)
        print(f"{run.name:<58}{run.tokens:>15,.0f}{guess:>11,.0f}{guess / run.tokens - 1:>+7.0%}")
    print(f"\n{'here, CPU seconds a step':<58}{'measured':>15}{'predicted':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (guess, truth) in measured(
            small(Path(folder) / "base"), Path(folder) / "ranks", ALONE, TOGETHER
        ).items():
            print(f"{name:<58}{truth:>15.3f}{guess:>11.3f}{guess / truth - 1:>+7.0%}")


if __name__ == "__main__":
    main()
