"""The embedded demo: a small invented world, chats and feedback about it, and a tiny untrained base model.

A path that starts with `demo:` names one of its files, written on first use and kept in the user's cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zephyr.errors import UserError

FILES = (
    "base",
    "chats-train.jsonl",
    "chats-test.jsonl",
    "feedback-train.jsonl",
    "feedback-test.jsonl",
    "prompts.jsonl",
    "mt_bench/question.jsonl",
    "alpaca_eval/baseline.json",
)
_MAKERS = ("__init__", "base", "examination", "teacher", "world", "writers")  # modules that decide what is in them


def locate(path: str) -> str:
    """The real path of a `demo:` path, built on first use; any other path is returned unchanged.

    Raises UserError for a name that the demo does not have.
    """
    if not path.startswith("demo:"):
        return path
    name = path.removeprefix("demo:")
    if name not in FILES:
        raise UserError(f"{path!r} is no part of the demo. Take one of: demo:{', demo:'.join(FILES)}.")
    return str(_folder() / name)


def _folder() -> Path:
    """Built beside its final place and renamed into it: a folder with the final name is always whole."""
    sources = [Path(__file__).with_name(f"{name}.py") for name in _MAKERS]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zephyr"
    folder = cache / f"demo-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        try:
            _build(building)
            with suppress(OSError):  # another process was first: its folder holds the same
                building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    from zephyr.demo.base import write_base
    from zephyr.demo.examination import against_baseline, prompts, two_turns
    from zephyr.demo.writers import dialogues, feedback

    chats = list(dialogues(seed=0, count=24_000))
    _write(folder / "chats-train.jsonl", chats)
    _write(folder / "chats-test.jsonl", dialogues(seed=0, count=400, held_out=True))
    _write(folder / "feedback-train.jsonl", feedback(seed=0, count=5_000))
    _write(folder / "feedback-test.jsonl", feedback(seed=0, count=400, held_out=True))
    _write(folder / "prompts.jsonl", prompts(seed=0, count=2_000))
    for benchmark in ("mt_bench", "alpaca_eval"):
        (folder / benchmark).mkdir()
    _write(folder / "mt_bench" / "question.jsonl", two_turns(seed=0, of_each=8))
    baseline = json.dumps(against_baseline(seed=0, count=200), indent=2)
    (folder / "alpaca_eval" / "baseline.json").write_text(baseline + "\n", encoding="utf-8")
    write_base(folder / "base", (row["messages"] for row in chats[:4_000]))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
