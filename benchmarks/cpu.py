"""Zephyr's step against TRL's on a CPU: python -m benchmarks.cpu [--quick] --output FILE. See docs/benchmarks.md."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

_ENVIRONMENT = {  # settled before torch is loaded, which reads them once
    **{name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TQDM_DISABLE")},
    **{"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_MODE": "disabled"},
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.cpu", *sys.argv[1:]], os.environ | _ENVIRONMENT)

import torch  # noqa: E402

from benchmarks import floor, loops, machine, shapes, turns  # noqa: E402
from benchmarks.child import in_child  # noqa: E402
from benchmarks.loops import Job, Record  # noqa: E402
from zephyr.data.batch import Pair, pack_pairs  # noqa: E402

LOSS, GRADIENT = 1e-5, 5e-5  # relative; of the gradient, in L2, for each parameter
LATE = 270.0  # seconds after which a quick run is content with one round a case: the machine is busy
PROTOCOL = (
    "Same weights, token ids, examples of each step, AdamW (fused), learning rate, clipping at 1.0, fp32, one thread. "
    "In one process the real training loops (lightning.Trainer.fit, transformers.Trainer.train) take turns step by "
    "step, the order reversed every other round, one running at a time. A turn goes from the end of a step to the end "
    "of the next: collation, both passes, clipping, the optimizer's step, logging. The first step warms up; it must "
    f"have the same loss on both sides within {LOSS:g} and gradients within {GRADIENT:g} a parameter, relative. A "
    "round's ratio is TRL's CPU seconds divided by Zephyr's for the same examples; the median over rounds counts. "
    "Tokens are the examples' real ones, without padding, a prompt counted with each of its completions, on both "
    "sides. trl: as it comes. trl_best: without activation checkpointing, and scoring completions alone as it does on "
    "CUDA. trl_sorted: that, over batches sorted by length. dpo_memory: peak minus resting resident memory of a step, "
    "a process each, both with full activation checkpointing; Zephyr's divided by TRL's. floor: time of the step's "
    "necessary products, as torch multiplies, divided by Zephyr's step; floor_fastest: by the faster of its libraries."
)


class Case(NamedTuple):
    """What is compared."""

    shape: shapes.Shape
    examples: int  # of a step
    lengths: Any  # of pairs, or (least, most) tokens of a sequence
    lora: bool = False
    precomputed: bool = False

    def steps(self, count: int, short_warmup: bool, seed: int) -> list[list[Any]]:
        """A warm-up step and `count` more."""
        sizes = [self._short() if short_warmup else self.lengths, *[self.lengths] * count]
        return [self._step(lengths, 1000 * seed + index) for index, lengths in enumerate(sizes)]

    def _short(self) -> Any:
        return (60, 100) if isinstance(self.lengths, tuple) else shapes.SHORT

    def _step(self, lengths: Any, seed: int) -> list[Any]:
        if isinstance(lengths, tuple):
            return shapes.random_conversations(self.examples, lengths, self.shape.vocabulary, seed)
        return shapes.random_pairs(self.examples, lengths, self.shape.vocabulary, seed)


_EVEN = shapes.uniform((200, 600), (100, 400))
CASES = {
    "dpo_body": Case(shapes.BODY, 2, _EVEN),
    "dpo_mixed": Case(shapes.MIXED, 4, _EVEN),
    "dpo_vocabulary": Case(shapes.VOCABULARY, 2, _EVEN),
    "dpo_ultrafeedback": Case(shapes.MIXED, 8, shapes.ultrafeedback),
    "dpo_precomputed": Case(shapes.BODY, 2, _EVEN, precomputed=True),
    "dpo_lora": Case(shapes.BODY, 2, _EVEN, lora=True),
    "dpo_memory": Case(shapes.MIXED, 4, _EVEN),
    "sft": Case(shapes.MIXED, 8, (300, 1000)),
}
Loop = Callable[[Job, Record, Path, Callable[[], None]], None]
CONTENDERS: dict[str, Loop] = {
    "zephyr": loops.zephyr_loop,
    "trl": lambda job, record, folder, ended: loops.trl_loop(job, record, folder, False, ended),
    "trl_best": lambda job, record, folder, ended: loops.trl_loop(job, record, folder, True, ended),
    "trl_sorted": lambda job, record, folder, ended: loops.trl_loop(sorted_by_length(job), record, folder, True, ended),
}


def sorted_by_length(job: Job) -> Job:
    """The same, the examples of all steps but the first and the last, which are not timed, put together by length."""
    warmup, *timed, last = job.steps

    def longest(example: Any) -> int:
        if isinstance(example, Pair):
            return len(example.prompt) + max(len(example.chosen), len(example.rejected))
        return len(example.ids)

    examples = sorted((example for step in timed for example in step), key=longest)
    size = len(warmup)
    steps = [examples[i : i + size] for i in range(0, len(examples), size)]
    return replace(job, steps=[warmup, *steps, last])


def equality(ours: Record, theirs: Record) -> dict[str, float]:
    """How far two first steps are apart; raises AssertionError where that is too far."""
    loss = abs(ours.losses[0] - theirs.losses[0]) / abs(theirs.losses[0])
    assert ours.gradient.keys() == theirs.gradient.keys(), "other parameters are trained"
    gradient = max(
        ((ours.gradient[name] - other).norm() / other.norm()).item() for name, other in theirs.gradient.items()
    )
    assert loss <= LOSS, f"losses {ours.losses[0]} and {theirs.losses[0]} are {loss:.1e} apart"
    assert gradient <= GRADIENT, f"a parameter's gradients are {gradient:.1e} apart"
    return {"loss": loss, "gradient": gradient}


def compare(case: Case, names: list[str], rounds: int, folder: Path, quick: bool, with_floor: bool) -> dict[str, Any]:
    """One case in this process: every contender's figures, and what the rounds' ratios are."""
    reference, policy = shapes.save_models(case.shape, folder)
    job = Job(
        case.steps(rounds + (not quick or rounds > 1), quick, seed=1), reference, policy, case.lora, case.precomputed
    )
    records = {name: Record() for name in names}
    # TRL's defaults are the slowest, and not what is to be beaten: a quick run plays them in its last round alone
    played = {name: [rounds - 1] if quick and name == "trl" else [*range(rounds)] for name in names}
    warmup, *timed = job.steps
    # after a short warm-up, a step of full size, without which the first round pays for memory that later ones find
    settling = [timed.pop()] if quick and rounds > 1 else []
    jobs = {}
    for name in names:
        own = (settling if name != "trl" else []) + [timed[i] for i in played[name]]
        jobs[name] = replace(job, steps=[warmup, *own, *timed[rounds:]])
    players = {
        name: turns.Player(name, partial(CONTENDERS[name], jobs[name], records[name], folder / name)) for name in names
    }
    for player in players.values():
        player.turn()
    apart = {name: equality(records["zephyr"], records[name]) for name in names if name != "zephyr"}
    for record in records.values():
        record.gradient = {}
    for name in names:
        if settling and name != "trl":
            players[name].turn()
    spent: dict[str, list[turns.Cost]] = {name: [] for name in names}
    floors = []
    rate = floor.product_rate()
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if number in played[name]:
                spent[name].append(players[name].turn())
        if with_floor:
            floors.append(floor.floor_seconds(case.shape, pack_pairs(timed[number])))
    memory = {} if quick else {name: turns.transient_mib(player.turn) for name, player in players.items()}
    for player in players.values():
        player.end()

    tokens = [sum(map(shapes.real_tokens, step)) for step in timed[:rounds]]
    needed = [_needed(case, step) for step in timed[:rounds]]
    figures = {}
    for name, costs in spent.items():
        total = sum(costs, turns.Cost(0.0, 0.0))
        counted, done = sum(tokens[i] for i in played[name]), sum(needed[i] for i in played[name])
        figures[name] = {
            "tokens_per_cpu_second": counted / total.cpu_seconds,
            "cpu_seconds": total.cpu_seconds,
            "seconds": total.seconds,
            "steps": len(costs),
            "tokens": counted,
            "mfu": done / total.cpu_seconds / rate,
            "step_memory_mib": memory.get(name),
            "losses": records[name].losses,
            **({"first_step_apart": apart[name]} if name in apart else {}),
        }
    ratios = {
        other: [
            theirs.cpu_seconds / spent["zephyr"][number].cpu_seconds
            for number, theirs in zip(played[other], spent[other], strict=True)
        ]
        for other in names
        if other not in ("zephyr", "trl_sorted")
    }
    if "trl_sorted" in names:  # its rounds hold other examples than Zephyr's; all together they are the same
        ratios["trl_sorted"] = [figures["trl_sorted"]["cpu_seconds"] / figures["zephyr"]["cpu_seconds"]]
    ours = [cost.cpu_seconds for cost in spent["zephyr"]]
    shares = [(plain / step, fastest / step) for (plain, fastest), step in zip(floors, ours, strict=False)]
    return {"figures": figures, "ratios": ratios, "floor": shares, "product_gflops": rate / 1e9}


def _needed(case: Case, step: list[Any]) -> float:
    """Floating-point operations that a step needs by its mathematics: prompts once, no padding, no recomputation."""
    batch = shapes.InMemory(step).pack(list(range(len(step))))
    reference = isinstance(step[0], Pair) and not case.precomputed
    forward = floor.linear_flops(case.shape, batch)
    # an adapter's base takes no gradient: there the backward pass costs as much as a forward one
    linear = (2 if case.lora else 3) + reference
    return linear * forward + (3 + reference) * floor.attention_flops(case.shape, batch)


def step_memory(case: Case, name: str, folder: Path, steps: int, quick: bool) -> dict[str, Any]:
    """Peak minus resting memory of each of some steps in this process, where nothing else is."""
    reference, policy = folder / "reference", folder / "policy"
    job = Job(case.steps(steps, quick, seed=2), reference, policy, checkpointing="full")
    record = Record()
    player = turns.Player(name, partial(CONTENDERS[name], job, record, folder / name))
    player.turn()
    torch.save(record.gradient, folder / f"{name}.pt")
    record.gradient = {}
    found = [turns.transient_mib(player.turn) for _ in range(steps)]
    player.end()
    return {"mib": found, "losses": record.losses, "peak": turns.peak_mib()}


def compare_memory(case: Case, folder: Path, steps: int, quick: bool) -> dict[str, Any]:
    """Zephyr's memory against TRL's, a process each."""
    in_child(shapes.save_models, case.shape, folder)
    found = {name: in_child(step_memory, case, name, folder, steps, quick) for name in ("zephyr", "trl")}
    records = {
        name: Record(one["losses"], gradient=torch.load(folder / f"{name}.pt", weights_only=True))
        for name, one in found.items()
    }
    apart = equality(records["zephyr"], records["trl"])
    figures = {
        name: {"step_memory_mib": median(one["mib"]), "peak_memory_mib": one["peak"], "losses": one["losses"]}
        for name, one in found.items()
    }
    figures["trl"]["first_step_apart"] = apart
    ratios = [ours / theirs for ours, theirs in zip(found["zephyr"]["mib"], found["trl"]["mib"], strict=True)]
    return {"figures": figures, "ratios": {"trl_best": ratios, "trl": ratios}}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file's ratios and figures, from each case's."""
    rounds: dict[str, dict[str, list[float]]] = {"ratios": {}, "ratios_default": {}, "ratios_sorted": {}}
    for case, result in results.items():
        for key, other in (("ratios", "trl_best"), ("ratios_default", "trl"), ("ratios_sorted", "trl_sorted")):
            if other in result["ratios"]:
                rounds[key][case] = result["ratios"][other]
        for name, shares in zip(("floor", "floor_fastest"), zip(*result.get("floor", []), strict=True), strict=False):
            rounds["ratios"][name] = rounds["ratios_default"][name] = list(shares)
    medians = {key: {case: median(values) for case, values in cases.items()} for key, cases in rounds.items()}
    spread = {
        key: {case: {"min": min(values), "max": max(values), "rounds": values} for case, values in cases.items()}
        for key, cases in rounds.items()
    }
    return {**medians, "spread": spread, "cases": {case: result["figures"] for case, result in results.items()}}


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, write the file, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two rounds (TRL's defaults: one), a short warm-up: minutes"
    )
    parser.add_argument("--rounds", type=int, help="default: 5, quick 2")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (2 if options.quick else 5)
    names = ["zephyr", "trl_best", "trl"] + ([] if options.quick else ["trl_sorted"])

    import lightning
    import trl

    from zephyr import dpo, sft  # noqa: F401

    assert hasattr(trl, "DPOTrainer") and hasattr(trl, "SFTTrainer") and lightning  # what the processes start with
    results: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for name in options.cases:
        case = CASES[name]
        late = options.quick and time.monotonic() - began > LATE
        with tempfile.TemporaryDirectory() as folder:
            if name == "dpo_memory":
                results[name] = compare_memory(case, Path(folder), 1 if options.quick else rounds, options.quick)
            else:
                floored, of = name == "dpo_body", 1 if late else rounds
                results[name] = in_child(compare, case, names, of, Path(folder), options.quick, floored)
        said = ", ".join(f"{median(v):.2f} of {k}" for k, v in results[name]["ratios"].items())
        print(f"{time.monotonic() - began:5.0f} s  {name}: first steps equal; {said}", file=sys.stderr, flush=True)
    written = {
        **summary(results),
        "quick": options.quick,
        "rounds": rounds,
        "seconds": time.monotonic() - began,
        "versions": machine.versions(),
        "machine": machine.machine(),
        "protocol": PROTOCOL,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n")
    from benchmarks.table import cpu_table

    print(cpu_table(written))


if __name__ == "__main__":
    main()
