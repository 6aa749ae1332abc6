"""Evaluate a model: `python -m zephyr.evaluate MODEL benchmarks=[mt_bench] judge.base_url=... judge.model=...`.

A benchmark is a module of zephyr/evaluation/ with `run`, whose results go to OUTPUT/<benchmark>/results.json;
`summary`, which says them in a few lines; and `check(settings)`, which raises UserError at what is known to be wrong
before anything is asked or written. `async def run(client, settings, folder)` asks models through the client;
`def run(settings, folder)` needs none. Either may write its files into `folder`.
"""

import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from zephyr.command import interruptible, outlived, status
from zephyr.errors import UserError, check_writable
from zephyr.evaluation.files import write_json
from zephyr.evaluation.settings import Evaluation, parse
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import BudgetSpent
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Model

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
    config = conf.compose("evaluate", arguments)
    return run(parse(config), config)


def run(settings: Evaluation, config: dict[str, Any]) -> int:
    """Run the benchmarks, those that ask models first; the exit status, 3 where the budget ended before they did."""
    modules: dict[str, ModuleType] = {name: import_module(f"zephyr.evaluation.{name}") for name in settings.benchmarks}
    output = Path(settings.output).expanduser()
    check_writable(output, "output")
    for module in modules.values():
        module.check(settings)
    for name in modules:
        _refuse_another(output / name / "results.json", settings.name)
    output.mkdir(parents=True, exist_ok=True)
    asking = {name: module for name, module in modules.items() if inspect.iscoroutinefunction(module.run)}
    with _logged(settings, config, output) as log:

        def done(name: str, results: dict[str, Any]) -> None:
            results = {"benchmark": name, "model": settings.name, **results}
            _write(output / name / "results.json", results)
            log({name: results})
            print(f"{modules[name].summary(results)}\n-> {output / name}", flush=True)

        try:
            if asking:
                asyncio.run(interruptible(_asked(asking, settings, output, done)))
        except BudgetSpent as spent:
            print(f"The budget is spent: {spent}. The same command with a larger one goes on.", file=sys.stderr)
            return 3
        for name, module in modules.items():
            if name not in asking:
                done(name, module.run(settings, output / name))
    return 0


def _refuse_another(results: Path, name: str) -> None:
    """Raises UserError where the results of another model would be written over."""
    try:
        other = json.loads(results.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or none that is worth keeping
    if other != name:
        raise UserError(f"{results.parent} holds the results of {other!r}. Give output=FOLDER for those of {name!r}.")


async def _asked(
    modules: dict[str, ModuleType], settings: Evaluation, output: Path, done: Callable[[str, dict[str, Any]], None]
) -> None:
    """The benchmarks that ask models: one ledger, one budget."""
    budget = Budget(settings.max_cost, settings.max_requests)
    with Ledger(output / "ledger.sqlite") as ledger:
        async with Client(_pool(settings), ledger, settings.limits, budget) as client:
            for name, module in modules.items():
                done(name, await module.run(client, settings, output / name))


def _pool(settings: Evaluation) -> list[Model]:
    """The model under test and the judge, which may be one."""
    pool = [settings.answer.backend.pooled()] if settings.answer else []
    if settings.judge and (judge := settings.judge.pooled()) not in pool:
        if judge.name in [model.name for model in pool]:
            raise UserError(
                f"the model and the judge are both named {judge.name!r} and differ otherwise. Give answer.name=NAME."
            )
        pool.append(judge)
    return pool


def _write(path: Path, results: dict[str, Any]) -> None:
    try:
        write_json(path, results)
    except ValueError as error:
        raise UserError(f"{path}: a score is not a finite number: {results}.") from error


@contextmanager
def _logged(settings: Evaluation, config: dict[str, Any], output: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes results to a W&B run, as the numbers of its summary; nowhere without one."""
    if settings.logger is None:
        yield lambda results: None
        return
    from zephyr.observe.weights_and_biases import start

    wandb = settings.logger
    run = start(output, config, wandb.project, wandb.name, wandb.group, wandb.tags)
    failed = True
    try:
        yield lambda results: run.summary.update(dict(_numbers(results)))
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of nested results with its path: mt_bench/turns/1/score."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else key)
    elif isinstance(value, int | float):
        yield name, value


if __name__ == "__main__":
    sys.exit(outlived(lambda: main(sys.argv[1:])))
