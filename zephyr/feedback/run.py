"""AI feedback from beginning to end: prompts, completions, judgements, records, the report.

The result depends on the prompts, the settings and the answers; never on the order in which they came, how many were
asked at once, or how often a run was killed. All that is kept of a run under way is the ledger: a run that goes on
takes every prompt from the beginning, and finds there what has been answered.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import IO, Any

from zephyr.command import interruptible
from zephyr.errors import UserError, check_writable
from zephyr.feedback.collect import Collector, Result, endpoints
from zephyr.feedback.estimate import estimate
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.progress import Shown
from zephyr.feedback.prompts import Prompts
from zephyr.feedback.report import Account
from zephyr.feedback.settings import Feedback, listed, parse
from zephyr.redact import redact

FILES = ("feedback.jsonl", "failures.jsonl")
_DISK = {ENOSPC: "Make room", EDQUOT: "Make room", EROFS: "Make it writable", EIO: "See whether the disk is sound"}


def run(config: dict[str, Any]) -> None:
    """The command. Raises UserError, Stopped."""
    config = {**config, "models": listed(config["models"])}  # as it is kept, whatever becomes of the file
    settings = parse(config)
    prompts = Prompts(settings.prompts, settings.limit, settings.bad_rows)
    collector = Collector(settings)
    output = Path(settings.output).expanduser()
    for said in collector.warnings:
        print(f"Note: {said}", file=sys.stderr)
    if settings.dry_run:
        print(estimate(settings, collector, prompts, output / "ledger.sqlite"))
        return
    for endpoint in endpoints(collector.pool):
        endpoint.key()
    check_writable(output, "output")
    total = sum(1 for _ in prompts)  # mistakes in the file are met before anything is written or sent
    if prompts.bad:
        print(f"Note: {prompts.bad:,} rows are left out, the first: {prompts.named[0]}", file=sys.stderr)
    with _disk(output):
        output.mkdir(parents=True, exist_ok=True)
        with Ledger(output / "ledger.sqlite") as ledger:
            _said(output / "config.json", config, redact(collector.deciding))
            print(_run(config, settings, collector, prompts, total, output, ledger))


def _run(
    config: dict[str, Any],
    settings: Feedback,
    collector: Collector,
    prompts: Prompts,
    total: int,
    output: Path,
    ledger: Ledger,
) -> str:
    """The last line that is printed."""
    started = time.monotonic()
    account = Account()
    with _whole([output / name for name in FILES]) as (feedback, failures):

        def write(result: Result) -> None:
            account.add(result.prompt.source, result.recorded)
            if result.recorded is not None:
                for file, rows in ((feedback, [result.recorded.row]), (failures, result.recorded.failures)):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row is not None)

        with Shown(total, settings, redact(config), output) as shown:
            gc.freeze()  # what is loaded by now stays: to look through it again and again would hold up all requests
            try:
                client = asyncio.run(interruptible(collector.collect(prompts, ledger, write, shown)))
            finally:
                gc.unfreeze()
            account.check(settings.max_failures)
            report = account.report(
                redact(config), prompts, client, ledger,
                second=settings.judge.second, seconds=time.monotonic() - started,
            )  # fmt: skip
            shown.summary(report)
    with _whole([output / "report.json"]) as (file,):
        file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return account.told(report, shown.spent, output)


@contextmanager
def _whole(paths: Sequence[Path]) -> Iterator[Sequence[IO[str]]]:
    """Files to write to, which get their names at the end, when they are on the disk; PATH.partial until then."""
    partial = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in partial]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for old, new in zip(partial, paths, strict=True):
            old.replace(new)
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _disk(output: Path) -> Iterator[None]:
    """Inside, what the disk refuses is the user's to mend; so is what is wrong with a file, which is named."""
    try:
        yield
    except OSError as error:
        again = "then run again: what has been answered is kept."
        if error.errno in _DISK:  # perhaps of a file that is open, and then without its name
            file = error.filename or output
            said = f"output: {file} cannot be written: {error.strerror}. {_DISK[error.errno]} or give another output"
        elif error.filename is not None:
            said = f"{error.filename}: {error.strerror}. Mend that"
        else:
            raise
        raise UserError(f"{said}, {again}") from error


def _said(path: Path, config: dict[str, Any], deciding: dict[str, Any]) -> None:
    """Keep what requests depend on, and say what of it an earlier run in this folder had otherwise."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["requests"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = deciding
    others = [name for name, value in deciding.items() if earlier.get(name) != value]
    if others:
        print(
            f"Note: {path.parent} was begun with other {', '.join(others)}. Requests that are the same are not asked "
            "again; the others are, and the files will hold this run's.",
            file=sys.stderr,
        )
    with _whole([path]) as (file,):
        file.write(json.dumps({"requests": deciding, "config": redact(config)}, indent=1, ensure_ascii=False) + "\n")
