"""How cost grows with size: python -m benchmarks.growth --output FILE. On a CPU, one thread, fp32.

time     CPU seconds a token over steps of 2^12 to 2^17 tokens        flat within 25 %
memory   activations of a step at vocabularies of 32,000 and 256,000  flat within 10 %
steps    resident memory and compiled graphs over 500 steps           memory within 16 MiB, graphs constant
"""

import argparse
import gc
import json
import tempfile
import threading
from ctypes import CDLL
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import loops, machine, shapes, turns
from benchmarks.child import in_child
from benchmarks.loops import Job, Record

TIME, MEMORY, RESIDENT = 0.25, 0.10, 16.0  # relative, relative, MiB
SMALL = shapes.Shape(128, 2, 448, 4, 2, 2048)
NARROW = shapes.Shape(16, 1, 32, 2, 1, 32000)  # so that what rests, [vocabulary, hidden], is small beside the scores
_SHORT = shapes.uniform((64, 128), (32, 96))
_VARYING = shapes.uniform((5, 120), (5, 80))


def time_a_token(powers: list[int], timed: int = 3) -> dict[int, float]:
    """CPU seconds a packed token of the whole training loop, by the tokens of a step; a step has many micro-batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, policy = shapes.save_models(SMALL, folder)
        players, tokens = {}, {}
        for power in powers:
            steps = _steps_of(2**power, timed + 1)
            tokens[power] = [sum(sum(map(len, pair)) for pair in step) for step in steps]
            job = Job(steps, reference, policy)
            loop = partial(loops.zephyr_loop, job, Record(wants_gradient=False), folder / str(power))
            players[power] = turns.Player(str(power), loop)
            players[power].turn()
        found: dict[int, list[float]] = {power: [] for power in powers}
        for number in range(1, timed + 1):  # in turns, so that a busy moment of the machine falls on all
            for power in powers if number % 2 else reversed(powers):
                found[power].append(players[power].turn().cpu_seconds / tokens[power][number])
        for player in players.values():
            player.end()
        return {power: median(values) for power, values in found.items()}


def _steps_of(tokens: int, count: int) -> list[list[Any]]:
    """Steps of the same number of pairs, of about so many packed tokens."""
    each = 96 + 2 * 64  # the mean of a pair
    pairs = round(tokens / each)
    return [shapes.random_pairs(pairs, _SHORT, SMALL.vocabulary, seed) for seed in range(count)]


def activations(vocabulary: int, steps: int = 3) -> float:
    """MiB of a DPO step above what rests: weights, gradients, optimizer state and the reference rest.

    Between steps the gradients of the last one are still held, so that they belong to what rests.
    """
    shape = NARROW._replace(vocabulary=vocabulary)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, policy = shapes.save_models(shape, folder)
        # Enough scored tokens to fill the head's buffer: fewer would take less. Eight completions of 262 fill it whole
        # at 32,000 entries, and an eighth of them do at 256,000.
        fixed = shapes.uniform((100, 100), (262, 262))
        given = [shapes.random_pairs(4, fixed, vocabulary, seed) for seed in range(steps + 1)]
        loop = partial(loops.zephyr_loop, Job(given, reference, policy), Record(wants_gradient=False), folder)
        player = turns.Player("activations", loop)
        player.turn()
        found = [turns.transient_mib(player.turn) for _ in range(steps)]
        player.end()
        return median(found)


def many_steps(steps: int, settled: int, compile: bool = True) -> dict[str, Any]:
    """Resident memory and compiled graphs after `settled` steps and after all, over pairs whose lengths vary."""
    from torch._dynamo.utils import counters

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, policy = shapes.save_models(shapes.TINY, folder)
        given = [shapes.random_pairs(2, _VARYING, shapes.TINY.vocabulary, seed) for seed in range(steps + 1)]
        job = Job(given, reference, policy, compile=compile)
        player = turns.Player("steps", partial(loops.zephyr_loop, job, Record(wants_gradient=False), folder))
        seen = []
        for step in range(1, steps + 1):
            player.turn()
            if step in (settled, steps):
                gc.collect()
                CDLL("libc.so.6").malloc_trim(0)
                graphs = counters["stats"]["unique_graphs"]
                seen.append({"step": step, "resident_mib": turns.resident_mib(), "graphs": graphs})
        player.end()
        return {
            "at": seen,
            "growth_mib": seen[1]["resident_mib"] - seen[0]["resident_mib"],
            "new_graphs": seen[1]["graphs"] - seen[0]["graphs"],
            "lengths": len({sum(map(len, pair)) for step in given for pair in step}),
            "threads": threading.active_count(),
        }


def main(arguments: list[str] | None = None) -> None:
    """Measure all three, write the file, print the table; exit status 1 where a bound is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    costs = in_child(time_a_token, list(range(12, 18)))
    memory = {vocabulary: in_child(activations, vocabulary) for vocabulary in (32000, 256000)}
    long = in_child(many_steps, options.steps, options.steps // 5)
    result = {
        "time": {
            "cpu_microseconds_a_token": {2**power: 1e6 * cost for power, cost in costs.items()},
            "largest_of_smallest": max(costs.values()) / min(costs.values()),
            "allowed": 1 + TIME,
        },
        "memory": {"mib": memory, "large_of_small": memory[256000] / memory[32000], "allowed": 1 + MEMORY},
        "steps": {**long, "allowed_mib": RESIDENT},
        "versions": machine.versions(),
        "machine": machine.machine(),
        "protocol": __doc__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    from benchmarks.table import growth_table

    print(growth_table(json.loads(options.output.read_text())))
    kept = result["time"]["largest_of_smallest"] <= 1 + TIME and result["memory"]["large_of_small"] <= 1 + MEMORY
    if not (kept and long["growth_mib"] <= RESIDENT and long["new_graphs"] == 0):
        raise SystemExit("a bound is broken")


if __name__ == "__main__":
    main()
