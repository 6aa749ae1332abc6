"""A job's parent: starts its ranks on this node, each a fresh interpreter, watches them, and says what went wrong.

torch's elastic launcher would serve for the starting alone: it cannot take a variable away from the ranks, gives them
30 seconds to die, keeps its signal handlers, and costs two seconds of imports. This module does without torch.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zephyr.data.pool import cores
from zephyr.errors import Stopped, UserError
from zephyr.launching.worker import SIGNALS, Outcome, log_file, outcome_file

WORKER = (sys.executable, "-m", "zephyr.launching.worker")
GRACE = 1.0  # s that the others get once a rank has failed: to say what they saw
BEREFT = 10.0  # s that they get if it only missed another, which may still be on its way out: that one knows why
PARTING = 120.0  # s that the others get once a rank has stopped: its checkpoint is written, loggers may have to finish
AT_ONCE = 2.0  # s that all get after a second Ctrl-C, or once one has stopped before training began
_POLL = 0.05  # s
_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
# what counts as the cause where ranks ended in different ways; among equals, the earliest
_CAUSES = ("killed", "mistake", "defect", "stopped", "bereft", "cut")
_LINES = 10  # of a rank's output, in a message


class JobFailed(Exception):
    """A rank died. The message says which, of what, with its traceback or last words."""


@dataclass(eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    frozen: Path
    output_dir: Path
    cut: bool = False

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def moved(self) -> bool:
        """Whether it writes to output_dir, as it does from the beginning of training. Rank 0 writes to neither."""
        return self.number > 0 and not log_file(self.frozen, self.number).exists()

    @cached_property
    def outcome(self) -> Outcome:
        """How it ended; to be asked when it has."""
        with suppress(FileNotFoundError):
            return Outcome(**json.loads(outcome_file(self.frozen, self.number).read_text()))
        status, now = self.process.returncode, time.time()
        if self.cut:
            return Outcome("cut", now)
        if status in (-signal.SIGABRT, *range(256)):  # native code aborts where Python raises
            return Outcome("defect", now, f"It ended with status {status}, without a word of its own.")
        return Outcome("killed", now, signal=-status)

    def kill(self) -> None:
        """With all that it has started: data workers too."""
        self.cut = self.cut or self.running
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one stuck in the kernel cannot be helped
            self.process.wait(timeout=10)

    def last_words(self) -> str:
        """Where its output is, with the end of it."""
        path = self.output_dir / "ranks" / f"rank-{self.number}.log"
        if self.number == 0:
            return ""
        file, where = (path, f" ({path})") if self.moved else (log_file(self.frozen, self.number), "")
        try:
            lines = file.read_text(errors="replace").splitlines()[-_LINES:]
        except OSError:
            return ""
        if not lines:
            return f"\nIt had written nothing{where}."
        return "\n".join([f"\nThe end of its output{where}:", *(f"  {line}" for line in lines)])


def launch(config: dict[str, Any], processes: int, command: Sequence[str] = WORKER) -> float | None:
    """Run one job of `processes` ranks on this node and return the metric of rank 0, None on another node.

    `config` is the resolved configuration, `command` what each rank runs, with a file of it as the last argument. A
    job of one process has no process group. Raises UserError for the user's mistake, Stopped after
    SIGINT or SIGTERM, which the ranks get too, and JobFailed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="zephyr-", ignore_cleanup_errors=True) as folder,  # readable by us alone
        _environments(config["trainer"], processes) as environments,
        _received() as received,
    ):
        frozen = Path(folder, "config.json")
        frozen.write_text(json.dumps(config))
        sys.stdout.flush()
        sys.stderr.flush()
        ranks: list[_Rank] = []
        try:
            for environment in environments:
                number = int(environment.get("RANK", 0))
                ranks.append(
                    _Rank(number, _start(command, environment, frozen, number), frozen, Path(config["output_dir"]))
                )
            _watch(ranks, received)
        finally:
            for rank in ranks:
                if rank.running or rank.outcome.kind != "done":
                    rank.kill()
                assert rank.process.stdin is not None
                rank.process.stdin.close()
        return _settle(ranks, len(environments) * config["trainer"]["num_nodes"], received)


def _start(command: Sequence[str], environment: dict[str, str], frozen: Path, number: int) -> subprocess.Popen[bytes]:
    """One rank. Rank 0 has our output, the others a file; a terminal's Ctrl-C reaches none; the pipe on standard input
    tells them when we are dead."""
    with open(os.devnull if number == 0 else log_file(frozen, number), "ab") as file:
        output = None if number == 0 else file
        return subprocess.Popen(
            [*command, str(frozen)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _watch(ranks: list[_Rank], received: list[int]) -> None:
    """Wait for all to end, pass signals on, and put an end to those who have nobody left to train with."""
    passed_on = 0
    ends: dict[str, float] = {}  # reason: when the rest is killed for it
    while running := [rank for rank in ranks if rank.running]:
        now = time.monotonic()
        for signum in received[passed_on:]:
            passed_on += 1
            for rank in running:
                rank.process.send_signal(signum)  # to it alone: its data workers live until it has no need of them
        if received.count(signal.SIGINT) > 1:
            ends.setdefault("Ctrl-C twice", now + AT_ONCE)
        kinds = {_kind(rank, received) for rank in ranks if rank not in running} - {"done"}
        if "stopped" in kinds or (kinds and received):
            ends.setdefault("stopped", now + (PARTING if any(rank.moved for rank in ranks) else AT_ONCE))
        elif kinds:
            ends.setdefault(*(("bereft", now + BEREFT) if kinds == {"bereft"} else ("failed", now + GRACE)))
        if now > min(ends.values(), default=now):
            for rank in running:
                rank.kill()
            return
        time.sleep(_POLL)


def _kind(rank: _Rank, received: list[int]) -> str:
    """Of an ended rank's outcome; one that a signal of ours killed, before it could handle any, has stopped."""
    outcome = rank.outcome
    return "stopped" if outcome.kind == "killed" and outcome.signal in received else outcome.kind


def _settle(ranks: list[_Rank], world: int, received: list[int]) -> float | None:
    """The job's result, or the one exception that its failures come down to."""
    failed = [rank for rank in ranks if rank.outcome.kind != "done"]
    failed.sort(key=lambda rank: (_CAUSES.index(_kind(rank, received)), rank.outcome.time))
    kind = _kind(failed[0], received) if failed else "done"
    if kind == "stopped" or (received and kind in ("done", "bereft", "cut")):
        raise Stopped(received[0] if received else failed[0].outcome.signal)
    if kind == "done":
        return next((rank.outcome.metric for rank in ranks if rank.number == 0), None)
    if kind == "mistake":
        raise UserError(failed[0].outcome.message)
    raise JobFailed(_account(failed[0], world))


def _account(rank: _Rank, world: int) -> str:
    who = f"Rank {rank.number} of {world}" if world > 1 else "The run's process"
    outcome = rank.outcome
    if outcome.kind == "killed":
        name = signal.Signals(outcome.signal).name
        hint = " That is most often the system's answer to a lack of memory." if name == "SIGKILL" else ""
        return f"{who} was killed by {name}.{hint}{rank.last_words()}"
    return f"{who} failed.\n{outcome.message}{rank.last_words()}"


@contextmanager
def _environments(trainer: dict[str, Any], processes: int) -> Iterator[list[dict[str, str]]]:
    """The variables of each rank on this node: ours, without what an earlier launcher may have left behind."""
    nodes = trainer["num_nodes"]
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in _VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    root = Path(__file__).parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # run from a checkout, perhaps from another folder
        base["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [base.get("PYTHONPATH")])])
    if processes * nodes == 1:
        yield [base]
        return
    if trainer["threads"] is None:
        base.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    base |= {"WORLD_SIZE": str(processes * nodes), "LOCAL_WORLD_SIZE": str(processes)}
    if nodes == 1:
        if sys.platform == "linux":
            base.setdefault("GLOO_SOCKET_IFNAME", "lo")  # not what the host's name stands for, which may go away
        with free_port() as port:
            base |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            yield [base | {"RANK": str(local), "LOCAL_RANK": str(local)} for local in range(processes)]
        return
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK")
    if node is None or not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT"):
        raise UserError(
            f"trainer.num_nodes={nodes}, but nothing says which node this is. Start the processes of every node with "
            f"`torchrun --nnodes={nodes} --nproc-per-node={processes} train.py ...` or with srun, or set NODE_RANK, "
            "MASTER_ADDR and MASTER_PORT on each."
        )
    base |= {"NODE_RANK": node, **{name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}}
    first = int(node) * processes
    yield [base | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(processes)]


@contextmanager
def free_port() -> Iterator[int]:
    """A port of 127.0.0.1 that stays ours, though nobody listens: rank 0 can share it, which asks for the same option,
    and no process that wants just any port gets it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def _received() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM do nothing but enter the list."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows handlers in the main thread only
        return
    before = {signum: signal.signal(signum, lambda signum, _: received.append(signum)) for signum in SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)
