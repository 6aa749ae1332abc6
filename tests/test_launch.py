"""A job of several processes: real ones, with a stand-in for the training, and what its parent makes of their ends."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from zephyr.errors import Stopped, UserError
from zephyr.launching.launch import JobFailed, free_port, launch

ROOT = Path(__file__).parents[1]
PARENT = """
import json, os, sys

from zephyr.launching.launch import launch

*arguments, terminal = json.loads(sys.argv[1])
if terminal:
    os.login_tty(0)
try:
    print("metric", launch(*arguments))
except BaseException as error:
    print(type(error).__name__, error)
"""
Job = Callable[..., Any]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Launches a body of tests/rank_bodies.py, in tmp_path/output or another folder; `apart`, under a parent of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def start(
        body: str,
        processes: int = 2,
        folder: str = "output",
        num_nodes: int = 1,
        apart: bool = False,
        terminal: int | None = None,
        variables: dict[str, str] | None = None,
        **more: Any,
    ) -> Any:
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        trainer = {"num_nodes": num_nodes, "threads": None}
        config = {"body": body, "output_dir": str(output), "trainer": trainer, **more}
        command = [sys.executable, "-m", "tests.rank_bodies"]
        if not apart:
            return launch(config, processes, command)
        arguments = json.dumps([config, processes, command, terminal is not None])
        return subprocess.Popen(
            [sys.executable, "-c", PARENT, arguments],
            stdin=terminal,
            stdout=subprocess.PIPE,
            env=os.environ | (variables or {}),
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def wait_for(*files: Path) -> list[int]:
    """The process numbers that the files hold."""
    until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids: list[int]) -> None:
    until(lambda: not any(map(running, pids)), seconds=2)


def test_two_jobs_at_the_same_time(job: Job) -> None:
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda body: job(body, folder=body), ["trains", "takes_turns"])) == [11.0, 7.0]


def test_a_job_keeps_its_port() -> None:
    with free_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_only_rank_0_has_our_output(tmp_path: Path, job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    assert job("alone_speaks") == 0.25
    assert capfd.readouterr() == ("0 loads\n0 calls a program\n", "0 warns\n")
    logs = tmp_path / "output" / "ranks"
    lines = ["1 loads", "1 warns", "1 calls a program"]
    assert (logs / "rank-1.log").read_text().splitlines() == lines
    assert [file.name for file in logs.iterdir()] == ["rank-1.log"]
    assert not list(tmp_path.glob("zephyr-*"))
    job("alone_speaks")  # a resumed run
    again = (logs / "rank-1.log").read_text().splitlines()
    assert again[:3] == lines and again[3].startswith("--- 20") and again[4:] == lines


def test_two_nodes(job: Job) -> None:
    with free_port() as port:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        parents = [
            job("trains", processes=1, num_nodes=2, apart=True, variables={**where, "NODE_RANK": str(node)})
            for node in range(2)
        ]
        answers = [parent.communicate(timeout=60)[0].splitlines() for parent in parents]
    assert answers == [["metric 11.0"], ["metric None"]]


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_nodes_that_do_not_know_each_other(job: Job, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match="torchrun --nnodes=2 --nproc-per-node=4 .* srun"):
        job("trains", processes=4, num_nodes=2)


def test_one_process_is_left_alone(
    tmp_path: Path, job: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"]
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names += ["OMP_NUM_THREADS"]
    assert job("alone_lists", processes=1, names=names) == 0.5
    frozen, variables = capfd.readouterr().out.splitlines()
    assert variables == f"{dict.fromkeys(names)} False"
    file, mode = frozen.split()
    assert int(mode) == 0o700 and not Path(file).exists()
    assert not Path(file).is_relative_to(tmp_path / "output")


def test_ranks_share_the_cores(job: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(7))
    for given, seen in ((None, "3"), ("5", "5")):
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        job("alone_lists", names=["OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"])
        values = capfd.readouterr().out.splitlines()[1]
        assert values == f"{ {'OMP_NUM_THREADS': seen, 'LOCAL_WORLD_SIZE': '2'} } False"


def test_nobody_waits_for_a_first_that_failed(tmp_path: Path, job: Job) -> None:
    with pytest.raises(JobFailed, match=r"(?s)^Rank 0 of 2 failed.*KeyError: 'the cause'$"):
        job("first_fails")
    assert (tmp_path / "output" / "told-1").exists()


def test_ranks_that_differ_are_named(job: Job) -> None:
    with pytest.raises(UserError, match="different configurations: 1, 2 differ from rank 0"):
        job("unequal", processes=3)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_defect_is_told_once_within_seconds_though_the_other_hangs(
    tmp_path: Path, job: Job, stuck: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobFailed) as failed:
        job("breaks", stuck=stuck)
    assert time.time() - (tmp_path / "output" / "failed-1").stat().st_mtime < 4
    message = str(failed.value)
    assert message.startswith("Rank 1 of 2 failed.\nTraceback")
    assert message.count("ValueError: broken on purpose") == message.count("Traceback") == 1
    assert 'raise ValueError("broken on purpose")' in message
    assert message.endswith("\nThe end of its output:\n  the last words")
    assert capfd.readouterr() == ("", "")


def test_a_killed_rank_is_the_cause(tmp_path: Path, job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobFailed) as failed:
        job("killed")
    log = tmp_path / "output" / "ranks" / "rank-1.log"
    assert str(failed.value) == (
        "Rank 1 of 2 was killed by SIGKILL. That is most often the system's answer to a lack of memory.\n"
        f"The end of its output ({log}):\n  the last words"
    )
    assert capfd.readouterr() == ("", "")
    assert_gone([int((tmp_path / "output" / "child-1").read_text())])


def test_a_mistake_is_told_once(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^data.train=nowhere does not exist\.$"):
        job("alone_mistaken")
    assert capfd.readouterr() == ("", "")


def test_one_rank_stopped_by_somebody_else_stops_the_job(job: Job) -> None:
    started = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM"):
        job("alone_stopped")
    assert time.monotonic() - started < 10


def interrupt(folder: Path, *signals: signal.Signals) -> None:
    """Sends this process signals, one after the other, once both ranks are ready."""

    def send() -> None:
        wait_for(folder / "ready-0", folder / "ready-1")
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


def test_sigterm_reaches_each_rank_once_and_waits_for_the_last(tmp_path: Path, job: Job) -> None:
    output = tmp_path / "output"
    interrupt(output, signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        job("alone_steps")
    assert [(output / f"received-{rank}").read_text() for rank in range(2)] == ["[15]", "[15]"]


def test_a_signal_that_comes_too_late_still_stops_a_sweep(tmp_path: Path, job: Job) -> None:
    interrupt(tmp_path / "output", signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        job("alone_deaf")


def test_a_second_ctrl_c_stops_ranks_that_are_stuck(tmp_path: Path, job: Job) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    interrupt(tmp_path / "output", signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    with pytest.raises(Stopped, match="SIGINT"):
        job("stuck")
    assert time.monotonic() - started < 20
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_in_a_terminal_counts_once(tmp_path: Path, job: Job) -> None:
    output = tmp_path / "output"
    keyboard, terminal = pty.openpty()
    parent = job("alone_steps", apart=True, terminal=terminal)
    os.close(terminal)
    ranks = wait_for(output / "ready-0", output / "ready-1")
    os.write(keyboard, b"\x03")
    parent.communicate(timeout=60)
    written = b""
    with suppress(OSError):  # which is how a terminal that everybody has left ends
        while piece := os.read(keyboard, 1000):
            written += piece
    os.close(keyboard)
    assert written.decode().splitlines() == ["terminal", "^CStopped stopped by SIGINT"]
    assert [(output / f"received-{rank}").read_text() for rank in range(2)] == ["[2]", "[2]"]
    assert_gone(ranks)


def test_nobody_outlives_a_killed_parent(tmp_path: Path, job: Job) -> None:
    parent = job("alone_forks", apart=True)
    pids = wait_for(*(tmp_path / "output" / f"{name}-{rank}" for name in ("ready", "forked") for rank in range(2)))
    assert all(map(running, pids)) and list(tmp_path.glob("zephyr-*/config.json"))
    parent.kill()
    parent.wait()
    assert_gone(pids)
    assert not list(tmp_path.glob("zephyr-*/config.json"))
