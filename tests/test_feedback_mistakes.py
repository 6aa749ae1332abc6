"""What can be wrong with a feedback run: each answered by one message that says what, where, and how to mend it, with
status 2, and nothing under the names of its files. Where nothing was sent, the output is not even begun."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.collecting import EACH, SECRET, arguments, ask, prompts, report
from tests.openai_server import Server
from zephyr import command as ends
from zephyr.errors import UserError
from zephyr.feedback import __main__ as command
from zephyr.feedback import ledger as ledgers
from zephyr.feedback import run as running
from zephyr.feedback.ledger import Ledger

NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nobody answers


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends.signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C


def refused(capsys: pytest.CaptureFixture[str], given: list[str], *words: str, notes: int = 0) -> str:
    assert command.main(given) == 2
    error = capsys.readouterr().err
    *said, last = error.splitlines()
    assert last.startswith("Error: ") and "Traceback" not in error and len(said) == notes, error
    assert all(line.startswith("Note: ") for line in said)
    for word in words:
        assert word in last, last
    return error


# Overrides behind a good command line, and words of the message.
CONFIGURATIONS: dict[str, tuple[list[str], list[str]]] = {
    "no models": (["models=[]"], ["4 different models answer each prompt, and the pool has 0: none", "Name more"]),
    "too few": (
        ["completions=6"],
        ["6 different models answer each prompt, and the pool has 5: a, b, c, d, e.", "or ask for fewer"],
    ),
    "one completion": (["completions=1"], ["completions=1: a preference needs at least 2"]),
    "models is no list": (["models={name: a}"], ["models must be a list such as [{name: m1, base_url: http://...}]"]),
    "no file of models": (
        ["models=pool.yaml"],
        ["models: pool.yaml cannot be read as a list of models", "No such file"],
    ),
    "a model is a word": (["models=[a]"], ["models[0] must be a group of keys with a name, got 'a'."]),
    "a key in an entry without a name": (
        [f"models=[{{base_url: 'http://a/v1', api_key: {SECRET}}}]"],
        ["models[0] must be a group of keys with a name, got {'base_url': 'http://a/v1', 'api_key': '<removed>'}."],
    ),
    "an unknown key of a model": (
        ["models=[{name: a, base_url: 'http://a/v1'}, {name: b, base_ur: 'http://a/v1'}]"],
        ["models[1] has no key 'base_ur'. Did you mean 'base_url'?"],
    ),
    "no back-end": (["models=[{name: a}]"], ["models[0] must have one of base_url, path and replay; it has none"]),
    "two back-ends": (["judge.path=x"], ["judge must have one of base_url, path and replay; it has base_url and path"]),
    "a model twice": (
        [f"models=[{{name: a, base_url: '{NOWHERE}'}}, {{name: a, base_url: '{NOWHERE}'}}]", "completions=2"],
        ["names a model twice (a, a)"],
    ),
    "judge of another kind": (
        ["judge.model=a", "judge.api_key_env=KEY"],
        ["models[0] and the judge are both named 'a'"],
    ),
    "an unknown key": (["judgee.model=a"], ["There is no group 'judgee'. Did you mean 'judge'?"]),
    "an unknown key of the judge": (["judge.modle=a"], ["judge has no key 'modle'. Did you mean 'model'?"]),
    "an unknown limit": (["limits.concurency=3"], ["limits has no key 'concurency'. Did you mean 'concurrency'?"]),
    "a number as text": (["limits.concurrency=many"], ["limits.concurrency must be a whole number, got 'many'."]),
    "no attempts": (["limits.attempts=0"], ["limits.attempts must be at least 1, got 0"]),
    "another's parameters": (["judge.parameters={stream: true}"], ["judge.parameters holds stream, which the client"]),
    "a header with a key": (
        [f"judge.parameters={{extra_headers: {{Authorization: Bearer {SECRET}}}}}"],
        ["judge.parameters holds extra_headers, but", "the environment variable that api_key_env names"],
    ),
    "no time": (["limits.total_seconds=-1"], ["limits.total_seconds must be above 0, got -1"]),
    "a price": (["judge.price.completion=-1"], ["judge.price.completion must be at least 0, got -1"]),
    "a share": (["max_failures=5"], ["max_failures must be in [0, 1], got 5"]),
    "a temperature": (["default.temperature=-1"], ["models[0].temperature must be at least 0"]),
    "an address": (["judge.base_url=localhost:8000"], ["base_url='localhost:8000' is no address."]),
    "a key in the address": (
        [f"judge.base_url='https://host/v1?key={SECRET}'"],
        ["base_url of host carries a user name, a password or a query"],
    ),
    "a key in place of its variable": (
        [f"default.api_key_env={SECRET}"],
        ["is not the name of an environment variable. It must name the variable that holds the key"],
    ),
    "no key": (["judge.api_key_env=NOBODY_SET_THIS"], ["set the environment variable NOBODY_SET_THIS."]),
    "no price": (["max_cost=3"], ["max_cost is set, but no model has a price."]),
    "no prompts": (["prompts=/nowhere/p.jsonl"], ["prompts: '/nowhere/p.jsonl' does not exist"]),
    "no such demo": (["prompts=demo:chats"], ["'demo:chats' is no part of the demo. Take one of: demo:base"]),
    "no principles": (["principles=/nowhere.yaml"], ["/nowhere.yaml: not to be read as principles"]),
    "no rubrics": (["judge.rubrics=/nowhere"], ["/nowhere holds none of instruction_following.md"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_cannot_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides, words = CONFIGURATIONS[name]
    taken = {override.partition("=")[0] for override in overrides}
    given = [argument for argument in arguments(NOWHERE, tmp_path) if argument.partition("=")[0] not in taken]
    error = refused(capsys, [*given, *overrides], *words)
    assert SECRET not in error
    left = sorted(path.name for path in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert left == ([] if name != "no price" else ["config.json", "ledger.sqlite", "ledger.sqlite.lock"])


@pytest.mark.parametrize("missing", ["prompts", "output", "models", "judge.model"])
def test_what_must_be_given(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = [argument for argument in arguments(NOWHERE, tmp_path) if not argument.startswith(f"{missing}=")]
    refused(capsys, given, f"{missing} is not set: give {missing}=VALUE.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["prompts.jsonl is empty: it holds no row."]),
        ("\n\n", ["prompts.jsonl is empty: it holds no row."]),
        ('{"question": "Why?"}\n', ["none of 1 rows can be used", "line 1", "found question"]),
        ('{"prompt": "\\ud83d"}\n', ["none of 1 rows can be used", "line 1", "half a character"]),
        ('{"prompt": ""}\n[]\n', ["none of 2 rows can be used", "line 1"]),
        ('{"messages": [{"role": "assistant", "content": "So."}]}\n', ["none of 1 rows can be used"]),
    ],
)
def test_prompts_that_ask_nothing(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.jsonl").write_text(text)
    refused(capsys, arguments(NOWHERE, tmp_path), *words)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_where_none_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": 7}\n')
    refused(capsys, arguments(NOWHERE, tmp_path, "bad_rows=error"), "prompts.jsonl line 2", "bad_rows=drop")
    with Server() as server:
        assert command.main(arguments(server.url, tmp_path)) == 0
        assert server.requests.total() == EACH
    assert report(tmp_path / "out")["bad_rows"]["number"] == 1


def test_a_judge_out_of_the_pool_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts(tmp_path, 2)
    with Server() as server:
        assert command.main(arguments(server.url, tmp_path, "judge.model=c")) == 0
    assert capsys.readouterr().err == "Note: the judge 'c' rates its own answers too: it is models[2].\n"


def test_no_server_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick = ["limits.attempts=2", "limits.longest_wait=0.1", "limits.patience=0.5"]
    refused(
        capsys, arguments(NOWHERE, tmp_path, *quick), "no server of model", NOWHERE, "Start it or mend its base_url"
    )
    assert not list((tmp_path / "out").glob("*.jsonl*"))


def test_another_process_writes_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledgers, "_LOCK_SECONDS", 0.1)
    with Ledger(tmp_path / "out" / "ledger.sqlite"):
        refused(
            capsys,
            arguments(NOWHERE, tmp_path),
            f"is being written by process {os.getpid()} on {os.uname().nodename}. Wait for it, or name another",
            notes=1,
        )


@pytest.mark.parametrize("name", ["a file", "below a file", "a ledger that is none"])
def test_an_output_that_is_in_the_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    if name == "a ledger that is none":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "ledger.sqlite").write_text(
            "mine, and long enough to be read as a header of a database" * 9
        )
        refused(capsys, arguments(NOWHERE, tmp_path), "ledger.sqlite cannot be used as a ledger")
        return
    output = tmp_path / "file" if name == "a file" else tmp_path / "file" / "out"
    refused(capsys, arguments(NOWHERE, tmp_path, f"output={output}"), f"Cannot write to output={output}: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "file", "words"),
    [
        (errno.ENOSPC, None, "output: OUT cannot be written: No space left on device. Make room or give another"),
        (errno.EDQUOT, "OUT/f", "output: OUT/f cannot be written: Disk quota exceeded. Make room or give another"),
        (errno.EROFS, "OUT/f", "output: OUT/f cannot be written: Read-only file system. Make it writable or give"),
        (errno.EIO, None, "output: OUT cannot be written: Input/output error. See whether the disk is sound or give"),
        (errno.EACCES, "prompts.jsonl", "prompts.jsonl: Permission denied. Mend that, then run again: what has been"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_of_that_file(number: int, file: str | None, words: str):
    with pytest.raises(UserError) as refusal, running._disk(Path("OUT")):
        raise OSError(number, os.strerror(number), *([file] if file else []))
    assert str(refusal.value).startswith(words) and str(refusal.value).endswith("what has been answered is kept.")


def test_what_is_wrong_with_no_file_is_not_said_of_the_disk():
    with pytest.raises(BrokenPipeError), running._disk(Path("OUT")):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """At the last moment, of the files; then of the ledger, after which nothing more is sent."""
    prompts(tmp_path, 4)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(running.os, "fsync", full)
            words = [f"output: {tmp_path}/out cannot be written: No space left on device. Make room or give another"]
            refused(capsys, arguments(server.url, tmp_path), *words)
        assert not list((tmp_path / "out").glob("*.jsonl*")) and server.requests.total() == 0
        with monkeypatch.context() as patch:
            patch.setattr(ledgers, "_PUT_REPLY", "INSERT INTO a_table_that_is_not_there VALUES (?)")
            refused(capsys, arguments(server.url, tmp_path), "the ledger", "cannot be written: ")
        sent = server.requests.total()
        assert 0 < sent <= 16 and not list((tmp_path / "out").glob("*.jsonl*"))
        ask(server.url, tmp_path)
        assert report(tmp_path / "out")["records"] == 4


def test_help_prints_every_key_with_those_of_its_groups(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("prompts: ???", "max_failures: 0.05", "# default, judge", "base_url: null", "api_key_env: null"):
        assert key in text


def test_what_is_kept_of_the_configuration_holds_no_secret(tmp_path: Path):
    with Server() as server:
        output = ask(server.url, tmp_path, "limit=1", f"+default.parameters.api_key={SECRET}")
    for name in ("report.json", "config.json"):
        assert SECRET not in (output / name).read_text()
    assert json.loads((output / "config.json").read_text())["config"]["default"]["parameters"]["api_key"] == "<removed>"
