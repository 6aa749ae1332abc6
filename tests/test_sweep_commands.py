"""Sweeps as commands: a stand-in trains, and at the end the tiny model does."""

import re
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.commands import ROOT, metrics, start, steps_done, train, world
from tests.sweeping import stand_in, table
from tests.waiting import until


def test_a_single_run_stays_here_unless_it_takes_several_processes(tmp_path):
    assert "in this process" in stand_in(tmp_path / "x").stdout
    several = stand_in(tmp_path / "x", strategy="fsdp", devices=4, processes=4).stdout
    assert "launched 4" in several and '"devices": 4' in several and '"strategy": "fsdp"' in several
    joined = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    assert "in this process" in stand_in(tmp_path / "x", environment=joined, devices=4, processes=4).stdout
    failed = stand_in(
        tmp_path / "x", "stage=dpo", "objective.beta=5", "seed=1", check=1, limit=1, devices=2, processes=2
    )
    assert failed.stderr == "Error: It died.\n"
    assert not any(tmp_path.glob("*-sweep"))


def test_the_handbooks_scan_is_one_command(tmp_path):
    params = yaml.safe_load((ROOT / "conf/sweep/handbook.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert params["objective"] == "sigmoid,ipo_mean"
    assert params["objective.beta"].split(",") == ["0.01", *(f"0.{tenths}" for tenths in range(1, 10))]

    fewer = "objective.beta=0.01,0.1"
    done = stand_in(tmp_path / "dpo", "stage=dpo", "sweep=handbook", fewer)
    rows = table(tmp_path / "dpo-sweep")
    assert sorted((row["objective"], row["objective.beta"]) for row in rows) == [
        (objective, beta) for objective in ("ipo_mean", "sigmoid") for beta in ("0.01", "0.1")
    ]
    assert rows[0]["objective.beta"] == "0.1"
    assert done.stdout.count("launched 1 ") == done.stdout.count('"devices": 1, "num_nodes": 1,') == 4
    assert done.stdout.count('"strategy": "auto"') == 4  # single is no value of trainer.strategy
    assert {path.name for path in (tmp_path / "dpo-sweep").iterdir()} == {
        ".jobs", "sweep.csv", "sweep.md", "sweep.png", *(row["folder"] for row in rows),
    }  # fmt: skip
    part = stand_in(tmp_path / "dpo", "stage=dpo", "sweep=handbook", "objective=hinge,sigmoid", "objective.beta=0.01")
    assert part.stderr.count("finished already") == 1 and part.stdout.count("launched") == 1


def test_failed_jobs_are_told_and_the_others_go_on(tmp_path):
    done = stand_in(tmp_path / "dpo", "-m", "stage=dpo", "objective.beta=5,0.1,7", "seed=1,2", check=1, limit=1)
    rows = table(tmp_path / "dpo-sweep")
    assert [row["status"] for row in rows] == ["finished"] * 2 + ["failed"] * 4
    assert done.stderr.count("Too much.") == done.stderr.count("It died.") == 4  # at once, and at the end
    again = stand_in(tmp_path / "dpo", "-m", "stage=dpo", "objective.beta=5,0.1,7", "seed=1,2")
    assert again.stderr.count("finished already") == 2
    assert [row["status"] for row in table(tmp_path / "dpo-sweep")] == ["finished"] * 6


def test_a_signal_ends_the_sweep_with_its_table(tmp_path):
    done = stand_in(tmp_path / "dpo", "-m", "stage=dpo", "objective.beta=0.1,3,0.2", check=143)
    assert [(row["objective.beta"], row["status"]) for row in table(tmp_path / "dpo-sweep")] == [
        ("0.1", "finished"), ("0.2", "unfinished"), ("3", "unfinished"),
    ]  # fmt: skip
    assert done.stderr.endswith("Stopped by SIGTERM. The same command goes on.\n")


SEARCH = ["stage=dpo", "sweep=optuna"]


def test_optuna_finds_the_best_goes_past_failures_and_remembers(tmp_path):
    sweep, search = tmp_path / "dpo-sweep", [*SEARCH, "hydra.sweeper.n_trials=6"]
    stand_in(tmp_path / "dpo", *search, limit=0.1, check=1)
    rows = table(sweep)
    assert [row["status"] for row in rows][:2] == ["finished"] * 2 and rows[-1]["status"] == "failed"
    assert len(rows) == 6
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(float(row["eval/rewards/accuracies"] or "-inf") for row in rows)
    assert best["best_params"]["objective.beta"] == float(rows[0]["objective.beta"])

    failed = sum(row["status"] == "failed" for row in rows)
    more = stand_in(tmp_path / "dpo", *SEARCH, "hydra.sweeper.n_trials=8")
    assert more.stderr.count("finished already") == 6 - failed and more.stdout.count("launched") == 2 + failed
    assert {row["folder"] for row in rows} < {row["folder"] for row in table(sweep)}


def test_optuna_minimises_the_loss_of_sft(tmp_path):
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(1e-5,1e-1))"]
    stand_in(tmp_path / "sft", *search)
    best = yaml.safe_load((tmp_path / "sft-sweep" / "optimization_results.yaml").read_text())["best_value"]
    losses = [float(row["eval/loss"]) for row in table(tmp_path / "sft-sweep")]
    assert best == min(losses) == losses[0] and len(losses) == 4


def test_a_study_without_a_single_success_ends_with_its_table(tmp_path):
    done = stand_in(tmp_path / "dpo", *SEARCH, "hydra.sweeper.n_trials=2", limit=0, check=1)
    assert [row["status"] for row in table(tmp_path / "dpo-sweep")] == ["failed"] * 2
    assert done.stderr.count("Too much.") == 4


def test_whatever_varies_the_jobs_share_one_folder(tmp_path):
    folder = "${oc.env:OUT}/${recipe}/my ${stage}"
    stand_in(
        tmp_path,
        f"output_dir='{folder}'",
        "-m",
        "recipe=demo,zephyr-7b-beta",
        "stage=dpo",
        "model.path=OWNER/NAME",
        environment={"OUT": str(tmp_path)},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    sweep = tmp_path / "demo" / "my dpo-sweep"
    assert {row["recipe"] for row in table(sweep)} == {"demo", "zephyr-7b-beta"}


def test_a_dry_run_of_a_sweep_leaves_nothing(tmp_path):
    done = stand_in(tmp_path / "dpo", "-m", "stage=dpo", "dry_run=true", "objective.beta=0.1,0.2")
    assert done.stdout == "takes 0.1 hours\ntakes 0.2 hours\n" and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*SEARCH, "hydra.sweeper.direction=minimize"], "would look for the worst: the metric of stage=dpo is to maximize"),
        ([*SEARCH, "data.validation=null"], "data.validation is null"),
        (["sweep=optuna"], "objective.beta belongs to stage=dpo"),
        ([*SEARCH, "objective.beta=interval(-1,1)"], "objective.beta must be above 0"),
        ([*SEARCH, "optimizer.schedule=linear,cosin"], "must be one of cosine, linear"),
        (["-m", "hydra/sweeper=optuna", "stage=sft,dpo", "optimizer.lr=1e-5,1e-6"], "sweep one stage"),
        (["stage=dpo", "sweep=handbook", "objective=sigmoid,ipo"], "Unknown objective 'ipo'"),
        (["sweep=hanbook"], "Unknown sweep 'hanbook'. Choose one of: handbook, optuna, slurm. Did you mean 'handbook'?"),
        (["-m", "seed=1,2", "--config-dir=conf"], "A sweep takes no other flag than -m."),
        (["-m", "seed=1,2", "resume=x/checkpoints/step-00000002"], "resume=CHECKPOINT is for a single run"),
        (["stage=dpo", "sweep=slurm", "objective.beta=0.1,0.2"], "There is no srun here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_mistakes_are_answered_before_the_first_job(overrides, words, tmp_path):
    done = stand_in(tmp_path / "out", *overrides, check=2)
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_launcher_of_processes_does_not_start_sweeps(tmp_path):
    joined = {"RANK": "1", "WORLD_SIZE": "2"}
    done = stand_in(tmp_path / "out", "-m", "seed=1,2", check=2, environment=joined)
    assert "every process would make a sweep of its own" in done.stderr


def test_what_is_not_installed_is_named(tmp_path):
    code = "import sys, runpy; sys.modules['hydra_plugins'] = None; runpy.run_path('train.py', run_name='__main__')"
    for choice in (["sweep=optuna"], ["-m", "hydra/launcher=submitit_local"]):
        done = subprocess.run([sys.executable, "-c", code, *choice], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == "Error: This sweep needs Optuna or submitit: pip install 'zephyr[sweep]'\n"
        assert done.returncode == 2


# The tiny model trains

SHORT = ["trainer.max_steps=40", "checkpoint.every_n_steps=2", "samples.count=0", "trainer.eval_every_n_steps=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world(tmp_path_factory.mktemp("sweeps"))


def test_a_sweep_outlives_what_befalls_its_jobs_here_and_elsewhere(folder):
    sweep = folder / "dpo-sweep"
    command_line = ["-m", "objective.beta=0.1,0.5", *SHORT]
    first, second = sweep / "objective.beta=0.1", sweep / "objective.beta=0.5"
    process = start(folder, "dpo", folder / "dpo", *command_line)
    until(lambda: steps_done(first) >= 4, seconds=300, process=process)
    [worker] = psutil.Process(process.pid).children()
    worker.kill()
    assert process.wait(60) == 1
    assert 4 <= steps_done(first) < 40
    assert [(row["objective.beta"], row["status"]) for row in table(sweep)] == [("0.5", "finished"), ("0.1", "failed")]
    assert (second / "model").is_dir()

    done = train(folder, "dpo", folder / "dpo", *command_line, "hydra/launcher=submitit_local")
    said = "".join(file.read_text() for file in (sweep / ".submitit").rglob("*.err"))
    assert "objective.beta=0.1: going on" in said and "Going on from" in said and "Going on from" not in done.stderr
    assert "objective.beta=0.5: finished already" in said
    assert [row["status"] for row in table(sweep)] == ["finished"] * 2
    assert [line["step"] for line in metrics(first) if "train/loss" in line] == list(range(1, 41))
    assert {path.name for path in sweep.glob("*=*")} == {first.name, second.name}

    started = time.monotonic()
    done = train(folder, "dpo", folder / "dpo", *command_line)
    assert time.monotonic() - started < 10 and done.stderr.count("finished already") == 2
    assert [row["status"] for row in table(sweep)] == ["finished"] * 2


def test_optunas_trials_have_the_same_values_on_every_rank(folder):
    done = train(
        folder, "dpo", folder / "search", "sweep=optuna", "hydra.sweeper.n_trials=3", "trainer.devices=2", *SHORT,
        "trainer.max_steps=3", "optimizer.lr=tag(log,interval(1e-5,1e-3))",
    )  # fmt: skip
    said = r"Process (\d) of 2, configuration (\w+): .*objective.beta=([\d.e-]+),.*optimizer.lr=([\d.e-]+),"
    first = [match[1:] for match in re.findall(said, done.stderr)]
    rows = table(folder / "search-sweep")
    assert len(first) == len(set(first)) == len(rows) == 3
    for row in rows:
        log = folder / "search-sweep" / row["folder"] / "ranks" / "rank-1.log"
        [(rank, *values)] = re.findall(said, log.read_text())
        assert rank == "1" and tuple(values) in first
        assert values[1:] == [row["objective.beta"], row["optimizer.lr"]]
