"""Zephyr at Mistral-7B's shape on one GPU, beside TRL where that is installed, in under ten minutes.

    python -m benchmarks.gpu --output FILE                                the 7B shape on CUDA
    python -m benchmarks.gpu --shape tiny --device cpu --output FILE      a dry run of the same program

Weights are random and made on the device; nothing is downloaded, and nothing needs Hydra or a tokenizer's files. What
does not fit, or is not installed, is left out with its reason.
"""

import argparse
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from transformers import AutoModelForCausalLM

from benchmarks import loops, machine, ms_swift, shapes
from benchmarks.loops import Job, Record
from benchmarks.turns import Finished, peak_mib
from zephyr.data.batch import Batch, Pair
from zephyr.planning.flops import ModelSize, model_size, needed_flops
from zephyr.planning.flops import load as load_of

SHAPES = {"7b": shapes.MISTRAL_7B, "tiny": shapes.TINY}
PAIRS, ROWS, ROW = 8, 4, 2048  # pairs of a DPO step; rows of an SFT step, and tokens of each
PROTOCOL = (
    "One training loop at a time (Lightning's around Zephyr's task, transformers' around TRL's), random weights of the "
    "shape, random tokens; DPO steps of 8 pairs of UltraFeedback-like lengths, SFT steps of 4 rows of 2,048 tokens. "
    "Times are wall time between ends of steps with the device synchronised, after warm-up steps that are not counted; "
    "the median step counts. Tokens are real ones, a prompt counted with each completion; packed tokens count it once. "
    "MFU: the operations that a step's mathematics needs (zephyr.planning.flops: prompts once, no padding, no "
    "recomputation, attention counted causally) a second, over the device's data sheet (989 TFLOP/s for H100 and "
    "H200); of_product: the same over the rate of a large bf16 product measured first."
)


class Way(NamedTuple):
    """How weights, state and activations are held; the first of a configuration's ways that fits is measured."""

    precision: str
    optimizer: str
    checkpointing: str
    pieces: int = 1  # in which a peer takes a step; Zephyr cuts one by tokens


class Configuration(NamedTuple):
    """One row of the table."""

    stage: str  # dpo or sft
    ways: list[Way]
    lora: bool = False
    precomputed: bool = False
    quantization: str | None = None
    pairs: int = PAIRS
    compile: bool = False
    peer: bool = False  # TRL is run as well


_MASTER = [Way("bf16-mixed", "adamw_8bit", kept) for kept in ("none", "selective", "full")]  # fp32 weights
_PURE = [Way("bf16-true", "adamw_8bit", kept) for kept in ("none", "selective", "full")]  # stochastic rounding
_ADAPTER = [Way("bf16-mixed", "adamw", kept) for kept in ("none", "selective", "full")]
CONFIGURATIONS = {
    "dpo_lora": Configuration("dpo", _ADAPTER, lora=True, peer=True),
    "dpo_cached": Configuration("dpo", _MASTER, precomputed=True),
    "dpo_live": Configuration("dpo", _MASTER[1:]),  # fp32 weights twice leave no room for all activations
    "dpo_live_bf16": Configuration("dpo", _PURE, peer=True),
    "sft": Configuration("sft", _MASTER, peer=False),
    "sft_bf16": Configuration("sft", _PURE, peer=True),
    "sft_lora": Configuration("sft", _ADAPTER, lora=True, peer=True),
    "qlora_dpo_memory": Configuration("dpo", _ADAPTER, lora=True, quantization="nf4", pairs=1),
    "dpo_lora_compiled": Configuration("dpo", _ADAPTER, lora=True, compile=True),  # may take minutes: the last
}


def product_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a square product of random numbers; zeros would run a tenth faster."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    count, start = 10, _now(device)
    for _ in range(count):
        a @ b
    return count * 2.0 * size**3 / (_now(device) - start)


def check_attention(shape: shapes.Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The attention of a packed row of pairs, and its gradients, against a dense mask in fp64.

    Returns the relative L2 errors; raises AssertionError above 1e-2 (bf16) or 1e-5.
    """
    from zephyr.models.attention import Plan, attend

    batch = shapes.InMemory(shapes.random_pairs(3, shapes.ultrafeedback, shape.vocabulary, 5)).pack([0, 1, 2])
    tokens, size = len(batch.ids), shape.hidden // shape.heads
    generator = torch.Generator().manual_seed(0)
    heads = shape.heads, shape.key_value_heads, shape.key_value_heads
    given = [torch.randn(tokens, n, size, generator=generator).to(device, dtype).requires_grad_() for n in heads]
    weight = torch.randn(tokens, shape.heads, size, generator=generator).to(device)
    found = attend(*given, Plan(batch.segments, tokens, device), size**-0.5)
    (found.float() * weight).sum().backward()

    wide = [x.detach().double().requires_grad_() for x in given]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in batch.segments:
        seen[start:end, prefix_start:prefix_end] = True
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    q, k, v = (x.transpose(0, 1) for x in wide)
    k, v = (x.repeat_interleave(shape.heads // shape.key_value_heads, 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * size**-0.5).masked_fill(~seen.to(device), float("-inf"))
    truth = (F.softmax(scores, -1) @ v).transpose(0, 1)
    (truth * weight).sum().backward()
    pairs = {"output": (found, truth)} | {n: (x.grad, y.grad) for n, x, y in zip("qkv", given, wide, strict=True)}
    apart = {name: ((x.double() - y).norm() / y.norm()).item() for name, (x, y) in pairs.items()}
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert max(apart.values()) < limit, f"attention is off: {apart}"
    return apart


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Inside, loading a model makes one of its configuration on the device, every time with the same weights."""

    def made(path: str, *_: Any, dtype: torch.dtype, output_loading_info: bool = False, **options: Any) -> Any:
        config = options.get("config") or shapes.MistralConfig.from_pretrained(path)
        kind = {"attn_implementation": options.get("attn_implementation", "sdpa"), "dtype": dtype}
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, **kind)
        model.config._name_or_path = str(path)
        return (model, {"missing_keys": [], "mismatched_keys": []}) if output_loading_info else model

    with patch.object(AutoModelForCausalLM, "from_pretrained", made):
        yield


def build_job(
    configuration: Configuration, way: Way, shape: shapes.Shape, device: str, folder: Path, steps: int
) -> Job:
    """What a configuration trains in this way."""
    scale = 1 if shape.hidden > 1000 else 8  # the dry run's lengths
    if configuration.stage == "sft":
        row = ROW // scale
        given = [shapes.random_conversations(ROWS, (row, row), shape.vocabulary, n) for n in range(steps)]
    else:

        def lengths(draw: Any) -> tuple[int, int, int]:
            prompt, chosen, rejected = shapes.ultrafeedback(draw)
            return max(2, prompt // scale), max(2, chosen // scale), max(2, rejected // scale)

        count = configuration.pairs
        given = [shapes.random_pairs(count, lengths, shape.vocabulary, n) for n in range(steps)]
    return Job(
        steps=given,
        reference=folder,
        policy=folder,
        lora=configuration.lora,
        precomputed=configuration.precomputed,
        checkpointing=way.checkpointing,
        device=device,
        precision=way.precision,
        optimizer=way.optimizer,
        compile=configuration.compile,
        quantization=configuration.quantization,
    )


def measure(loop: Callable[..., None], job: Job, folder: Path, warmup: int, seconds: float) -> dict[str, Any]:
    """Run a loop over the job's steps, or until the seconds are over; its median step after the warm-up."""
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ends: list[float] = []
    began = time.perf_counter()

    def step_ended() -> None:
        ends.append(_now(device))
        late = time.perf_counter() - began > seconds and len(ends) > warmup + 1
        if late or len(ends) == len(job.steps):
            raise Finished

    record = Record(wants_gradient=False)
    # Lightning would move weights and optimizer to the host when it ends: tens of GiB that nobody wants there.
    with suppress(Finished), patch.object(Strategy, "teardown", lambda _: None):
        loop(job, record, folder, step_ended)
    times = [after - before for before, after in zip(ends[warmup - 1 : -1], ends[warmup:], strict=True)]
    batches = [shapes.InMemory(step).pack(list(range(len(step)))) for step in job.steps[warmup : len(ends)]]
    real = [sum(map(shapes.real_tokens, step)) for step in job.steps[warmup : len(ends)]]
    total = sum(times)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_mib() / 1024
    return {
        "steps": len(times),
        "seconds_a_step": sorted(times)[len(times) // 2],
        "tokens_per_second": sum(real) / total,
        "packed_tokens_per_second": sum(len(batch.ids) for batch in batches) / total,
        "examples_per_second": sum(batch.examples for batch in batches) / total,
        "peak_memory_gib": peak,
        "losses": record.losses,
        "flops_per_second": _needed(job, batches) / total,
    }


def _needed(job: Job, batches: list[Batch]) -> float:
    live = isinstance(job.steps[0][0], Pair) and not job.precomputed
    return sum(needed_flops(_size(job), load_of(batch), live) for batch in batches)


def _size(job: Job) -> ModelSize:
    config = shapes.MistralConfig.from_pretrained(job.policy)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = model_size(model)
    return size._replace(body_trained=0, head_trained=0) if job.lora else size


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attempt(configuration: Configuration, run: Callable[[Way], dict[str, Any]]) -> dict[str, Any]:
    """What the first way that fits gives; a reason where none does, or where something is not installed."""
    if configuration.quantization and find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    tried = []
    for way in configuration.ways:
        failed = None
        try:
            return {**way._asdict(), **run(way), "did_not_fit": tried}
        except torch.OutOfMemoryError:
            tried.append(way._asdict())
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if failed is not None:
            return {"skipped": failed, "did_not_fit": tried}
    return {"skipped": "does not fit", "did_not_fit": tried}


def run_one(
    name: str, contender: str, shape: shapes.Shape, device: str, folder: Path, steps: int, warmup: int, seconds: float
) -> dict[str, Any]:
    """A configuration's figures, of Zephyr (`zephyr`), of TRL (`trl`, `trl_best`) or of ms-swift (`ms_swift`)."""
    configuration = CONFIGURATIONS[name]
    if contender != "zephyr":
        absent = ms_swift.missing(device)
        if contender == "ms_swift" and absent:
            return {"skipped": absent}
        if contender != "ms_swift" and (find_spec("trl") is None or find_spec("datasets") is None):
            return {"skipped": "trl or datasets is not installed"}
        if contender != "ms_swift" and not absent:
            return {"skipped": "not beside ms-swift, which takes TRL's trainer apart"}
        # Peers hold trained weights in one dtype, and save memory by checkpointing (TRL's default) or in pieces
        first = configuration.ways[0]
        configuration = configuration._replace(ways=[first._replace(optimizer="adamw", pieces=n) for n in (1, 2, 4)])

    def run(way: Way) -> dict[str, Any]:
        job = build_job(configuration, way, shape, device, folder, steps)
        made = torch.device(device)
        if configuration.quantization:  # bitsandbytes quantises what it reads from files
            with random_weights(made):
                loops.settled(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16), folder / "whole")
            job = replace(job, policy=folder / "whole", reference=folder / "whole")
            return measure(loops.zephyr_loop, job, folder, warmup, seconds)
        loop: Any = loops.zephyr_loop
        if contender != "zephyr":
            dtype = torch.bfloat16 if configuration.lora or way.precision == "bf16-true" else torch.float32
            if contender == "ms_swift":
                loop = partial(ms_swift.loop, dtype, way.pieces)
            else:
                loop = partial(_trl, contender == "trl_best", dtype, way.pieces)
        with random_weights(made):
            return measure(loop, job, folder, warmup, seconds)

    return attempt(configuration, run)


def _trl(
    best: bool,
    dtype: torch.dtype,
    pieces: int,
    job: Job,
    record: Record,
    folder: Path,
    ended: Callable[[], None],
) -> None:
    sizes = {
        "per_device_train_batch_size": len(job.steps[0]) // pieces,
        "gradient_accumulation_steps": pieces,
        "max_length": ROW,
    }
    loops.trl_loop(job, record, folder / "trl", best, ended, dtype=dtype, **sizes)


def main(arguments: list[str] | None = None) -> None:
    """Measure everything that fits into the time, write the file, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no configuration is begun after so long")
    parser.add_argument("--steps", type=int, default=11, help="of each loop, the warm-up among them")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows differ in length
    warnings.filterwarnings("ignore")
    shape, device = SHAPES[options.shape], torch.device(options.device)
    dry = device.type == "cpu"
    steps, warmup = (min(options.steps, 4), 1) if dry else (options.steps, 3)
    began = time.monotonic()
    dtype = torch.float32 if dry else torch.bfloat16
    result: dict[str, Any] = {
        "protocol": PROTOCOL,
        "shape": shape._asdict(),
        "versions": machine.versions(),
        "machine": machine.machine(),
        "product_flops": product_rate(device, 512 if dry else 8192),
        "attention_apart": check_attention(shape, device, dtype),
        "cases": {},
    }
    print(f"product {result['product_flops'] / 1e12:.2f} TFLOP/s; attention {result['attention_apart']}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape.config().save_pretrained(folder)
        for case in options.only:
            peers = ["trl_best", "trl"] + ["ms_swift"] * (CONFIGURATIONS[case].stage == "dpo")
            contenders = ["zephyr", *(peers if CONFIGURATIONS[case].peer else [])]
            figures: dict[str, Any] = {}
            for contender in contenders:
                spent = time.monotonic() - began
                if spent > options.minutes * 60:
                    figures[contender] = {"skipped": f"{options.minutes:g} minutes were over"}
                elif dry and CONFIGURATIONS[case].compile:
                    figures[contender] = {"skipped": "compiling for a processor takes minutes"}
                else:
                    one = run_one(case, contender, shape, options.device, folder, steps, warmup, 40.0)
                    _shares(one, result["product_flops"], device)
                    figures[contender] = one
                said = figures[contender].get("skipped") or f"{figures[contender]['tokens_per_second']:,.0f} tokens/s"
                print(f"{time.monotonic() - began:5.0f} s  {case} {contender}: {said}", flush=True)
            result["cases"][case] = figures
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")  # what there is, should time run out
    from benchmarks.table import gpu_table

    print(gpu_table(result))


def _shares(figures: dict[str, Any], product: float, device: torch.device) -> None:
    from zephyr.observe.throughput import peak_flops

    if "flops_per_second" in figures:
        peak = peak_flops(device)
        figures["mfu"] = None if peak is None else figures["flops_per_second"] / peak
        figures["of_product"] = figures["flops_per_second"] / product


if __name__ == "__main__":
    main()
