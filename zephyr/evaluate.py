"""Evaluate a model: `python -m zephyr.evaluate MODEL benchmarks=[mt_bench] judge.base_url=... judge.model=...`.

A benchmark is a module of zephyr/evaluation/ with `run`, whose results go to OUTPUT/<benchmark>/results.json, and
`summary`, which says them in a few lines. `async def run(client, settings, folder)` asks models through the client;
`def run(settings, folder)` needs none. Either may write its files into `folder`.
"""

import asyncio
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from zephyr.command import status
from zephyr.errors import UserError
from zephyr.evaluation.files import write_json
from zephyr.evaluation.settings import Evaluation, parse
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import BudgetSpent
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget

USAGE = """\
Usage: python -m zephyr.evaluate MODEL key=value ...
       python -m zephyr.evaluate report DIR...
"""


def main(arguments: Sequence[str]) -> int:
    """Evaluate, or compare what has been evaluated; the exit status."""
    return status(lambda: _main(list(arguments)))


def _main(arguments: list[str]) -> int | None:
    import conf  # composes with Hydra, which nothing in this package may import

    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, conf.describe("evaluate"), sep="\n", end="")
        return None if arguments else 2
    if arguments[0] == "report":
        return import_module("zephyr.evaluation.report").main(arguments[1:])
    if "=" not in arguments[0]:
        arguments[0] = f"model={arguments[0]}"
    return run(parse(conf.compose("evaluate", arguments)))


def run(settings: Evaluation) -> int:
    """Run the benchmarks in their order; the exit status, 3 where the budget ended before they did."""
    modules: dict[str, ModuleType] = {name: import_module(f"zephyr.evaluation.{name}") for name in settings.benchmarks}
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    asking = {name: module for name, module in modules.items() if inspect.iscoroutinefunction(module.run)}
    try:
        if asking:
            asyncio.run(_asked(asking, settings, output))
    except BudgetSpent as spent:
        print(f"The budget is spent: {spent}. The same command with a larger one goes on.", file=sys.stderr)
        return 3
    for name, module in modules.items():
        if name not in asking:
            _write(name, module, settings, output, module.run(settings, output / name))
    return 0


async def _asked(modules: dict[str, ModuleType], settings: Evaluation, output: Path) -> None:
    """The benchmarks that ask models: one ledger, one budget."""
    backends = [backend for backend in (settings.answer and settings.answer.backend, settings.judge) if backend]
    budget = Budget(settings.max_cost, settings.max_requests)
    with Ledger(output / "ledger.sqlite") as ledger:
        async with Client([backend.pooled() for backend in backends], ledger, settings.limits, budget) as client:
            for name, module in modules.items():
                _write(name, module, settings, output, await module.run(client, settings, output / name))


def _write(name: str, module: ModuleType, settings: Evaluation, output: Path, results: dict[str, Any]) -> None:
    results = {"benchmark": name, "model": settings.name, **results}
    path = output / name / "results.json"
    try:
        write_json(path, results)
    except ValueError as error:
        raise UserError(f"{name}: a score is not a finite number: {results}.") from error
    print(f"{module.summary(results)}\n-> {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
