"""AI feedback under faults, under kills and at speed: `python -m benchmarks.feedback --folder DIR --output FILE`.

A scripted OpenAI-compatible server answers `python -m zephyr.feedback`: prompts with four completions each, and five
judgements of each completion. Four proofs, together or one (`--only faults`):

faults      30 % of all requests meet a 429, a 500, a connection that drops, half a body, garbage, silence, wrong ids or
            a slow stream: the files must be those of a run without faults, byte for byte
kills       SIGKILL at random moments, the last start ends: the same files; nothing that the ledger held is asked again;
            what had been answered and was asked again, by the server's own count, is reported
throughput  requests a second with a server that answers in 50 ms and 64 in flight, as a share of the ideal 1,280, and
            of what a loop of bare aiohttp requests reaches in turns with it, which keeps, repeats and bounds nothing;
            likewise of the whole command, prompts to files, by its own report
ledger      what a reply costs to record and to find among a thousand and among a million
"""

import argparse
import asyncio
import hashlib
import json
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.openai_server import FAULTS, GOOD, Answer, Seen, Server
from zephyr.feedback.client import Client
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Limits, Model
from zephyr.feedback.request import Reply, Request
from zephyr.feedback.server import Endpoint

FAULTY = 0.3  # share of requests
KINDS = [name for name in FAULTS if name != "wrong model"]  # any name is taken where answers_as is not set
REQUESTS = 12  # of a prompt: four completions, four aspects, four critiques
TIMED_OUT = 2.0  # seconds, after which a server that says nothing has failed


def command(url: str, prompts: Path, output: Path, concurrency: int = 64) -> list[str]:
    """A pool of six, of which each prompt gets four, and the judge, on one server."""
    models = ", ".join(f'{{name: m{n}, base_url: "{url}"}}' for n in range(6))
    limits = {
        "concurrency": concurrency, "attempts": 20, "backoff": 0.02, "total_seconds": TIMED_OUT, "patience": 60,
    }  # fmt: skip
    return [
        *(sys.executable, "-m", "zephyr.feedback", f"prompts={prompts}", f"output={output}", f"models=[{models}]"),
        *(f"judge.base_url={url}", "judge.model=teacher"),
        *(f"limits.{name}={value}" for name, value in limits.items()),
    ]


def write_prompts(path: Path, count: int) -> None:
    """Prompts that differ, of two sources."""
    rows = ({"prompt": f"What is {n} and {n}?", "source": ("sums", "evol_instruct")[n % 2]} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def digests(output: Path) -> dict[str, str]:
    """Of what a run leaves for training."""
    names = ("feedback.jsonl", "failures.jsonl")
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}


def run(line: list[str]) -> float:
    """Seconds of a run that must end well."""
    started = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"status {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - started


def faulty(seed: int) -> Callable[[Seen], Answer]:
    """A fault on a share of requests, whatever order they come in: drawn by request and attempt."""

    def script(seen: Seen) -> Answer:
        draw = random.Random(f"{seed} {seen.key} {seen.attempt}")
        return FAULTS[draw.choice(KINDS)] if draw.random() < FAULTY else GOOD

    return script


def faults(folder: Path, prompts: Path, count: int, seed: int) -> dict[str, Any]:
    """The same files with faults as without."""
    with Server() as server:
        seconds = run(command(server.url, prompts, folder / "whole"))
        assert server.requests.total() == len(server.requests) == REQUESTS * count
    met: dict[str, int] = {}

    def counted(seen: Seen) -> Answer:
        answer = script(seen)
        name = next(name for name, fault in {"none": GOOD, **FAULTS}.items() if fault is answer)
        met[name] = met.get(name, 0) + 1
        return answer

    script = faulty(seed)
    with Server(counted) as server:
        seconds_faulty = run(command(server.url, prompts, folder / "faulty"))
        sent = server.requests.total()
    report = json.loads((folder / "faulty" / "report.json").read_text())
    return {
        "prompts": count,
        "requests_answered": REQUESTS * count,
        "requests_sent": sent,
        "faults_met": dict(sorted(met.items())),
        "failures": sum(1 for _ in (folder / "faulty" / "failures.jsonl").open()),
        "retries": report["this_run"]["retries"],
        "identical": digests(folder / "whole") == digests(folder / "faulty"),
        "seconds": round(seconds, 1),
        "seconds_with_faults": round(seconds_faulty, 1),
    }


def kills(folder: Path, prompts: Path, count: int, number: int, seed: int, whole: Path | None) -> dict[str, Any]:
    """The same files after so many kills, and what was asked twice."""
    draw, output = random.Random(seed), folder / "killed"
    if whole is None:
        with Server() as server:
            run(command(server.url, prompts, whole := folder / "whole"))
    lost: list[int] = []
    again = 0
    with Server(lambda seen: Answer(delay=0.05)) as server:
        line = command(server.url, prompts, output, concurrency=16)
        for _ in range(number):
            kept = recorded(output / "ledger.sqlite")
            before = server.requests.copy()
            goal = before.total() + draw.randrange(2 * REQUESTS * count // (number + 2))
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while server.requests.total() < goal and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # what it had been asked is answered or cut off
            again += sum(server.requests[key] > before[key] for key in kept)
            lost.append(len(set(server.completed) - recorded(output / "ledger.sqlite")) - sum(lost))
        run(line)
        twice = sum(times - 1 for times in server.completed.values())
        sent = server.requests.total()
    return {
        "kills": number,
        "recorded_and_asked_again": again,
        "answered_and_asked_again": twice,
        "answered_but_not_read_by_kill": lost,
        "requests_sent": sent,
        "identical": digests(whole) == digests(output),
    }


def recorded(path: Path) -> set[str]:
    """What a ledger holds answers to."""
    if not path.exists():
        return set()
    with Ledger(path, read_only=True) as ledger:
        return {key for key, _, outcome in ledger.entries() if isinstance(outcome, Reply)}


def throughput(folder: Path, number: int, rounds: int = 3) -> dict[str, Any]:
    """Against a server in a process of its own, and the CPU-seconds that each request costs the asker."""
    delay, flight = 0.05, 64
    write_prompts(prompts := folder / "of_throughput.jsonl", -(-number // REQUESTS))
    shares, whole, bare, seconds = [], [], [], []
    for turn in range(rounds):
        port = folder / f"port{turn}"
        server = subprocess.Popen([sys.executable, "-m", "tests.openai_server", port, str(delay)])
        try:
            while not (port.exists() and port.read_text()):
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port.read_text()}/v1"
            pool = [Model("m", (Endpoint(url, concurrency=flight),))]
            before = resource.getrusage(resource.RUSAGE_SELF)
            taken = asyncio.run(_ask(pool, folder / f"speed{turn}.sqlite", number, flight))
            after = resource.getrusage(resource.RUSAGE_SELF)
            bare.append(number * delay / flight / asyncio.run(_ask_bare(url, number, flight)))
            run(command(url, prompts, output := folder / f"speed{turn}", flight))
            report = json.loads((output / "report.json").read_text())
            whole.append(report["this_run"]["requests_per_second"] * delay / flight)
        finally:
            server.kill()
            server.wait()
        shares.append(number * delay / flight / taken)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds.append(used / number)
    return {
        "requests": number,
        "in_flight": flight,
        "server_seconds": delay,
        "share_of_ideal": round(statistics.median(shares), 4),
        "shares": [round(share, 4) for share in shares],
        "share_of_ideal_whole_command": round(statistics.median(whole), 4),
        "shares_whole_command": [round(share, 4) for share in whole],
        "shares_of_bare_aiohttp": [round(share, 4) for share in bare],
        "share_of_bare_aiohttp": round(statistics.median(a / b for a, b in zip(shares, bare, strict=True)), 4),
        "cpu_ms_a_request": round(1e3 * statistics.median(seconds), 3),
    }


async def _ask_bare(url: str, number: int, flight: int) -> float:
    """The same requests and replies with nothing around them."""
    numbers = iter(range(number))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def asker() -> None:
            for n in numbers:
                body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{n} " * 50}]}).encode()
                async with session.post(f"{url}/chat/completions", data=body) as response:
                    assert json.loads(await response.read())["choices"]

        started = time.perf_counter()
        await asyncio.gather(*(asker() for _ in range(flight)))
        return time.perf_counter() - started


async def _ask(pool: list[Model], path: Path, number: int, flight: int) -> float:
    """Seconds for so many requests, from the first to the last."""
    with Ledger(path) as ledger:
        async with Client(pool, ledger, Limits(concurrency=flight)) as client:
            numbers = iter(range(number))

            async def asker() -> None:
                for n in numbers:
                    reply = await client.ask(Request("m", [{"role": "user", "content": f"{n} " * 50}]))
                    assert isinstance(reply, Reply)

            await client.ask(Request("m", [{"role": "user", "content": "warm"}]))
            started = time.perf_counter()
            await asyncio.gather(*(asker() for _ in range(2 * flight)))
            return time.perf_counter() - started


def ledger(folder: Path, rows: int) -> dict[str, Any]:
    """Microseconds of CPU to record and to find a reply of 2 kB, with more and more of them there."""
    figures: list[dict[str, float]] = []
    text = "What a model might say. " * 80
    with Ledger(folder / "many.sqlite") as file:
        marks = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= rows]
        for number in range(rows):
            key = hashlib.sha256(str(number).encode()).hexdigest()
            file.put(key, "m", Reply(text + str(number), "m", "stop", 100, 400, 0, 0.001, 1.0))
            if number + 1 not in marks:
                continue
            draw = random.Random(number)
            started = time.process_time()
            for some in range(1000):
                file.put(hashlib.sha256(f"{number} {some}".encode()).hexdigest(), "m", Reply(text, "m", "stop"))
            put = time.process_time() - started
            keys = [hashlib.sha256(str(draw.randrange(number + 1)).encode()).hexdigest() for _ in range(1000)]
            started = time.process_time()
            found = [file.get(key) for key in keys]
            assert all(found)
            got = time.process_time() - started
            figures.append({"rows": number + 1, "put_us": round(put * 1e3, 1), "get_us": round(got * 1e3, 1)})
            print(figures[-1], flush=True)
        started = time.perf_counter()
        assert file.totals()[0].number >= rows
        totals = time.perf_counter() - started
    size = (folder / "many.sqlite").stat().st_size
    return {"sizes": figures, "totals_seconds": round(totals, 2), "mib": round(size / 2**20)}


def main() -> None:
    """The command."""
    proofs = ("faults", "kills", "throughput", "ledger")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=proofs, action="append", help="one of the proofs; default: all")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20_000, help="for the throughput")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the ledger; 5 GB for a million")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, required=True, help="JSON; what other proofs left in it stays")
    options = parser.parse_args()
    chosen = options.only or proofs
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, options.prompts)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    try:
        for proof in chosen:
            if proof == "faults":
                results[proof] = faults(folder, prompts, options.prompts, options.seed)
            elif proof == "kills":
                whole = folder / "whole" if (folder / "whole").exists() else None
                results[proof] = kills(folder, prompts, options.prompts, options.kills, options.seed, whole)
            elif proof == "throughput":
                results[proof] = throughput(folder, options.requests)
            else:
                results[proof] = ledger(folder, options.rows)
            print(json.dumps({proof: results[proof]}), flush=True)
            options.output.write_text(json.dumps(results, indent=2) + "\n")
    finally:
        shutil.rmtree(folder)
    proven = all(results[proof].get("identical", True) for proof in chosen)
    sys.exit(0 if proven and not results.get("kills", {}).get("recorded_and_asked_again") else 1)


if __name__ == "__main__":
    main()
