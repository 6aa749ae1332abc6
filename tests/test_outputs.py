"""An output that cannot be written to: every command says so in one line, with status 2, before it does anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zephyr import command as ends
from zephyr.errors import UserError, check_writable
from zephyr.evaluate import main as evaluate
from zephyr.feedback.__main__ import main as feedback
from zephyr.merge import main as merge
from zephyr.prepare.__main__ import main as prepare
from zephyr.study.__main__ import main as study

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9/v1"  # nobody answers
JUDGE = ["judge.model=j", f"judge.base_url={NOWHERE}"]
POOL = f"models=[{{name: a, base_url: '{NOWHERE}'}}, {{name: b, base_url: '{NOWHERE}'}}]"
COMMANDS = {
    "feedback": (feedback, ["prompts=IN/prompts.jsonl", POOL, "completions=2", *JUDGE, "output=OUT"]),
    "evaluate": (evaluate, ["model=m", "benchmarks=[mt_bench]", f"answer.base_url={NOWHERE}", *JUDGE, "output=OUT"]),
    "ultrachat": (prepare, ["ultrachat", "input=IN/prompts.jsonl", "output=OUT"]),
    "ultrafeedback": (prepare, ["ultrafeedback", "input=IN/prompts.jsonl", "output=OUT"]),
    "truecaser": (prepare, ["truecaser", "input=IN/prompts.jsonl", "output=OUT"]),
    "study": (study, ["ablation", "recipe=demo", "output=OUT"]),
    "merge": (merge, ["IN", "OUT"]),
}


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends.signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """What the commands read, and a file where a folder should be."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    return tmp_path


def places(folder: Path) -> list[str]:
    """Root may write anywhere but where the system itself refuses, so /proc stands for a folder of somebody else."""
    return [f"{folder}/file", f"{folder}/file/x", *(["/proc/x"] if sys.platform == "linux" else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_to(name: str, given: Path, capsys: pytest.CaptureFixture[str]):
    main, arguments = COMMANDS[name]
    before = sorted(given.iterdir())
    for place in places(given):
        assert main([word.replace("IN", str(given)).replace("OUT", place) for word in arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error and place.removesuffix("/x") in error
    assert sorted(given.iterdir()) == before


@pytest.mark.parametrize("flags", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_training_refuses_it_before_torch_is_imported(flags: list[str], given: Path):
    for place in places(given):
        out = ["logger=none", f"hydra.sweep.dir={place}" if flags else f"output_dir={place}"]
        line = [sys.executable, "-X", "importtime", "train.py", *flags, *out]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        said = [text for text in done.stderr.splitlines() if not text.startswith("import time:")]
        assert done.returncode == 2 and len(said) == 1, said
        assert said[0].startswith(f"Error: Cannot write to {'hydra.sweep.dir' if flags else 'output_dir'}={place}: ")
        assert "| torch\n" not in done.stderr


def test_only_an_attempt_tells(tmp_path: Path):
    check_writable(tmp_path / "deep" / "below", "output")
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300) / "y", "output")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_be_read_alone(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not a folder that you may write to .Permission denied"):
        check_writable(tmp_path / "out", "output")
