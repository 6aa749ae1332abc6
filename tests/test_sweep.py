"""Sweeps in this process, with a stand-in for the training: what becomes of each job, the table and the plot."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from tests.sweeping import table
from tests.waiting import until
from zephyr.errors import Stopped, UserError
from zephyr.launching.launch import JobFailed
from zephyr.launching.sweep import Sweep, name_of


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
    said: list[str] = []
    until(lambda: said.append(capsys.readouterr().err) or "another process is at it" in "".join(said), seconds=10)
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [0.75, 0.75] and len(training.started) == 1


# The table and the plot


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
    markdown = (sweep.folder / "sweep.md").read_text()
    said = capsys.readouterr()
    assert said.out.strip() == markdown.strip()
    assert "objective=ipo_mean,objective.beta=0.1 failed: No GPU here.\n" in said.err
    assert markdown == (
        "| objective | objective.beta | status     | eval/rewards/accuracies | eval/loss | eval/rewards/margins | seconds |\n"
        "| --------- | -------------- | ---------- | ----------------------- | --------- | -------------------- | ------- |\n"
        "| sigmoid   | 0.1            | finished   | 0.7123                  | 0.5       | 7.123                | 1.5     |\n"
        "| ipo_mean  | 0.01           | finished   | 0.65                    | 0.5       | 6.5                  | 1.5     |\n"
        "| sigmoid   | 0.01           | finished   | 0.6                     | 0.5       | 6                    | 1.5     |\n"
        "| ipo_mean  | 0.5            | unfinished |                         |           |                      |         |\n"
        "| ipo_mean  | 0.1            | failed     |                         |           |                      |         |\n"
    )
    rows = table(sweep.folder)
    assert rows[0]["eval/rewards/accuracies"] == "0.71234567"
    assert rows[0]["folder"] == "objective=sigmoid,objective.beta=0.1" and len(rows) == 5


def test_of_sft_the_lowest_loss_is_best(tmp_path):
    sweep = sweep_of(tmp_path)
    for seed, loss in (("1", 2.5), ("2", 1.5), ("3", 2.0)):
        sweep.run({"seed": seed}, config(stage="sft"), Training(None, loss))
    assert not sweep.report()
    assert [row["seed"] for row in table(sweep.folder)] == ["2", "3", "1"]


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
