"""Sweeps: what becomes of each job, and the table; as real processes at the end, without training before."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from matplotlib.figure import Figure

from tests.commands import ROOT, metrics, start, steps_done, train, world
from zephyr.errors import Stopped, UserError
from zephyr.launching.launch import JobFailed
from zephyr.launching.sweep import Sweep, name_of

# ---------------------------------------------------------------------------------------------------------------------
# One job.


def test_a_name_says_what_varies_and_suits_any_file_system():
    assert name_of({"seed": "1", "objective.beta": "0.1"}) == "objective.beta=0.1,seed=1"
    assert name_of({}) == "run"
    path = name_of({"data.train": "../my data/a.jsonl"})
    assert re.fullmatch(r"data\.train=\.\._my_data_a\.jsonl-[0-9a-f]{8}", path)
    assert path != name_of({"data.train": "../my_data/a.jsonl"})
    long = [name_of({"model.path": "x" * 300 + end}) for end in "ab"]
    assert len(long[0]) == len(long[1]) == 100 and long[0] != long[1]


def test_no_secret_is_in_a_name_or_in_what_a_sweep_leaves(tmp_path):
    sweep = sweep_of(tmp_path)
    sweep.expect([{"data.train": "https://me:hunter2@host/a"}])
    sweep.report()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and not any("hunter2" in f"{path} {path.read_text()}" for path in files)


LOGGER = {"project": "zephyr", "group": None, "name": "demo-dpo", "tags": []}


def config(**changes: Any) -> dict[str, Any]:
    trainer = {"devices": "auto", "strategy": "auto"}
    return {
        "recipe": "demo",
        "stage": "dpo",
        "beta": 0.1,
        "resume": None,
        "trainer": trainer,
        "logger": LOGGER,
        **changes,
    }


class Training:
    """Stands in for the training of a job: leaves what a run leaves."""

    def __init__(self, accuracy: float | None = 0.75, loss: float = 0.5, **more: float) -> None:
        self.evaluation = {"eval/loss": loss, **more}
        self.evaluation |= {} if accuracy is None else {"eval/rewards/accuracies": accuracy}
        self.started: list[dict[str, Any]] = []
        self.during: Callable[[], Any] = lambda: None

    def __call__(self, config: dict[str, Any]) -> float:
        self.started.append(config)
        output = Path(config["output_dir"])
        output.mkdir(parents=True, exist_ok=True)
        settled = {**config, "trainer": {**config["trainer"], "devices": 1}}
        (output / "config.yaml").write_text(yaml.safe_dump(settled))
        self.during()
        summary = {"stage": config["stage"], "seconds": 1.5, "eval": self.evaluation}
        (output / "summary.json").write_text(json.dumps(summary))
        return self.evaluation.get("eval/rewards/accuracies", self.evaluation["eval/loss"])


def sweep_of(folder: Path, *keys: str) -> Sweep:
    return Sweep(folder / "demo-sweep", frozenset(keys))


def fail(error: BaseException) -> Callable[[], Any]:
    def raising() -> None:
        raise error

    return raising


BETA = {"objective.beta": "0.1"}


def test_a_finished_job_is_left_alone_an_unfinished_goes_on_another_starts(tmp_path, capsys):
    training, sweep = Training(), sweep_of(tmp_path)
    training.during = fail(JobFailed("The run's process was killed by SIGKILL.\nIts last words."))
    assert sweep.run(BETA, config(), training) is None
    assert "killed by SIGKILL.\nIts last words." in capsys.readouterr().err
    training.during = lambda: None
    assert sweep.run(BETA, config(), training) == 0.75
    assert sweep.run(BETA, config(), training) == 0.75
    assert sweep.run(BETA, config(resume="auto"), training) == 0.75
    assert [job["resume"] for job in training.started] == [None, "auto"]
    assert sweep.run(BETA, config(beta=0.2), training) == 0.75
    assert [job["resume"] for job in training.started] == [None, "auto", None]
    assert {job["output_dir"] for job in training.started} == {str(tmp_path / "demo-sweep" / "objective.beta=0.1")}


def test_what_auto_came_to_is_no_other_configuration_but_what_is_asked_for_is(tmp_path):
    training, sweep = Training(), sweep_of(tmp_path)
    for devices in ("auto", "auto", 1, 2):
        sweep.run(BETA, config(trainer={"devices": devices, "strategy": "auto"}), training)
    assert [job["trainer"]["devices"] for job in training.started] == ["auto", 2]


def test_runs_of_w_and_b_share_a_group_and_are_called_by_what_varies(tmp_path):
    training, sweep = Training(), sweep_of(tmp_path)
    sweep.run(BETA, config(), training)
    sweep.run({"seed": "1"}, config(logger={**LOGGER, "group": "mine", "name": "it"}), training)
    sweep.run({"seed": "2"}, config(logger=None), training)
    first, second, third = (job["logger"] for job in training.started)
    assert first == {**LOGGER, "group": "demo-sweep", "name": "objective.beta=0.1"}
    assert second == {**LOGGER, "group": "mine", "name": "it"}
    assert third is None


def test_a_metric_that_is_no_number_is_none(tmp_path):
    assert sweep_of(tmp_path).run(BETA, config(), Training(float("nan"))) is None
    assert sweep_of(tmp_path).run(BETA, config(), Training(float("nan"))) is None


def test_a_signal_ends_the_sweep_here_and_a_job_elsewhere(tmp_path):
    training = Training()
    training.during = fail(Stopped(signal.SIGTERM))
    here = sweep_of(tmp_path)
    with pytest.raises(Stopped):
        here.run(BETA, config(), training)
    elsewhere = Sweep(here.folder, here.keys, here.command, ("a node", os.getpid()))
    assert elsewhere.run(BETA, config(), training) is None
    assert not here.report() and "unfinished" in (here.folder / "sweep.md").read_text()


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, capsys):
    training, sweep = Training(), sweep_of(tmp_path)
    begun, go_on, results = threading.Event(), threading.Event(), []
    training.during = lambda: begun.set() or go_on.wait(10)
    threads = [threading.Thread(target=lambda: results.append(sweep.run(BETA, config(), training))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    said, end = "", time.monotonic() + 10
    while "another process is at it" not in said and time.monotonic() < end:
        said += capsys.readouterr().err
        time.sleep(0.01)
    assert "another process is at it" in said
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [0.75, 0.75] and len(training.started) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The table and the plot.


def grid(folder: Path, accuracies: dict[tuple[str, str], float], stage: str = "dpo") -> Sweep:
    sweep = sweep_of(folder)
    for (objective, beta), accuracy in accuracies.items():
        training = Training(accuracy, **{"eval/rewards/margins": 10 * accuracy})
        sweep.run({"objective": objective, "objective.beta": beta}, config(stage=stage), training)
    return sweep


def test_the_table_has_the_best_first_and_every_job(tmp_path, capsys):
    sweep = grid(tmp_path, {("sigmoid", "0.01"): 0.6, ("sigmoid", "0.1"): 0.71234567, ("ipo_mean", "0.01"): 0.65})
    sweep.expect([{"objective": "ipo_mean", "objective.beta": "0.5"}])
    mistaken = Training()
    mistaken.during = fail(UserError("No GPU here.\nTake another."))
    sweep.run({"objective": "ipo_mean", "objective.beta": "0.1"}, config(), mistaken)
    grid_of_another_command = sweep_of(tmp_path)
    grid_of_another_command.expect([{"objective": "hinge", "objective.beta": "0.1"}])
    capsys.readouterr()

    assert sweep.report()
    table = (sweep.folder / "sweep.md").read_text()
    said = capsys.readouterr()
    assert said.out.strip() == table.strip()
    assert "objective=ipo_mean,objective.beta=0.1 failed: No GPU here.\n" in said.err
    assert table == (
        "| objective | objective.beta | status     | eval/rewards/accuracies | eval/loss | eval/rewards/margins | seconds |\n"
        "| --------- | -------------- | ---------- | ----------------------- | --------- | -------------------- | ------- |\n"
        "| sigmoid   | 0.1            | finished   | 0.7123                  | 0.5       | 7.123                | 1.5     |\n"
        "| ipo_mean  | 0.01           | finished   | 0.65                    | 0.5       | 6.5                  | 1.5     |\n"
        "| sigmoid   | 0.01           | finished   | 0.6                     | 0.5       | 6                    | 1.5     |\n"
        "| ipo_mean  | 0.5            | unfinished |                         |           |                      |         |\n"
        "| ipo_mean  | 0.1            | failed     |                         |           |                      |         |\n"
    )
    rows = list(csv.DictReader((sweep.folder / "sweep.csv").open()))
    assert rows[0]["eval/rewards/accuracies"] == "0.71234567"
    assert rows[0]["folder"] == "objective=sigmoid,objective.beta=0.1" and len(rows) == 5


def test_of_sft_the_lowest_loss_is_best(tmp_path):
    sweep = sweep_of(tmp_path)
    for seed, loss in (("1", 2.5), ("2", 1.5), ("3", 2.0)):
        sweep.run({"seed": seed}, config(stage="sft"), Training(None, loss))
    assert not sweep.report()
    assert [row["seed"] for row in csv.DictReader((sweep.folder / "sweep.csv").open())] == ["2", "3", "1"]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    return figures


def test_a_grid_is_drawn_with_a_line_for_each_value_of_the_other_key(tmp_path, drawn):
    betas = ["0.1", "0.01", "0.5"]
    accuracies = {(o, b): i / 10 for i, (o, b) in enumerate((o, b) for o in ("sigmoid", "ipo_mean") for b in betas)}
    grid(tmp_path, accuracies).report()
    [axes] = drawn[0].axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "objective.beta"
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "objective=ipo_mean": [[0.01, 0.4], [0.1, 0.3], [0.5, 0.5]],
        "objective=sigmoid": [[0.01, 0.1], [0.1, 0.0], [0.5, 0.2]],
    }
    assert (tmp_path / "demo-sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_random_search_is_drawn_as_dots_against_each_number(tmp_path, drawn):
    sweep = sweep_of(tmp_path)
    for i, (beta, warmup) in enumerate([("0.1", "0.3"), ("0.2", "0.1"), ("0.4", "0.2")]):
        sweep.run({"objective.beta": beta, "optimizer.warmup_ratio": warmup}, config(), Training(i / 10))
    sweep.report()
    beta, warmup = drawn[0].axes
    assert (beta.get_xlabel(), beta.get_xscale()) == ("objective.beta", "log")
    assert (warmup.get_xlabel(), warmup.get_xscale()) == ("optimizer.warmup_ratio", "linear")
    assert warmup.lines[0].get_xydata().tolist() == [[0.1, 0.1], [0.2, 0.2], [0.3, 0.0]]


def test_what_is_no_number_is_drawn_as_bars(tmp_path, drawn):
    grid(tmp_path, {("sigmoid", "0.1"): 0.6, ("ipo_mean", "0.1"): 0.7}).report()
    [axes] = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.7]  # from below: the best is on top


# ---------------------------------------------------------------------------------------------------------------------
# The command, with Hydra and Optuna, but with a stand-in for what trains.

STAND_IN = """
import json, math, runpy, signal, sys, types
from pathlib import Path

import yaml

import zephyr.launching.launch
from zephyr.errors import UserError

CHOICE = types.SimpleNamespace(**json.loads(sys.argv.pop(1)))
run = types.ModuleType("zephyr.run")
run.chosen = lambda settings: CHOICE
run.run = lambda settings, config: print("in this process", config["output_dir"])
dry_run = types.ModuleType("zephyr.planning.dry_run")
sys.modules |= {"zephyr.run": run, "zephyr.planning.dry_run": dry_run}
dry_run.report = lambda settings: f"takes {settings.objective.beta} hours"


def launch(config, processes):
    beta = config["objective"]["beta"] if config["stage"] == "dpo" else config["optimizer"]["lr"]
    print("launched", processes, json.dumps(config["trainer"]))
    if beta == 3:
        signal.raise_signal(signal.SIGTERM)
    if beta > CHOICE.limit:
        raise [UserError("Too much."), zephyr.launching.launch.JobFailed("It died.")][config["seed"] % 2]
    output = Path(config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    name = {"dpo": "eval/rewards/accuracies", "sft": "eval/loss"}[config["stage"]]
    metric = -abs(math.log10(beta) + 1)
    summary = {"stage": config["stage"], "seconds": 1, "eval": {name: metric}}
    (output / "summary.json").write_text(json.dumps(summary))
    return metric


zephyr.launching.launch.launch = launch
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def stand_in(
    output: Path,
    *overrides: str,
    check: int = 0,
    environment: dict[str, str] | None = None,
    limit: float = 1e9,
    **choice: Any,
) -> subprocess.CompletedProcess[str]:
    machine = {"strategy": "single", "devices": 1, "processes": 1, "limit": limit, **choice}
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, json.dumps(machine), f"output_dir={output}", *overrides],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


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


# ---------------------------------------------------------------------------------------------------------------------
# Real ones, on the tiny model.

SHORT = ["trainer.max_steps=40", "checkpoint.every_n_steps=2", "samples.count=0", "trainer.eval_every_n_steps=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world(tmp_path_factory.mktemp("sweeps"))


def wait_for_steps(process: subprocess.Popen[bytes], job: Path, steps: int) -> None:
    while steps_done(job) < steps:
        assert process.poll() is None, "the sweep ended"
        time.sleep(0.02)


def test_a_sweep_outlives_what_befalls_its_jobs_here_and_elsewhere(folder):
    sweep = folder / "dpo-sweep"
    command_line = ["-m", "objective.beta=0.1,0.5", *SHORT]
    first, second = sweep / "objective.beta=0.1", sweep / "objective.beta=0.5"
    process = start(folder, "dpo", folder / "dpo", *command_line)
    while steps_done(first) < 4:
        assert process.poll() is None, "the sweep ended"
        time.sleep(0.02)
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
