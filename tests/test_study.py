"""The ablation: its plan, its runs (made by a stand-in for train.py), its figures, its report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import conf
from zephyr.errors import UserError
from zephyr.settings import parse as parse_run
from zephyr.study import ablation
from zephyr.study.__main__ import main
from zephyr.study.estimates import estimate, t_interval, wins
from zephyr.study.figures import draw
from zephyr.study.plan import override, plan
from zephyr.study.report import verdict
from zephyr.study.settings import parse

# Leaves what a run leaves, in the folder that its overrides name.
TRAINER = """
import json, os, sys
from pathlib import Path
config = {"trainer": {}, **dict(argument.split("=", 1) for argument in sys.argv[1:])}
output = Path(config["output_dir"])
name = f"{output.parent.name}/{output.name}"
with Path(os.environ["LOG"]).open("a") as log:
    log.write(f"{name}{' resumed' * ('resume' in config)}\\n")
output.mkdir(parents=True, exist_ok=True)
(output / "config.yaml").write_text(json.dumps({**config, "resume": None}))
if name in os.environ.get("FAIL", "").split():
    sys.exit(2)
rows, evaluation = [], {"eval/loss": 1.0}
if config["stage"] == "dpo":
    epochs = int(config["trainer.max_epochs"])
    rows = [{"step": s, "epoch": epochs * s / 8, "train/rewards/accuracies": s / 8} for s in (2, 4, 6, 8)]
    evaluation = {"eval/rewards/accuracies": 0.75}
(output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(output / "summary.json").write_text(json.dumps({"eval": evaluation, "seconds": 6.0, "steps": 8}))
"""
SCORES = {"sft": [3, 4], "sft-2": [3, 3], "dpo-alone": [1, 1], "dpo": [5, 4], "dpo-2-epochs": [5, 5]}
RUNS = [f"seed-{seed}/{arm}" for seed in (1, 2) for arm in ("sft", "sft-2", "dpo-alone", "dpo", "dpo-2-epochs")]


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """What stands for the configuration of a run here: its overrides, and what the plan reads."""
    pairs = dict(text.split("=", 1) for text in overrides)
    if "output_dir" in pairs:
        return {"trainer": {}, "resume": None, **pairs}
    data = {"train": "demo:feedback-train.jsonl", "validation": None, "bad_rows": "error"}
    return {"model": {"base": "demo:base", "base_revision": None}, "data": data}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a study whose runs and answers cost nothing; `log` in it names the runs begun."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}) + "\n")
    (tmp_path / "train.py").write_text(TRAINER)
    monkeypatch.setattr("zephyr.study.plan.TRAIN", tmp_path / "train.py")
    monkeypatch.setattr("zephyr.study.training.locate", lambda source: str(pairs))
    monkeypatch.setattr("zephyr.study.ablation.parse_run", lambda config: None)
    monkeypatch.setattr("zephyr.demo.__main__.held_out", lambda count: ["job?", "age?"])
    monkeypatch.setattr(
        "zephyr.demo.__main__.answer", lambda folder, asked: [(str(score), 7) for score in SCORES[folder.name]]
    )
    monkeypatch.setattr("zephyr.demo.teacher.score", lambda asked, said: float(said))
    monkeypatch.setattr("zephyr.study.report.figures.draw", lambda results, output: [])
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path


def study(folder: Path, *overrides: str) -> int:
    output = f"output={folder / 'study'}"
    return ablation.run(conf.compose("study/ablation", [output, "seeds=[1,2]", "epochs=2", *overrides]), composed)


def begun(folder: Path) -> list[str]:
    """The runs begun since the last time of asking."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_every_run_is_one_that_train_py_takes(tmp_path):
    """The real configurations: what starts from what, on which data, for how long."""
    for recipe in ("demo", "zephyr-7b-qlora"):
        output = override("output", f"{tmp_path}/a study, of {recipe}")
        config = [f"recipe={recipe}", output, "seeds=[7]", "epochs=2"]
        settings = parse(conf.compose("study/ablation", config))
        runs = plan(settings, conf.compose("train", [f"recipe={recipe}", "stage=dpo"]))
        parsed = {run.arm: parse_run(conf.compose("train", run.overrides)) for run in runs}
        root = f"{tmp_path}/a study, of {recipe}"
        assert [*parsed] == ["sft", "sft-2", "dpo-alone", "dpo", "dpo-2-epochs"]
        assert {arm: run.output_dir for arm, run in parsed.items()} == {arm: f"{root}/seed-7/{arm}" for arm in parsed}
        first = f"{root}/seed-7/sft/model"
        starts = {arm: run.model.path for arm, run in parsed.items()}
        base = parsed["sft"].model.base
        assert starts == {"sft": None, "sft-2": first, "dpo-alone": base, "dpo": first, "dpo-2-epochs": first}
        assert parsed["dpo-alone"].model.revision == parsed["sft"].model.base_revision
        assert [run.trainer.max_epochs for run in parsed.values()] == [1, 1, 1, 1, 2]
        assert parsed["sft-2"].stage == "sft" and parsed["sft-2"].data.train == f"{root}/data/chosen-train.jsonl"
        assert parsed["sft-2"].data.validation == f"{root}/data/chosen-validation.jsonl"
        assert parsed["sft-2"].optimizer == parsed["sft"].optimizer
        assert {(run.seed, run.logger) for run in parsed.values()} == {(7, None)}


@pytest.mark.parametrize("value", ["a b", "it's", "a=b,c", "{x}", "back\\slash", "end\\", "\\'", "[1]", "$HOME"])
def test_an_override_says_what_it_is_given(value):
    assert conf.compose("train", [override("output_dir", value)])["output_dir"] == value


def test_the_study_makes_each_run_once_and_writes_its_report(folder, monkeypatch, capsys):
    monkeypatch.setattr("zephyr.study.report.figures.draw", draw)
    assert study(folder) == 0
    assert begun(folder) == RUNS
    output = folder / "study"
    chosen = [json.loads(line) for line in (output / "data" / "chosen-train.jsonl").read_text().splitlines()]
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert chosen == [{"messages": said}] and not (output / "data" / "chosen-validation.jsonl").exists()
    assert (output / "ablation.png").stat().st_size > 10_000 and (output / "epochs.png").exists()

    found = json.loads((output / "results.json").read_text())
    arms = {arm: {measure: value["mean"] for measure, value in known.items()} for arm, known in found["arms"].items()}
    assert arms["sft"] == {"score": 3.5, "win_rate": 50.0, "tokens": 7.0}
    assert arms["sft-2"] == {"score": 3.0, "win_rate": 25.0, "tokens": 7.0}  # a tie and a loss
    assert (arms["dpo"]["score"], arms["dpo"]["win_rate"], arms["dpo"]["accuracy"]) == (4.5, 75.0, 0.75)
    assert [(a, b, difference["mean"]) for a, b, difference in found["ahead"]] == [
        ("dpo", "sft", 1.0), ("dpo", "sft-2", 1.5), ("sft", "sft-2", 0.5), ("sft-2", "dpo-alone", 2.0),
    ]  # fmt: skip
    # of the last pass: steps 2 to 8 of one epoch, steps 6 and 8 of two
    assert found["epochs"]["1"]["train_accuracy"]["mean"] == (0.25 + 0.5 + 0.75 + 1) / 4
    assert found["epochs"]["2"]["train_accuracy"]["mean"] == (0.75 + 1) / 2
    assert found["curves"]["1"]["train"] == [[0.5, 0.25], [1.0, 0.5], [1.5, 0.75], [2.0, 1.0]]
    assert found["published"]["dpo"]["mt_bench"] == 7.0 and found["seconds"] == 60.0

    report = (output / "report.md").read_text()
    assert "| dDPO + dSFT | 7.00 | 86.07 ± 1.22 | 4.50 ± 0.00 [4.00, 5.00] | 75.0 ± 0.0 [50.0, 100.0] |" in report
    assert "| dSFT-1 above dSFT-2 | +0.45 | +0.50 ± 0.00 [+0.00, +1.00] | not told apart |" in report
    assert "| dSFT-2 above dDPO without dSFT | +1.43 | +2.00 ± 0.00 [+2.00, +2.00] | as in the paper |" in report
    assert report in capsys.readouterr().out

    assert study(folder) == 0 and begun(folder) == []
    assert (output / "report.md").read_text() == report


def test_only_what_is_missing_unfinished_or_changed_is_trained(folder):
    study(folder)
    begun(folder)
    output = folder / "study"
    (output / "seed-1" / "dpo" / "summary.json").unlink()
    (output / "seed-2" / "dpo-alone" / "config.yaml").unlink()
    later = time.time() + 100
    os.utime(output / "seed-2" / "sft" / "summary.json", (later, later))  # as if made anew after its children
    assert study(folder) == 0
    children = [f"seed-2/{arm}" for arm in ("sft-2", "dpo-alone", "dpo", "dpo-2-epochs")]
    assert begun(folder) == ["seed-1/dpo resumed", *children]
    assert study(folder, "dpo=optimizer.lr=1e-4 optimizer.eps=1e-9", "seeds=[1]") == 0
    assert begun(folder) == ["seed-1/dpo-alone", "seed-1/dpo", "seed-1/dpo-2-epochs"]


def test_a_failure_is_named_and_the_rest_goes_on(folder, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "seed-1/sft seed-2/dpo-alone")
    assert study(folder) == 1
    assert begun(folder) == ["seed-1/sft", "seed-1/dpo-alone", *RUNS[5:]]
    report = (folder / "study" / "report.md").read_text()
    assert "- seed-1/sft: exit status 2" in report and "- seed-2/dpo-alone: exit status 2" in report
    assert "- seed-1/dpo: not begun, as seed-1/sft failed" in report
    assert "| dDPO + dSFT | 7.00 | 86.07 ± 1.22 | 4.50 [4.00, 5.00] |" in report  # of one seed
    monkeypatch.setenv("FAIL", "")
    assert study(folder) == 0
    arms = ("sft resumed", "sft-2", "dpo", "dpo-2-epochs")
    assert begun(folder) == [*(f"seed-1/{arm}" for arm in arms), "seed-2/dpo-alone resumed"]


def test_other_recipes_are_evaluated_by_the_benchmarks(folder, monkeypatch):
    asked: list[list[str]] = []

    def evaluate(command: list[str]) -> int:
        if "zephyr.evaluate" not in command:
            return subprocess.run(command).returncode
        asked.append(command[command.index("zephyr.evaluate") + 1 :])
        for name, result in (("mt_bench", {"score": 6.5}), ("alpaca_eval", {"win_rate": 80.0})):
            file = Path(asked[-1][0]) / "evaluation" / name / "results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result))
        return 0

    monkeypatch.setattr("zephyr.study.training.call", evaluate)
    monkeypatch.setattr("zephyr.study.judging.call", evaluate)
    wanted = ["recipe=other", "seeds=[1]", "epochs=1", "evaluate=judge.model=m"]
    assert study(folder, *wanted) == 0
    assert asked[0][1:] == ["benchmarks=[mt_bench,alpaca_eval]", "judge.model=m"] and len(asked) == 4
    report = (folder / "study" / "report.md").read_text()
    assert "| dSFT-1 | 6.64 | 85.65 ± 1.23 | 6.50 | 80.0 |" in report
    assert study(folder, *wanted) == 0 and len(asked) == 4


def test_a_stopped_study_stops_the_run_under_way(folder):
    """SIGTERM reaches the run, which ends by itself, before the study does."""
    (folder / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    time.sleep(0.3); pathlib.Path('ended').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('begun').touch(); time.sleep(60)\n"
    )
    program = (
        "import sys; from zephyr.command import status; from zephyr.study.training import call\n"
        f"sys.exit(status(lambda: call([sys.executable, {str(folder / 'train.py')!r}])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder)
    while not (folder / "begun").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143 and (folder / "ended").exists()


def test_mistakes_are_said_before_anything_is_trained(tmp_path, capsys):
    output = f"output={tmp_path / 'study'}"
    for arguments, said in [
        (["ablation", output, "recipe=dmo"], "Unknown recipe 'dmo'"),
        (["ablation", output, "seeds=[1,1]"], "seeds=[1, 1] must be one or more different numbers."),
        (["ablation", output, "sft=optimizer.lrr=1"], "optimizer has no key 'lrr'. Did you mean 'lr'?"),
        (["ablation", output, "dpo=optimizer.lr=-1"], "optimizer.lr must be above 0"),
        (["epochs"], "Unknown study 'epochs'."),
        ([], "Which study?"),
    ]:
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    assert main(["ablation", output, "dry_run=true", "seeds=[1]", "epochs=1"]) == 0
    assert capsys.readouterr().out.count("python train.py recipe=demo stage=") == 4
    assert not (tmp_path / "study").exists()


def test_intervals_over_seeds_are_students():
    stats = pytest.importorskip("scipy.stats")
    for values in ([1.0, 2.0, 4.0], [0.5, 0.25], [*map(float, range(31))], [*map(float, range(50))]):
        expected = stats.t.interval(0.95, len(values) - 1, sum(values) / len(values), stats.sem(values))
        assert t_interval(values) == pytest.approx(expected, rel=1e-4)
    assert t_interval([1.0]) is None


def test_estimates_and_verdicts():
    found = estimate([2.0, 4.0], [[1.0, 3.0], [3.0, 5.0]])
    assert (found.mean, found.values) == (3.0, [2.0, 4.0])
    assert found.questions == (2.0, 4.0)  # questions score 2 and 4 in the mean over seeds
    assert wins([5, 3, 1], [4, 3, 2]) == [100.0, 50.0, 0.0]
    assert verdict(estimate([1.0, 1.1])) == "as in the paper"
    assert verdict(estimate([-1.0, -1.1])) == "the other way round"
    assert verdict(estimate([1.0, -1.1])) == "not told apart"
    assert verdict(estimate([1.0])) == "not known"


def test_data_that_cannot_be_read_is_the_users_to_mend(folder):
    (folder / "pairs.jsonl").write_text('{"prompt": "Hi"}\n')
    with pytest.raises(UserError, match="pairs.jsonl line 1"):
        study(folder)
    assert begun(folder) == []
