"""How commands end: by themselves, by signals, and when they are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import asyncio, sys
from pathlib import Path
from zephyr.command import interruptible, outlived, status

async def work(told):
    print("working", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.3)  # what is under way
        told.open("a").write("ended\\n")

def act():
    return asyncio.run(interruptible(work(Path(sys.argv[1]))))

sys.exit(outlived(lambda: status(act)))
"""


def start(told: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(told)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_work_once(tmp_path: Path, signum: signal.Signals, group: bool):
    process = start(tmp_path / "told")
    os.kill(-process.pid if group else process.pid, signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert error == f"Stopped by {signum.name}. The same command goes on.\n"
    assert (tmp_path / "told").read_text() == "ended\n"


@pytest.mark.parametrize("group", [False, True])
def test_killed_it_still_ends_what_was_under_way(tmp_path: Path, group: bool):
    process = start(tmp_path / "told")
    os.kill(-process.pid if group else process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "told").exists()
    deadline = time.monotonic() + 30
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate(timeout=30)  # nobody holds its output any more


@pytest.mark.parametrize(
    ("act", "code", "error"),
    [
        ("lambda: 0", 0, ""),
        ("lambda: 7", 7, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError"),
        ("lambda: os.kill(os.getpid(), 9)", 137, ""),
    ],
)
def test_its_status_is_that_of_the_work(act: str, code: int, error: str):
    script = f"import os, sys\nfrom zephyr.command import outlived\nsys.exit(outlived({act}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert error in done.stderr and bool(error) == bool(done.stderr)
