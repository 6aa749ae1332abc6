"""This process among the others of its run: who it is, and what they do together.

Who it is stands in the variables that every launcher sets (torchrun, ours) or that `adopt_slurm` sets from srun's:
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT. torch is imported only by what
makes processes talk to each other.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from zephyr.errors import UserError

# Of a collective. The launcher ends a job within seconds of a death, so this is for processes that live and are stuck;
# the longest honest wait is for the first rank to write some 100 GB to a slow disk.
TIMEOUT = timedelta(minutes=30)
TURN = timedelta(hours=24)  # of waiting for the first rank of a node: tokenising takes hours
_POLL = 0.1  # s

_Value = TypeVar("_Value")
_store: Any = None  # of the process group: keys and values that all processes see
_turns = 0  # taken so far; the same on every rank


class PartnerFailed(RuntimeError):
    """Another rank failed at what this one waited for. What went wrong is told there."""


def joined() -> bool:
    """Whether a launcher has started this process as one of a run's, so that it must not start any itself.

    Raises UserError under a launcher whose variables cannot be used.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if _slurm_tasks() > 1:
        return True
    if max(int(os.environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) > 1:
        raise UserError("mpirun tells the processes too little of each other. Start them with torchrun or srun.")
    return False


def rank() -> int:
    """This process's number among all of the run."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number among those of its node, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """All processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def nodes() -> int:
    """Machines of the run."""
    return world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def adopt_slurm() -> None:
    """Under srun with several tasks, set the usual variables from SLURM's. Elsewhere, do nothing.

    A batch script and a job of one task (submitit's, say) are not among them. Raises UserError if the nodes have
    different numbers of tasks.
    """
    if "RANK" in os.environ or (tasks := _slurm_tasks()) <= 1:
        return
    slurm = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    layout = slurm.get("STEP_TASKS_PER_NODE") or slurm.get("TASKS_PER_NODE") or str(tasks)
    here = {int(count) for count in re.sub(r"\(x\d+\)", "", layout).split(",")}
    if len(here) > 1:
        raise UserError(f"srun has started {layout} tasks on the nodes; they must be equal: --ntasks-per-node=N.")
    os.environ.update(
        RANK=slurm["PROCID"],
        LOCAL_RANK=slurm["LOCALID"],
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=str(here.pop()),
        NODE_RANK=slurm["NODEID"],
    )
    os.environ.setdefault("MASTER_ADDR", first_host(slurm.get("STEP_NODELIST") or slurm["JOB_NODELIST"]))
    # the same on every rank, another for the other steps of the job, below the ports that clients get
    job, step = int(slurm["JOB_ID"]), int(slurm["STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(10_000 + (job + 4_999 * step) % 20_000))


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: node01 of node[01-04,7],other."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _slurm_tasks() -> int:
    """Tasks of the job step that this process is one of; 1 in a batch script, which is no step of tasks."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return 1
    # in the shell of salloc, SLURM_NTASKS is what later steps will have
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


@contextmanager
def process_group(device_type: str) -> Iterator[None]:
    """Inside, torch.distributed connects the run's processes: over gloo, on GPUs also over NCCL."""
    global _store, _turns
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank()) if device_type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    if joined():
        _store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    else:
        _store = dist.HashStore()
    _turns = 0
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", _store),
        rank=rank(),
        world_size=world_size(),
        timeout=TIMEOUT,
        device_id=device,
    )
    try:
        yield
    except BaseException:
        with suppress(Exception):  # to destroy it could mean to wait for partners that are dead or stuck
            dist.distributed_c10d._abort_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        _store = None


def barrier() -> None:
    """Wait until every rank is here."""
    if _store is not None:
        import torch.distributed as dist

        dist.barrier()


@contextmanager
def local_first() -> Iterator[None]:
    """The body runs on the first rank of each node, however long it takes, and then on its others.

    Raises PartnerFailed there if the first one's body raised.
    """
    node = os.environ.get("GROUP_RANK") or os.environ.get("NODE_RANK") or rank() // (world_size() // nodes())
    with _turn(local_rank() == 0, f"node {node}"):
        yield


def from_first(make: Callable[[], _Value]) -> _Value:
    """What `make` returns on rank 0, however long it takes, on every rank. Raises PartnerFailed on the others if it
    raised."""
    if _store is None:
        return make()
    import torch.distributed as dist

    values: list[Any] = [None]
    with _turn(rank() == 0, "all"):
        if rank() == 0:
            values = [make()]
    dist.broadcast_object_list(values)
    return values[0]


def all_equal(value: str) -> None:
    """Raises UserError on every rank, naming those whose value is not rank 0's."""
    if _store is None:
        return
    import torch.distributed as dist

    digests: list[Any] = [None] * world_size()
    dist.all_gather_object(digests, hashlib.sha256(value.encode()).hexdigest())
    others = [str(number) for number, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"The ranks were given different configurations: {', '.join(others)} differ from rank 0. "
            "Start all with the same command, in the same state of the files."
        )


@contextmanager
def _turn(first: bool, of: str) -> Iterator[None]:
    """Lets those who are not first into the body after the one that is. Every rank takes every turn.

    It asks the store from time to time: a collective would end by its time limit, and lets no signal through.
    """
    global _turns
    if _store is None:
        yield
        return
    _turns += 1
    key = f"turn {_turns} of {of}"
    if first:
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # the store is gone with rank 0
                _store.set(key, type(error).__name__)
            raise
        _store.set(key, "")
        return
    end = time.monotonic() + TURN.total_seconds()
    while not _store.check([key]):
        if time.monotonic() > end:
            raise PartnerFailed(f"Waited {TURN} for the first of {of}.")
        time.sleep(_POLL)
    if failure := _store.get(key).decode():
        raise PartnerFailed(f"The first of {of} failed: {failure}.")
    yield
