"""The runs of a study, one after the other: a finished one is left alone, an unfinished one goes on."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from zephyr.data import sources
from zephyr.data.messages import BadRow
from zephyr.demo import locate
from zephyr.errors import Stopped
from zephyr.launching.sweep import holds
from zephyr.study.plan import Run

Compose = Callable[[Sequence[str]], dict[str, Any]]  # the configuration that train.py makes of overrides


def make(runs: Iterable[Run], compose: Compose) -> dict[str, str]:
    """Train what is not trained yet. The runs that failed, by name, with what is known of it; a run whose parent failed
    is not begun. Raises Stopped when the study is to end: the run under way has then saved its state.
    """
    failed: dict[str, str] = {}
    for run in runs:
        if run.parent is not None and run.parent.name in failed:
            failed[run.name] = f"not begun, as {run.parent.name} failed"
            continue
        begun = holds(run.folder, compose(run.overrides)) and not _stale(run)
        if begun and (run.folder / "summary.json").exists():
            say(f"{run.name}: finished already.")
            continue
        say(f"{run.name}: {'going on' if begun else 'starting'}.")
        if status := call(run.command(*["resume=auto"] * begun)):
            failed[run.name] = ended(status)
            say(f"{run.name} failed: {failed[run.name]}.")
    return failed


def call(command: Sequence[str]) -> int:
    """Run a command; its exit status. A signal to us is passed on to it, and raised as Stopped when it has ended."""
    stopped: Stopped | None = None
    process = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C comes to us alone
    while True:
        try:
            status = process.wait()
            break
        except Stopped as signalled:
            stopped = signalled
            process.send_signal(stopped.signal)
    if stopped is not None:
        raise stopped
    return status


def ended(status: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def write_chosen(files: dict[str, Path], data: dict[str, Any], seed: int) -> None:
    """The chosen side of every pair that dDPO is trained with, as conversations; `data` is dDPO's configuration.

    Which answer is chosen does not depend on the seed, which draws the rejected one.
    Raises UserError at data that cannot be read.
    """
    for side, path in files.items():
        if data[side] is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        with draft.open("w", encoding="utf-8") as file:
            for chunk in sources.chunks(sources.files(locate(data[side]), f"data.{side}")):
                for row in chunk.rows():
                    if (messages := _chosen(row, seed, data["bad_rows"])) is not None:
                        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        draft.replace(path)


def _chosen(row: Any, seed: int, bad_rows: str) -> list[dict[str, str]] | None:
    try:
        if isinstance(row, BadRow):
            raise row
        pair = sources.preference(row, seed)
    except BadRow:
        if bad_rows == "error":
            raise
        return None
    return None if pair is None else pair[0]


def _stale(run: Run) -> bool:
    """Whether the model that a run started from was made anew since."""
    if run.parent is None:
        return False
    parent, own = run.parent.folder / "summary.json", run.folder / "config.yaml"
    return parent.stat().st_mtime > own.stat().st_mtime


def say(line: str) -> None:
    """One line to standard error."""
    print(line, file=sys.stderr, flush=True)
