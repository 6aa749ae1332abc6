"""The chat as a command, on models that were just exported."""

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests import tiny
from tests.test_export import CARD, adapted
from tests.test_generate import ends_after
from zephyr import chat
from zephyr.errors import UserError
from zephyr.export import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a stage whose model says "yes" to everything."""
    folder = tmp_path_factory.mktemp("outputs") / "demo" / "sft"
    tokenizer = tiny.tokenizer()
    export(ends_after(tokenizer("yes").input_ids), tokenizer, folder / "model", CARD)
    (folder / "config.yaml").touch()
    return folder


def command(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "zephyr.chat", *map(str, arguments)]
    return subprocess.run(line, input=stdin, capture_output=True, text=True)


def test_one_prompt_gives_the_answer_alone(run: Path):
    done = command(run, "--device", "cpu", "--temperature", "0", stdin="Is it?\n")  # or --prompt "Is it?"
    assert (done.returncode, done.stdout, done.stderr) == (0, "yes\n", "")


def test_a_piped_text_is_one_prompt(run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    prompts: list[str] = []
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it\nreally so?\n"))
    monkeypatch.setattr(
        "zephyr.generation.generate.stream",
        lambda _, __, chat, *___: prompts.append(chat[-1]["content"]) or iter(["y"]),
    )
    assert chat.main([str(run), "--device", "cpu"]) == 0
    assert prompts == ["Is it\nreally so?"]
    assert capsys.readouterr().out == "y\n"


def test_no_path_shows_the_usage():
    done = command(stdin="")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m zephyr.chat")


@pytest.mark.parametrize("wrong", ["--temperature=-1", "--top-p=1.5", "--max-new-tokens=0", "--top-p=0"])
def test_impossible_numbers_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        chat.main(["somewhere", wrong])
    assert stop.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_a_wrong_path_is_one_message_at_once(run: Path):
    done = command(run / "modle", "--prompt", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no folder" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_model_on_the_hub_comes_from_the_hubs_cache(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Laid out as huggingface_hub keeps a downloaded snapshot."""
    revision = "1d1a7f0a0ac6c0d3f4c0c5f6e2f3a4b5c6d7e8f9"
    repository = tmp_path / "models--HuggingFaceH4--zephyr-7b-beta"
    shutil.copytree(run / "model", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HuggingFaceH4/zephyr-7b-beta", f"HuggingFaceH4/zephyr-7b-beta@{revision}"):
        assert chat.find_model(Path(name)) == repository / "snapshots" / revision
    with pytest.raises(UserError, match="There is no folder a/b, and no model of that name can be had from the hub: "):
        chat.find_model(Path("a/b"))


def test_mistakes_are_found_without_torch(run: Path):
    code = "import sys; from zephyr import chat; print(chat.main(sys.argv[1:]), 'torch' in sys.modules)"
    line = [sys.executable, "-c", code, str(run.parent)]
    assert subprocess.run(line, input="", capture_output=True, text=True).stdout == "2 False\n"


def test_the_model_nearby_is_suggested(run: Path):
    (run / "checkpoints").mkdir(exist_ok=True)
    for path in (run.parent, run.parents[1], run / "config.yaml", run / "checkpoints"):
        with pytest.raises(UserError, match=r"holds no model.*Did you mean .*/demo/sft/model\?"):
            chat.find_model(path)
    assert chat.find_model(run) == chat.find_model(run / "model") == run / "model"


def test_an_empty_prompt_and_a_base_model_and_no_such_device(run: Path, tmp_path: Path, capsys):
    def refusal(*arguments: object) -> str:
        assert chat.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "prompt is empty" in refusal(run, "--prompt", " ")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    export(tiny.model(), tokenizer, tmp_path / "base", CARD)
    assert "no chat template" in refusal(tmp_path / "base", "--prompt", "Hi")
    assert "Cannot load" in refusal(run, "--prompt", "Hi", "--device", "toaster")
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    export(tiny.model(), tokenizer, tmp_path / "strict", CARD)
    strict = refusal(tmp_path / "strict", "--prompt", "Hi", "--system", "Be.")
    assert "no system here. Leave out --system" in strict
    (tmp_path / "strict/model.safetensors").unlink()
    assert "Cannot load" in refusal(tmp_path / "strict", "--prompt", "Hi")


def test_an_adapter_speaks_through_its_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = adapted(run / "model")
    export(policy, tiny.tokenizer(), tmp_path / "adapter", CARD)
    arguments = [str(tmp_path / "adapter"), "--prompt", "Hi", "--temperature", "0", "--device", "cpu"]
    assert chat.main(arguments) == 0
    assert capsys.readouterr().out == "yes\n"
    assert "lora" in str(chat.load(tmp_path / "adapter", "cpu")[0])


def test_a_conversation_is_kept_reset_and_left(monkeypatch: pytest.MonkeyPatch):
    typed = iter(["Hi", "", "And?", "/reset", "Again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    seen: list[list[str]] = []

    def answer(conversation) -> Iterator[str]:
        seen.append([message["content"] for message in conversation])
        yield from ["ye", "s"]

    chat._converse(answer, [{"role": "system", "content": "Be."}], Path("model"))
    assert seen == [["Be.", "Hi"], ["Be.", "Hi", "yes", "And?"], ["Be.", "Again"]]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]):
    closed: list[bool] = []

    def chunks() -> Iterator[str]:
        try:
            yield "half \x1b[2J"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert chat._print_answer(Console(), chunks()) == "half \x1b[2J"
    out = capsys.readouterr().out
    assert "half [2J" in out and "(stopped)" in out and "\x1b" not in out
    assert closed == [True]
