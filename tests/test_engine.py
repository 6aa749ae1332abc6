"""vLLM for a folder of weights, with a stand-in for its command: how it is started, asked, and ended."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import tiny
from zephyr.errors import UserError
from zephyr.feedback import engine
from zephyr.feedback.client import Client
from zephyr.feedback.engine import Engine
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.local import Local
from zephyr.feedback.pool import Model
from zephyr.feedback.request import Reply, Request

ROOT = Path(__file__).parents[1]
STAND_IN = f"""#!{sys.executable}
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.openai_server import Answer, Server

def script(seen):
    return Answer(body=b"{{}}") if seen.path == "/health" else Answer()

async def serve():
    command, folder, *options = sys.argv[1:]
    assert command == "serve" and os.path.isfile(folder + "/config.json"), sys.argv
    options = dict(zip(options[::2], options[1::2]))
    assert options["--host"] == "127.0.0.1"
    open(os.environ["STAND_IN_PID"], "w").write(str(os.getpid()))
    await Server(script, keep=False).listen(int(options["--port"]))
    await asyncio.sleep(60)

asyncio.run(serve())
"""


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def installed(tmp_path, monkeypatch, script):
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setattr(engine.shutil, "which", lambda name: str(command))
    monkeypatch.setenv("STAND_IN_PID", str(tmp_path / "pid"))


def ask(tmp_path, source, *names):
    async def asked():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            async with Client([Model(name, (source,)) for name in names], ledger) as client:
                requests = [Request(name, [{"role": "user", "content": "Hi"}], {"max_tokens": 5}) for name in names]
                return await asyncio.gather(*map(client.ask, requests)), client.tally

    return asyncio.run(asked())


def test_it_is_started_once_asked_by_its_folder_and_ended(tmp_path, folder, monkeypatch):
    installed(tmp_path, monkeypatch, STAND_IN)
    source = Engine(folder)
    replies, tally = ask(tmp_path, source, "cold", "warm")
    # the stand-in's answer is a hash of what it was asked, in which both named the folder: they agree
    assert all(isinstance(reply, Reply) and reply.text == replies[0].text for reply in replies)
    assert [reply.model for reply in replies] == [f"{name}@{source.identity[5:17]}" for name in ("cold", "warm")]
    assert tally.sent == 2
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    (tmp_path / "pid").unlink()
    again, tally = ask(tmp_path, source, "cold", "warm")
    assert (again, tally.sent) == (replies, 0) and not (tmp_path / "pid").exists()  # nobody asked: nothing was started


def test_its_answers_are_not_those_of_transformers_nor_of_other_weights(tmp_path, folder):
    other = shutil.copytree(folder, tmp_path / "other")
    tiny.model(seed=5).save_pretrained(other)
    assert len({Engine(folder).identity, Engine(other).identity, Local(folder).identity}) == 3


def test_what_it_said_when_it_did_not_start_is_passed_on(tmp_path, folder, monkeypatch):
    installed(tmp_path, monkeypatch, "#!/bin/sh\necho 'INFO starting'\necho 'RuntimeError: no GPU' >&2\nexit 1\n")
    with pytest.raises(UserError, match="vLLM does not start on .*model: RuntimeError: no GPU"):
        ask(tmp_path, Engine(folder), "m")


def test_without_vllm_and_for_an_adapter_the_way_out_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="engine=vllm needs vLLM: pip install vllm"):
        ask(tmp_path, Engine(folder), "m")
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(UserError, match="no whole model, which vLLM needs: python -m zephyr.merge"):
        ask(tmp_path, Engine(folder), "m")
