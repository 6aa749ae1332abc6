"""Stopping: after the step, with a checkpoint and the signal's exit status, losing and repeating nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.checkpointing import CLAIM, Copy, Line, Lines, assert_same, names, train, whole
from zephyr.checkpoints.checkpoint import Checkpoints, newest
from zephyr.checkpoints.interruption import StopOnSignal, Stopped
from zephyr.command import stoppable


class Send(L.Callback):
    """Sends this process signals from the named hook at the named step."""

    def __init__(self, hook: str, step: int, *signals: signal.Signals) -> None:
        self.step, self.signals = step, signals
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            for signum in self.signals:
                signal.raise_signal(signum)
            self.signals = ()


def stop(folder: Path, send: Send, every: int = 100) -> tuple[Stopped, list[Line]]:
    """Train until stopped; returns what was raised and the log lines of the run."""
    lines = Lines()
    checkpoints = Checkpoints(folder, every, 9, CLAIM)
    with pytest.raises(Stopped) as stopped:
        train(folder, callbacks=(send, StopOnSignal(checkpoints), Copy(lines)), checkpoints=checkpoints)
    return stopped.value, lines.lines


@pytest.mark.parametrize(
    "hook, at, saved",
    [
        ("on_train_batch_start", 0, 1),  # in the first step
        ("on_train_batch_start", 4, 5),  # in a step
        ("on_train_batch_end", 5, 5),  # at the end of it
        ("on_train_batch_start", 3, 4),  # in a step that ends in a validation
        ("on_train_batch_end", 4, 4),  # before the validation
        ("on_validation_start", 4, 4),
        ("on_validation_batch_end", 8, 8),  # in it
        ("on_validation_end", 8, 8),  # after it
        ("on_train_batch_start", 11, 12),  # in the last step, which ends in a validation too
        ("on_validation_batch_end", 12, 12),
        ("on_validation_end", 12, 12),
        ("on_train_epoch_end", 12, 12),
    ],
)
@pytest.mark.parametrize("every", [1, 100])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, hook: str, at: int, saved: int, every: int) -> None:
    stopped, lines = stop(tmp_path, Send(hook, at, signal.SIGTERM), every)
    assert stopped.signal == signal.SIGTERM
    step = newest(tmp_path)
    assert step is not None and step.name == f"step-{saved:08d}"
    rest = train(tmp_path, every, seed=99, resume=step)
    assert_same(rest, whole(), lines + rest.lines)


def test_two_stops_in_one_validation_lose_and_repeat_nothing(tmp_path: Path) -> None:
    _, first = stop(tmp_path, Send("on_train_batch_end", 8, signal.SIGTERM))
    step, lines = newest(tmp_path), Lines()
    checkpoints = Checkpoints(tmp_path, 100, 9, CLAIM)
    again = (Send("on_validation_batch_end", 8, signal.SIGINT), StopOnSignal(checkpoints), Copy(lines))
    with pytest.raises(Stopped):
        train(tmp_path, seed=98, resume=step, callbacks=again, checkpoints=checkpoints)
    assert newest(tmp_path) == step and lines.lines == []
    rest = train(tmp_path, seed=99, resume=step)
    assert_same(rest, whole(), first + rest.lines)


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    stopped, lines = stop(tmp_path, Send("on_train_batch_start", 4, signal.SIGINT, signal.SIGINT))
    assert stopped.signal == signal.SIGINT
    assert names(tmp_path) == [] and lines[-1][0] == 3  # the log lines of step 5 would bear 4


def test_one_interrupt_and_repeated_sigterm_wait_for_the_step(tmp_path: Path) -> None:
    stopped, _ = stop(tmp_path / "a", Send("on_train_batch_start", 4, signal.SIGINT))
    assert stopped.signal == signal.SIGINT and names(tmp_path / "a") == ["step-00000005"]
    stopped, _ = stop(tmp_path / "b", Send("on_train_batch_start", 4, signal.SIGTERM, signal.SIGTERM))
    assert stopped.signal == signal.SIGTERM and names(tmp_path / "b") == ["step-00000005"]


@pytest.mark.parametrize("send", [None, Send("on_train_batch_start", 4, signal.SIGTERM), Send("setup", 0)])
def test_handlers_are_put_back(tmp_path: Path, send: Send | None) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with stoppable():
        within = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        checkpoints = Checkpoints(tmp_path, 100, 9, CLAIM)
        try:
            train(
                tmp_path,
                callbacks=(*([send] if send else []), StopOnSignal(checkpoints)),
                checkpoints=checkpoints,
            )
        except Stopped:
            assert send is not None
        assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == within
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    assert within != before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_outside_training_a_signal_stops_at_once(signum: signal.Signals) -> None:
    with pytest.raises(Stopped) as stopped, stoppable():
        try:
            signal.raise_signal(signum)
        except Exception:  # what a library might do while it loads data
            pytest.fail("swallowed")
    assert stopped.value.signal == signum and 128 + stopped.value.signal == {2: 130, 15: 143}[signum]


def test_forked_worker_leaves_the_decision_to_its_parent() -> None:
    with stoppable():
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


class Wait(L.Callback):
    """Says that the third step is under way, and stays in it until the signal has come."""

    def __init__(self, stop: StopOnSignal) -> None:
        self.stop = stop

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            print("training", flush=True)
            while self.stop._received is None:
                time.sleep(0.02)


def main(folder: str) -> None:
    """The shape of a command that trains: only Stopped is caught."""
    try:
        with stoppable():
            checkpoints = Checkpoints(folder, 100, 9, CLAIM)
            stop = StopOnSignal(checkpoints)
            train(Path(folder), callbacks=(Wait(stop), stop), checkpoints=checkpoints)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(128 + stopped.signal)


SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS_PER_NODE": "1",
}


def test_exit_status_of_the_process(tmp_path: Path) -> None:
    cases = {"terminal": (signal.SIGINT, {}), "slurm": (signal.SIGTERM, SLURM)}
    script = "import sys; from tests.test_interruption import main; main(sys.argv[1])"
    root = Path(__file__).parent.parent
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name)],
            cwd=root,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (_, environment) in cases.items()
    }
    for name, process in processes.items():
        signum, _ = cases[name]
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (128 + signum, f"stopped by {signum.name}\n"), err
        assert "Traceback" not in err
        assert names(tmp_path / name) == ["step-00000003"]
