"""Which process of how many this one is: from the variables of torchrun and srun, never of mpirun; and alone."""

import os

import pytest

from zephyr import distributed
from zephyr.errors import UserError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's own, without any launcher, and put back afterwards."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        mine.pop(name, None)
    monkeypatch.setattr("os.environ", mine)
    return mine


SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "cpu1,gpu[07-08]",
}


def test_srun_is_translated(environment: dict[str, str]) -> None:
    environment |= SRUN
    assert distributed.joined()
    distributed.adopt_slurm()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size(), distributed.nodes()) == (5, 1, 8, 2)
    assert environment["NODE_RANK"] == "1" and environment["LOCAL_WORLD_SIZE"] == "4"
    # 123456 = 6 x 20000 + 3456
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu07", "13456")
    before = dict(environment)
    distributed.adopt_slurm()
    assert environment == before and distributed.joined()


@pytest.mark.parametrize(
    "changed, port",
    [({"SLURM_STEP_ID": "1"}, "18455"), ({"SLURM_JOB_ID": "16"}, "10016"), ({"MASTER_PORT": "2"}, "2")],
)
def test_steps_of_a_job_meet_at_different_ports(
    environment: dict[str, str], changed: dict[str, str], port: str
) -> None:
    environment |= SRUN | changed
    distributed.adopt_slurm()
    assert environment["MASTER_PORT"] == port


def test_nodes_with_different_numbers_of_tasks(environment: dict[str, str]) -> None:
    environment |= SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}
    with pytest.raises(UserError, match="--ntasks-per-node"):
        distributed.adopt_slurm()


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node[01-04,7]", "node01"),
        ("node[7,01-04]", "node7"),
        ("a,b[1-2]", "a"),
        ("n[1-2],m", "n1"),
        ("host", "host"),
        ("rack[2-3]n[001,005]-ib", "rack2n001-ib"),
        ("a-b-[10-12].cluster", "a-b-10.cluster"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert distributed.first_host(nodes) == first


SUBMITIT = {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, False),
        (SUBMITIT, False),
        (BATCH, False),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, False),  # salloc's shell
        ({"LOCAL_RANK": "0", "RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        (SRUN, True),
        ({**SUBMITIT, "RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({**SRUN, "PMI_SIZE": "8"}, True),
    ],
)
def test_who_has_joined(environment: dict[str, str], variables: dict[str, str], expected: bool) -> None:
    environment |= variables
    assert distributed.joined() is expected
    distributed.adopt_slurm()
    assert ("WORLD_SIZE" in environment) is expected


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_mpirun_is_refused_rather_than_every_process_training_alone(environment: dict[str, str], name: str) -> None:
    environment[name] = "4"
    with pytest.raises(UserError, match="torchrun or srun"):
        distributed.joined()


def test_alone_there_is_nobody_to_wait_for(environment: dict[str, str]) -> None:
    facts = (distributed.rank(), distributed.local_rank(), distributed.world_size(), distributed.nodes())
    assert facts == (0, 0, 1, 1)
    for _ in range(2):
        with distributed.process_group("cpu"), distributed.local_first():
            assert distributed.from_first(lambda: 3) == 3
    distributed.barrier()
    distributed.all_equal("x")
    with distributed.local_first():
        assert distributed.from_first(lambda: 4) == 4
    for _ in range(2):
        with pytest.raises(KeyError), distributed.process_group("cpu"):
            raise KeyError
