"""How commands end: by themselves, by signals, and when they are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from zephyr.command import SIGNALS, status, stoppable
from zephyr.errors import UserError

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


class Bookkeeping:
    """What breaks when an exception passes through it, as OmegaConf's containers do."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")


class Finalizer:
    """Interrupted where Python drops what is raised, and says so."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def broken() -> int:
    with Bookkeeping():
        signal.raise_signal(signal.SIGTERM)
    return 0


def mistaken() -> int:
    try:
        return broken()
    except AttributeError as error:
        raise UserError(str(error)) from error


def left() -> int:
    try:
        return broken()
    except AttributeError:
        sys.exit(1)


def dropped() -> int:
    Finalizer()
    return 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("act", [broken, mistaken, left, dropped])
def test_a_stop_is_one_whatever_it_was_turned_into(act: Callable[[], int], capsys: pytest.CaptureFixture[str]):
    assert status(act) == 143
    assert capsys.readouterr().err == "Stopped by SIGTERM. The same command goes on.\n"


def test_failures_of_others_stay_what_they_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(AttributeError), stoppable():
        with suppress(AttributeError), Bookkeeping():
            pass
        raise AttributeError
    assert status(lambda: (_ for _ in ()).throw(UserError("Give a number."))) == 2
    assert capsys.readouterr().err == "Error: Give a number.\n"


def test_the_handlers_are_put_back():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    status(broken)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


# Runs a script or a module, interrupted where OmegaConf's own cleaning up fails by it.
INTERRUPTED = """
import runpy, signal, sys
from omegaconf import ListConfig

put = ListConfig._set_item_impl

def interrupted(self, index, item):
    if type(item).__name__ == "ConfigSourceInfo":
        ListConfig._set_item_impl = put
        self._get_flag("readonly")  # fills a cache; emptying it fails at the place that is kept for the item
        signal.raise_signal(signal.SIGINT)
    put(self, index, item)

ListConfig._set_item_impl = interrupted
sys.path.insert(0, "")
name = sys.argv.pop(1)
if name.endswith(".py"):
    sys.argv[0] = name
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "line",
    [
        ["train.py"],
        ["train.py", "-m", "seed=1,2"],
        ["zephyr.prepare", "ultrafeedback", "input=in.jsonl", "output=out"],
        ["zephyr.feedback", "prompts=in.jsonl", "output=out"],
    ],
    ids=lambda line: " ".join(line[:2]),
)
def test_a_stop_while_the_configuration_is_composed(line: list[str]):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *line], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "Stopped by SIGINT. The same command goes on.\n"
    assert done.returncode == 130
