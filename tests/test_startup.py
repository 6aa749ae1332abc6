"""A wrong path is answered before torch is imported, and what decides it is light."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.test_conf import load
from zephyr.errors import UserError
from zephyr.running import early
from zephyr.settings import parse

# Runs the command with the heavy packages made impossible to import.
WITHOUT = """
import runpy, sys
for name in ("torch", "transformers", "lightning", "pyarrow", "tokenizers"):
    sys.modules[name] = None
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, "")
runpy.run_path("train.py", run_name="__main__")
"""

MISTAKES = {
    "data": (["data.train=/nowhere.jsonl"], "data.train: '/nowhere.jsonl' does not exist (looked in"),
    "dpo data": (["stage=dpo", "data.train=/nowhere.jsonl"], "data.train: '/nowhere.jsonl' does not exist"),
    "validation": (["data.validation=TMP/no"], "no' does not exist (looked in"),
    "suffix": (["data.train=TMP/a.csv"], "a.csv is none of .jsonl"),
    "folder": (["data.train=TMP/empty"], "holds no .jsonl"),
    "demo": (["data.train=demo:chat"], "'demo:chat' is no part of the demo"),
    "model": (["model.path=./no"], "the folder ./no does not exist"),
    "no model": (["model.path=TMP/empty"], "holds no model (config.json)"),
    "resume": (["resume=atuo"], "there is no checkpoint at atuo"),
    "a run": (["resume=TMP/empty"], "is no checkpoint: they are the folders"),
    "output": (["output_dir=TMP/a.csv/out"], "is not a folder that you may write to"),
    "its model": (["model.path=TMP/model", "output_dir=TMP"], "lies in output_dir="),
    "GPU of a dry run": (["dry_run=true", "gpu=H1000"], "gpu='H1000' is not known. Did you mean 'H100'?"),
    "model of a dry run": (["dry_run=true", "model.path=./no"], "the folder ./no does not exist"),
    "no SFT": (["recipe=zephyr-7b-qlora", "stage=dpo"], "stage=dpo starts from an SFT model"),
}


@pytest.mark.parametrize(("overrides", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_path_is_answered_without_torch(overrides: list[str], words: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    line = [f"output_dir={tmp_path}/out", *(override.replace("TMP", str(tmp_path)) for override in overrides)]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_process_that_tokenises_needs_neither_torch_nor_transformers():
    code = "import sys; sys.modules.update(torch=None, transformers=None, lightning=None); import zephyr.data.encode"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_what_is_right_passes_and_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    early.check(parse(load(f"output_dir={tmp_path}/out")))  # all of it the demo
    early.check(parse(load("recipe=zephyr-7b-beta", "data.train=some/set@main:train", f"output_dir={tmp_path}/out")))
    assert not any(tmp_path.iterdir())


def test_a_finished_run_needs_its_files_no_more(tmp_path: Path):
    cfg = load("data.train=/nowhere.jsonl", "resume=auto", f"output_dir={tmp_path}")
    with pytest.raises(UserError, match="nowhere"):
        early.check(parse(cfg))
    (tmp_path / "summary.json").write_text("{}")
    early.check(parse(cfg))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not a folder that you may write to"):
        early.check(parse(load(f"output_dir={tmp_path}/out")))
