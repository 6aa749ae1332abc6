"""A model in this process behind the client: answers, their independence of the batch, and what may go wrong."""

import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.test_generate import ends_after, sharp
from zephyr.errors import UserError
from zephyr.feedback import local
from zephyr.feedback.client import Client
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.local import Local
from zephyr.feedback.pool import Limits, Model
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.generation import generate as generation

SAMPLED = {"temperature": 1.0, "max_tokens": 12}


def save(folder: Path, model, tokenizer=None) -> Path:
    model.save_pretrained(folder / "model")
    (tokenizer or tiny.tokenizer()).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), tiny.model())


def request(number, name="m", **parameters):
    text = f"question {number} " + "and so on " * (number % 5)
    return Request(name, [{"role": "user", "content": text}], {**SAMPLED, **parameters})


def ask(ledger, source, requests, limits=None):
    """The outcomes of requests that are asked together (or exceptions), and the client."""

    async def run():
        with Ledger(ledger / "ledger.sqlite") as book:
            async with Client([Model("m", (source,))], book, limits) as client:
                return await asyncio.gather(*map(client.ask, requests), return_exceptions=True), client

    return asyncio.run(run())


def watched(monkeypatch, before=lambda lengths: None):
    """The lengths of the prompts that are begun together, as they come."""
    seen, respond = [], generation.respond

    def spy(model, tokenizer, rows, more, stopped):
        def watch(places):
            given = more(places)
            if given:
                seen.append([len(prompt) for prompt, _ in given])
                before(seen[-1])
            return given

        return respond(model, tokenizer, rows, watch, stopped)

    monkeypatch.setattr(generation, "respond", spy)
    return seen


def pretended(monkeypatch, act):
    """Answers of one letter, each batch after an act of the test's own."""

    def respond(model, tokenizer, rows, more, stopped):
        number = 0
        while given := more(rows):
            act(stopped)
            for _ in given:
                if stopped():
                    return
                yield number, [65], True
                number += 1

    monkeypatch.setattr(generation, "respond", respond)


def test_an_answer_does_not_depend_on_the_batch(tmp_path, folder, monkeypatch):
    batches = watched(monkeypatch)
    requests = [request(n, temperature=0.7 if n % 2 else 0.0, top_p=0.9, max_tokens=5 + n) for n in range(8)]
    alone, _ = ask(tmp_path / "1", Local(folder, 1), requests)
    together, _ = ask(tmp_path / "8", Local(folder, 8), requests[::-1])
    assert [len(batch) for batch in batches] == [1] * 8 + [8]
    assert [reply.text for reply in alone] == [reply.text for reply in together][::-1]
    assert len({reply.text for reply in alone}) > 4
    again, _ = ask(tmp_path / "seed", Local(folder, 8), [request(1, seed=n) for n in range(4)])
    assert len({reply.text for reply in again}) == 4


def test_a_reply_says_how_it_came_about(tmp_path):
    tokenizer = tiny.tokenizer()
    folder = save(tmp_path, ends_after(tokenizer("yes").input_ids))
    (stopped, cut), client = ask(tmp_path, Local(folder), [request(0), request(0, max_tokens=2)])
    prompt = len(f"<|user|>\n{request(0).messages[0]['content']}</s>\n<|assistant|>\n") - len("</s>") + 1
    name = f"m@{Local(folder).identity[:12]}"
    assert stopped == Reply("yes", name, "stop", prompt, 4, None, 0.0, stopped.seconds)  # with the end of the turn
    assert cut == Reply("ye", name, "length", prompt, 2, None, 0.0, cut.seconds)
    assert client.tally.completion_tokens == 6
    (same,), client = ask(tmp_path, Local(folder), [request(0)])
    assert same == stopped and client.tally.sent == 0


def test_greedy_is_what_generate_says(tmp_path):
    model, tokenizer = sharp(), tiny.tokenizer()
    folder = save(tmp_path, model)
    requests = [request(n, temperature=0.0) for n in range(3)]
    replies, _ = ask(tmp_path, Local(folder), requests)
    assert [r.text for r in replies] == generation.generate(model, tokenizer, [[*r.messages] for r in requests], 12)


def test_other_weights_under_the_same_name_are_asked(tmp_path):
    def text(model):
        folder = save(tmp_path, model)
        (reply,), client = ask(tmp_path, Local(folder), [request(0)])
        return reply.text, client.tally.sent

    first, other = tiny.model(0), tiny.model(1)
    said = text(first)
    assert said[1] == 1 and text(first) == (said[0], 0)
    changed = text(other)
    assert changed[1] == 1 and changed[0] != said[0]
    with torch.no_grad():
        first.model.layers[1].mlp.up_proj.weight[5, 3] += 1e-3  # one weight of all
    assert text(first)[1] == 1


def test_an_adapter_is_its_base_too(tmp_path):
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base", tiny.model()) / "model"
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    before = Local(tmp_path / "adapter").identity
    (reply,), _ = ask(tmp_path, Local(tmp_path / "adapter"), [request(0)])
    assert reply.model == f"m@{before[:12]}"
    tiny.model(1).save_pretrained(base)
    assert Local(tmp_path / "adapter").identity != before
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        Local(tmp_path / "adapter").identity  # noqa: B018 - the look is the test


def test_what_cannot_be_answered_is_a_failure_and_the_others_are_answered(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    folder = save(tmp_path, tiny.model(max_position_embeddings=64), tokenizer)
    user = {"role": "user", "content": "Hi"}
    requests = [
        Request("m", [{"role": "user", "content": "a" * 64}], SAMPLED),
        Request("m", [{"role": "system", "content": "Be kind."}, user], SAMPLED),
        Request("m", [{"role": "user", "content": "a" * 60}], SAMPLED),
        Request("m", [user], SAMPLED),
    ]
    (long, system, nearly, good), client = ask(tmp_path, Local(folder), requests)
    assert isinstance(long, Failure) and long.cause == "refused"
    assert "a prompt of 64 tokens; the model's context is 64" in long.detail
    assert isinstance(system, Failure) and "refuses the conversation: no system turns." in system.detail
    assert nearly.completion_tokens <= 4 and good.completion_tokens <= 12  # what room there is
    assert client.tally.failures == {"refused": 2} and client.tally.replies == 2


def test_folders_that_hold_no_chat_model_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        ask(tmp_path, Local(tmp_path / "none"), [])
    with pytest.raises(UserError, match="holds no model"):
        ask(tmp_path, Local(tmp_path), [])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    folder = save(tmp_path / "raw", tiny.model(), tokenizer)
    outcomes, client = ask(tmp_path, Local(folder), [request(0), request(1)])
    assert [str(error) for error in outcomes] == [f"{folder}/model has no chat template (chat_template.jinja): it is not a chat model."] * 2  # fmt: skip
    assert client.tally.failures == {}


def test_a_parameter_that_would_be_ignored_is_named(tmp_path, folder):
    (error,), _ = ask(tmp_path, Local(folder), [request(0, stop=["\n"])])
    assert isinstance(error, UserError) and "knows no stop." in str(error)


def test_memory_that_runs_out_halves_the_batch(tmp_path, folder, monkeypatch):
    expected, _ = ask(tmp_path / "1", Local(folder, 8), [request(n) for n in range(8)])

    def small(lengths):
        if len(lengths) > 2 or max(lengths) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")

    batches = watched(monkeypatch, small)
    huge = Request("m", [{"role": "user", "content": "a" * 200}], SAMPLED)

    async def run():
        with Ledger(tmp_path / "2.sqlite") as book:
            async with Client([Model("m", (Local(folder, 8),))], book) as client:
                first = await asyncio.gather(*(client.ask(request(n)) for n in range(8)))
                then = await asyncio.gather(client.ask(request(8)), client.ask(huge), client.ask(request(9)))
                return first, then

    first, then = asyncio.run(run())
    assert [reply.text for reply in first] == [reply.text for reply in expected]
    sizes = [len(batch) for batch in batches]
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) == 2  # it is remembered
    assert isinstance(then[1], Failure) and "memory does not hold" in then[1].detail
    assert isinstance(then[0], Reply) and isinstance(then[2], Reply)


def test_batches_hold_what_is_alike_in_length(tmp_path, folder, monkeypatch):
    batches = watched(monkeypatch)
    replies, _ = ask(tmp_path, Local(folder, 4), [request(n, max_tokens=1) for n in range(20) if n % 5 < 4])
    assert all(isinstance(reply, Reply) for reply in replies)
    assert [len(batch) for batch in batches] == [4] * 4
    # four lengths, ten characters apart, were asked for in turn; the number has one digit or two
    assert all(max(batch) - min(batch) <= 1 for batch in batches)


def test_the_loop_goes_on_while_a_batch_is_written(tmp_path, folder, monkeypatch):
    pretended(monkeypatch, lambda stopped: time.sleep(0.3))

    async def run():
        ticks = 0
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client([Model("m", (Local(folder),))], book) as client:
                await client.ask(request(0))  # loads the model
                task = asyncio.create_task(client.ask(request(1)))
                while not task.done():
                    await asyncio.sleep(0.01)
                    ticks += 1
                return ticks

    assert asyncio.run(run()) > 10


def test_a_client_that_is_left_stops_the_batch(tmp_path, folder, monkeypatch):
    steps = []

    def endless(stopped):
        while not stopped():
            steps.append(time.sleep(0.01))

    pretended(monkeypatch, endless)

    async def run():
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client([Model("m", (Local(folder),))], book, Limits(drain_seconds=0.1)) as client:
                task = asyncio.create_task(client.ask(request(0)))
                while not steps:
                    await asyncio.sleep(0.01)
                raise KeyError("the caller's own")
            assert task

    started = time.monotonic()
    with pytest.raises(KeyError):
        asyncio.run(run())
    assert time.monotonic() - started < 30
    with Ledger(tmp_path / "l.sqlite") as book:
        assert [outcome.cause for *_, outcome in book.entries()] == ["interrupted"]  # what was cut off is no answer


def test_models_are_loaded_and_answer_one_after_another(tmp_path, folder, monkeypatch):
    running, most = Counter[str](), Counter[str]()

    def counted(name, act=lambda *_: None):
        def one(*given):
            running[name] += 1
            most[name] = max(most[name], running[name])
            time.sleep(0.05)
            done = act(*given)
            running[name] -= 1
            return done

        return one

    monkeypatch.setattr(local, "load", counted("load", local.load))
    pretended(monkeypatch, counted("write"))
    pool = [Model(name, (Local(folder, size),)) for name, size in (("a", 4), ("b", 5))]

    async def run():
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client(pool, book) as client:
                await asyncio.gather(*(client.ask(request(n, name)) for n in range(8) for name in ("a", "b")))

    asyncio.run(run())
    assert most == {"load": 1, "write": 1}


def test_names_of_one_folder_are_one_model(tmp_path, folder, monkeypatch):
    batches = watched(monkeypatch)
    source = Local(folder)
    pool = [Model("cold", (source,)), Model("hot", (Local(folder),))]

    async def run():
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client(pool, book) as client:
                asked = [request(0, "cold", temperature=0.0), request(0, "hot", temperature=2.0)]
                return await asyncio.gather(*map(client.ask, asked))

    cold, hot = asyncio.run(run())
    assert [len(batch) for batch in batches] == [2]  # loaded once, answered together
    assert cold.text != hot.text and cold.model.startswith("cold@") and hot.model.startswith("hot@")
    assert json.dumps([cold.finish_reason, hot.finish_reason])


def test_a_short_answer_does_not_wait_for_a_long_one_and_makes_room(tmp_path, folder, monkeypatch):
    begun = watched(monkeypatch)

    async def run():
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client([Model("m", (Local(folder, 2),))], book) as client:
                long = asyncio.create_task(client.ask(request(0, temperature=0.0, max_tokens=450)))
                await client.ask(request(1, max_tokens=2))
                await client.ask(request(2, max_tokens=2))
                assert not long.done()
                return await long

    assert asyncio.run(run()).completion_tokens > 20
    assert [len(batch) for batch in begun] == [2, 1]  # the third joined the first


def test_nobody_waits_for_a_model_that_is_being_loaded(tmp_path, folder, monkeypatch):
    loading, released = threading.Event(), threading.Event()

    def slow(*_):
        loading.set()
        released.wait(20)
        raise UserError("too late")

    monkeypatch.setattr(local, "load", slow)

    async def run():
        with Ledger(tmp_path / "l.sqlite") as book:
            async with Client([Model("m", (Local(folder),))], book, Limits(drain_seconds=0.1)) as client:
                task = asyncio.create_task(client.ask(request(0)))
                await asyncio.to_thread(loading.wait, 20)
                started.append(time.monotonic())
                raise KeyError(task)

    started: list[float] = []
    with pytest.raises(KeyError):
        asyncio.run(run())
    seconds = time.monotonic() - started[0]
    released.set()
    assert seconds < 10
