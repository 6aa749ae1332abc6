"""Sweeps as commands, with Hydra and Optuna but a stand-in for what trains, and the table that they leave."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.commands import ROOT

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
