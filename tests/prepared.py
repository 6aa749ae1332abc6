"""Preparations of tests/preparing.py: what they leave, and two ways to cut them short, in this process or another."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.waiting import until
from zephyr.data import sources
from zephyr.prepare import parts

small = patch.object(parts, "ROWS", 4)  # decorates a test: four rows a part
SCRIPT = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests import preparing as t
    from zephyr.command import status
    from zephyr.prepare import engine, folder, parts
    parts.ROWS = 40
    folder._CODE = []  # whoever edits the code meanwhile would start it afresh
    job = t.job(Path(sys.argv[1]), work=t.Shout(seconds=0.001), processes=2)
    sys.exit(status(lambda: engine.run(job) and None))
"""


def content(output: Path) -> dict[str, Any]:
    """All files of an output, without what tells one run from another."""
    found: dict[str, Any] = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    account = json.loads(found.pop("report.json"))
    return found | {"report": {key: value for key, value in account.items() if key not in ("run", "fingerprint")}}


def read(output: Path, split: str) -> list[dict[str, Any]]:
    return [columns for _, columns in sources.read(sources.files(f"{output}:{split}", "data.train"))]


class Interrupted(BaseException):
    """In place of a kill."""


@contextmanager
def interrupted(where: Any, name: str, calls: int) -> Iterator[None]:
    """What is done here ends in the call of `where.name` that follows so many."""
    original, seen = getattr(where, name), []

    def patched(*arguments: Any, **known: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise Interrupted
        return original(*arguments, **known)

    with patch.object(where, name, patched), pytest.raises(Interrupted):
        yield


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """The job of `tmp_path` as a command of its own: 40 rows a part, a millisecond each."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, script, tmp_path], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_parts(tmp_path: Path, process: subprocess.Popen[str], count: int) -> None:
    until(lambda: len(list((tmp_path / "out.partial" / "parts").glob("*.json"))) >= count, process=process)
