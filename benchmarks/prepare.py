"""The preparation at scale: rows per second and core, memory at a tenth and at the whole, and kills survived.

`python -m benchmarks.prepare --rows 1000000 --output FILE` makes synthetic dialogues with known faults, prepares a
tenth and all of them with `python -m zephyr.prepare ultrachat`, watching the memory of all its processes, then kills
further runs with SIGKILL at random moments until one ends, and compares every file. JSON, and the same as lines.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.data.pool import cores

SENTENCES = 20_000
SMALL_WORDS = "the of and to in is that for it as with on by this are from be or an which can a".split()  # noqa: SIM905
REFUSAL = "As a program I do not have emotions."
POLL = 0.1  # s between two looks at memory


def sentences(draw: random.Random) -> list[str]:
    """English by its small words, invented by its others."""
    syllables = ["".join(parts) for parts in product("bcdfglmnprst", "aeiou", ["", "n", "r", "s", "l"])]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(30_000)]
    found = []
    for _ in range(SENTENCES):
        size = draw.randint(6, 20)
        text = " ".join(draw.choice(SMALL_WORDS if draw.random() < 0.45 else words) for _ in range(size)) + "."
        found.append(text if draw.random() < 0.05 else text[0].upper() + text[1:])
    return found


def dialogues(rows: int, seed: int) -> Iterator[bytes]:
    """Lines of 1.9 kB in the mean, with the faults that `expected` counts."""
    draw = random.Random(seed)
    known = sentences(draw)
    encoded = [json.dumps(text)[1:-1] for text in known]
    prompt, used = "", set[frozenset[int]]()
    for row in range(rows):
        if row % 1000 == 7:
            yield b'{"messages": [\n'
            continue
        if row % 40 != 21:
            # two of the three in common are not near, all three in any order are
            three = draw.sample(range(SENTENCES), 3)
            while frozenset(three) in used:
                three = draw.sample(range(SENTENCES), 3)
            used.add(frozenset(three))
            prompt = " ".join(encoded[number] for number in three)
        turns = []
        for turn in range(2 * draw.choice((1, 2, 3, 4))):
            text = " ".join(draw.choices(encoded, k=draw.randint(1, 2) if turn % 2 == 0 else draw.randint(2, 8)))
            turns.append((("user", "assistant")[turn % 2], text if turn else prompt))
        if row % 500 == 13:
            turns[1] = ("assistant", f"{REFUSAL} {turns[1][1]}")
        messages = ", ".join(f'{{"role": "{role}", "content": "{text}"}}' for role, text in turns)
        yield f'{{"messages": [{messages}]}}\n'.encode()


def expected(rows: int) -> dict[str, int]:
    """What the report has to say of them."""
    bad, refusals, near = (len(range(first, rows, step)) for first, step in ((7, 1000), (13, 500), (21, 40)))
    return {"rows_in": rows, "bad_rows": bad, "refusal": refusals, "near_duplicate": near,
            "rows_out": rows - bad - refusals - near}  # fmt: skip


def command(source: Path, output: Path, overrides: list[str]) -> list[str]:
    """The preparation as a user starts it."""
    return [sys.executable, "-m", "zephyr.prepare", "ultrachat", f"input={source}", f"output={output}", *overrides]


class Watched(NamedTuple):
    """A run to its end."""

    seconds: float
    peak: int  # bytes resident, of all its processes together
    each: int  # bytes resident, of the largest of them


def watch(line: list[str]) -> Watched:
    """Run it, looking at its memory all the while."""
    started = time.monotonic()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    peak = each = 0
    while process.poll() is None:
        found = [resident(number) for number in tree(process.pid)]
        peak, each = max(peak, sum(found)), max(each, *found, 0)
        time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"{line} ended with {process.returncode}")
    return Watched(time.monotonic() - started, peak, each)


def tree(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for number in found:
        try:
            for thread in Path(f"/proc/{number}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:
            continue  # it has just ended
    return found


def resident(number: int) -> int:
    """Bytes of memory a process has."""
    try:
        return int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def killed(line: list[str], draw: random.Random, seconds: float, kills: int) -> list[float]:
    """Kill it so many times, each at a random moment of its share of what it would have taken; then let it end. The
    moments, in seconds from each start."""
    moments = []
    for _ in range(kills):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait = draw.uniform(1.0, 0.8 * seconds / kills)  # together less than the whole, so that each meets it at work
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(round(wait, 1))
            time.sleep(1)
        else:
            raise SystemExit(f"It ended in {wait:.1f} s, before it could be killed: give more rows.")
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return moments


def digests(output: Path) -> dict[str, str]:
    """Of every file; of the report without what tells one run from another."""
    found = {}
    for path in sorted(file for file in output.rglob("*") if file.is_file()):
        if path.name == "report.json":
            report = json.loads(path.read_text())
            content = json.dumps({key: value for key, value in report.items() if key != "run"}).encode()
            found[path.name] = hashlib.sha256(content).hexdigest()
        else:
            with path.open("rb") as file:
                found[str(path.relative_to(output))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def account(output: Path, rows: int) -> dict[str, Any]:
    """The report's numbers, which must be those of the faults that were put in."""
    report = json.loads((output / "report.json").read_text())
    said = {name: report.get(name, report["dropped"].get(name)) for name in expected(rows)}
    if said != expected(rows):
        raise SystemExit(f"The report says {said}, and in the data are {expected(rows)}.")
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="7 GB for a million rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="keys of the preparation, e.g. truecase=null")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    draw = random.Random(options.seed)
    sizes = [options.rows // 10, options.rows]
    result: dict[str, Any] = {"cores": cores(), "overrides": options.overrides, "runs": []}
    try:
        for rows in sizes:
            source = folder / f"{rows}.jsonl"
            with source.open("wb") as file:
                file.writelines(dialogues(rows, options.seed))
            watched = watch(command(source, folder / f"out{rows}", options.overrides))
            report = account(folder / f"out{rows}", rows)
            run = {
                "rows": rows, "input_bytes": source.stat().st_size, "seconds": round(watched.seconds, 1),
                "rows_per_second": round(rows / watched.seconds, 1),
                "rows_per_second_and_core": round(rows / watched.seconds / report["run"]["processes"], 1),
                "peak_mib": round(watched.peak / 2**20, 1), "peak_mib_of_a_process": round(watched.each / 2**20, 1),
            }  # fmt: skip
            result["runs"].append(run)
            print("  ".join(f"{name} {value:,}" for name, value in run.items()), flush=True)
        small, large = (run["peak_mib"] for run in result["runs"])
        result["memory_growth"] = round(large / small - 1, 4)
        print(f"memory from {sizes[0]:,} to {sizes[1]:,} rows: {result['memory_growth']:+.1%}", flush=True)
        line = command(source, folder / "killed", options.overrides)
        result["killed_after_seconds"] = killed(line, draw, watched.seconds, options.kills)
        result["identical"] = digests(folder / "killed") == digests(folder / f"out{rows}")
        print(f"killed after {result['killed_after_seconds']} s: identical {result['identical']}")
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(folder)
    sys.exit(0 if result["identical"] else 1)


if __name__ == "__main__":
    main()
