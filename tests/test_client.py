"""The client against scripted servers on real sockets: every fault alone, all of them together, kills and stops."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.asking import ask, first, good, pool, recorded, request
from tests.openai_server import FAULTS, GOOD, Answer, Server
from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import BudgetSpent
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Limits, Price
from zephyr.feedback.request import Failure, Reply, Request

ROOT = Path(__file__).parents[1]

AGAIN = {
    "429": "rate_limited",
    "500": "server_error",
    "503": "server_error",
    "silent": "timed_out",
    "dropped": "bad_reply",
    "closed": "connection",
    "truncated": "bad_reply",
    "garbage": "bad_reply",
    "no choice": "bad_reply",
    "wrong model": "wrong_model",
    "endless": "too_large",
    "large": "too_large",
    "error in 200": "bad_reply",
    "deep": "bad_reply",
    "text is a number": "bad_reply",
    "half a head": "bad_reply",
    "408": "server_error",
    "409": "server_error",
    "425": "server_error",
    "502": "server_error",
    "slow beyond time": "timed_out",
}

MORE = {
    "endless": Answer(endless=True),
    "large": Answer(body=b"[" + b"1," * 2048 + b"1]"),
    "error in 200": Answer(body=b'{"error": {"message": "overloaded", "code": 502}}'),
    "deep": Answer(body=b"[" * 4000),
    "text is a number": Answer(patch={"choices": [{"index": 0, "message": {"content": 5}}]}),
    "half a head": Answer(headers={"Content-Encoding": "gzip"}, body=b"\x1f\x8b\x08\x00rubbish"),
    "slow beyond time": Answer(drip=0.02),
    **{status: Answer(int(status), body=b"{}") for status in ("408", "409", "425", "502")},
}


@pytest.mark.parametrize("fault", AGAIN)
def test_a_fault_that_passes_costs_an_attempt(tmp_path, fault):
    with Server(first({**FAULTS, **MORE}[fault])) as server:
        models = pool(server, answers_as="m-0613", price=Price(1, 1))
        (reply,), client = ask(tmp_path, models, [1])
        assert isinstance(reply, Reply), reply
        assert (reply.text, reply.attempts, server.requests.total()) == (good(1), 2, 2)
        assert client.tally.retries == {AGAIN[fault]: 1} and client.tally.failures == {}
        # charged is the worst case of an answer that was on its way: 28 bytes of prompt, 4,096 tokens at 1 USD a million
        billed = AGAIN[fault] in ("bad_reply", "timed_out", "too_large", "wrong_model", "connection")
        assert reply.waste == pytest.approx(4122e-6 if billed else 0)


@pytest.mark.parametrize("fault", AGAIN)
def test_a_fault_that_stays_is_a_failure_with_its_cause(tmp_path, fault):
    answer = {**FAULTS, **MORE}[fault]
    patience = 0.2 if fault == "429" else 60.0
    limits = Limits(backoff=0.01, total_seconds=0.5, attempts=3, response_bytes=4096, patience=patience)
    with Server(lambda seen: GOOD if "question 0" in json.dumps(seen.body) else answer) as server:
        outcomes, client = ask(tmp_path, pool(server, answers_as="m-0613"), [0], limits, then=[1])
        assert outcomes[0].text == good(0)
        if fault == "429":  # says nothing about the request, so there is no end but the run's
            assert isinstance(outcomes[1], UserError) and "no server of model 'm' has answered in" in str(outcomes[1])
        else:
            assert (outcomes[1].cause, outcomes[1].attempts) == (AGAIN[fault], 3)
            assert server.url in outcomes[1].detail
            assert client.tally.failures == {AGAIN[fault]: 1}
            assert server.requests.total() == 4


@pytest.mark.parametrize("fault", ["slow", "wrong ids", "wrong model"])
def test_what_is_odd_but_an_answer_is_taken(tmp_path, fault):
    with Server(first(FAULTS[fault])) as server:
        (reply,), client = ask(tmp_path, pool(server), [1], Limits())
        assert (reply.text, reply.attempts, client.tally.retries) == (good(1), 1, {})
        assert reply.model == ("somebody-else" if fault == "wrong model" else "m-0613")


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refused_request_is_a_failure_at_once_and_others_go_on(tmp_path, status):
    refusal = Answer(status, body=b'{"error": {"message": "too long", "code": "context"}}')
    with Server(lambda seen: refusal if "question 1" in json.dumps(seen.body) else GOOD) as server:
        outcomes, _ = ask(tmp_path, pool(server), [0], then=[1, 2])
        detail = f"{server.url} answered {status} for model 'm': too long context."
        assert outcomes[1] == Failure("refused", detail, 1)
        assert outcomes[2].text == good(2)
        assert server.requests.total() == 3


def test_equal_requests_at_once_are_one_and_answered_ones_are_none(tmp_path):
    with Server(lambda seen: Answer(delay=0.02)) as server:
        replies, client = ask(tmp_path, pool(server), [1] * 10 + [2], then=[1])
        assert server.requests.total() == 2 and client.tally.replayed == 1
        assert {reply.text for reply in replies} == {good(1), good(2)}
        again, client = ask(tmp_path, pool(server), [1, 2])
        assert server.requests.total() == 2 and (client.tally.sent, client.tally.replayed) == (0, 2)
        assert [reply.text for reply in again] == [good(1), good(2)]


def test_a_failure_is_final_for_the_run_and_asked_again_by_the_next(tmp_path):
    with Server(lambda seen: FAULTS["garbage"] if seen.attempt <= 3 else GOOD) as server:
        (first, same), _ = ask(tmp_path, pool(server), [1], then=[1])
        assert first == same and (first.cause, first.attempts) == ("bad_reply", 3)
        assert server.requests.total() == 3
        (reply,), client = ask(tmp_path, pool(server), [1])
        assert (reply.text, reply.attempts) == (good(1), 4)
        assert client.purse.requests == 4


def test_a_run_stopped_between_attempts_records_what_it_sent(tmp_path):
    with Server(lambda seen: FAULTS["500"]) as server:
        (outcome,), _ = ask(tmp_path, pool(server), [1], budget=Budget(max_requests=2))
        assert isinstance(outcome, BudgetSpent) and server.requests.total() == 2
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        (entry,) = ledger.entries()
    assert (entry[2].cause, entry[2].attempts) == ("server_error", 2)


def test_what_is_sent_when_a_run_is_left_counts_in_the_next(tmp_path):
    """It may be charged for, although nobody waited for it."""

    async def run():
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            async with Client(pool(server, price=Price(1, 1)), ledger, Limits(drain_seconds=0.05)) as client:
                task = asyncio.create_task(client.ask(request(1)))
                await asyncio.sleep(0.1)
                raise KeyError(task)  # whatever it is

    with Server(lambda seen: Answer(delay=60)) as server, pytest.raises(KeyError):
        asyncio.run(run())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ((_, _, outcome),) = ledger.entries()
        assert (outcome.cause, outcome.attempts, outcome.waste) == ("interrupted", 1, pytest.approx(4122e-6))
        purse = Client(pool(server, price=Price(1, 1)), ledger, budget=Budget(max_cost=1)).purse
    assert (purse.requests, purse.cost) == (1, pytest.approx(4122e-6))


@pytest.mark.parametrize("budget", [Budget(max_cost=1), Budget(max_requests=9), None])
def test_what_is_under_way_stands_in_the_ledger_where_there_is_a_budget(tmp_path, budget):
    """A process that is killed cannot say it any more."""

    def known():
        with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
            purse = Client(pool(server, price=Price(1, 1)), ledger, budget=budget).purse
            return [outcome.attempts for _, _, outcome in ledger.entries()], purse.requests, purse.cost

    async def run():
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            async with Client(pool(server, price=Price(1, 1)), ledger, Limits(backoff=0.01), budget) as client:
                task = asyncio.create_task(client.ask(request(1)))
                while server.requests.total() < 2:
                    await asyncio.sleep(0.01)
                meanwhile = known()  # as a run after a kill would find it
                reply = await task
                assert ledger.earlier(request(1).key) == (0, 0.0)
                return meanwhile, reply

    with Server(lambda seen: FAULTS["500"] if seen.attempt == 1 else Answer(delay=0.5)) as server:
        meanwhile, reply = asyncio.run(run())
        assert meanwhile == (([2], 2, pytest.approx(4122e-6)) if budget else ([], 0, 0.0))
        assert known() == ([2], 2, pytest.approx(reply.cost)) and reply.waste == 0


def test_a_request_that_a_wrong_key_met_costs_nothing(tmp_path):
    with Server(lambda seen: Answer(401, body=b"{}")) as server:
        (outcome,), _ = ask(tmp_path, pool(server, price=Price(1, 1)), [1], budget=Budget(max_cost=1))
        assert isinstance(outcome, UserError)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ((_, _, entry),) = ledger.entries()
        assert (entry.attempts, entry.waste) == (1, 0.0)


def mixed(seed, share=0.3):
    """A fault on each of the first attempts of a request, by chance, drawn from its key alone."""
    names = ["429", "500", "503", "silent", "dropped", "closed", "truncated", "garbage", "no choice", "wrong ids"]

    def script(seen):
        draw = random.Random(f"{seed} {seen.key} {seen.attempt}")
        delay = draw.random() * 0.01
        if draw.random() < share:
            return {**FAULTS, "slow": Answer(drip=0.0002)}[draw.choice([*names, "slow"])]
        return Answer(delay=delay)

    return script


def test_faults_on_a_third_of_all_requests_change_nothing_in_the_replies(tmp_path):
    limits = Limits(backoff=0.01, longest_wait=0.1, total_seconds=0.7, attempts=12, concurrency=32)
    with Server(mixed(0)) as one, Server(mixed(1)) as two:
        outcomes, client = ask(tmp_path, pool(one, two), range(400), limits)
        assert [outcome.text for outcome in outcomes] == [good(n) for n in range(400)]
        sent = one.requests + two.requests
        done = one.completed + two.completed
    assert client.tally.failures == {} and client.tally.retries.total() > 100
    assert len(client.tally.retries) >= 5
    assert client.tally.sent == sum(outcome.attempts for outcome in outcomes)
    unread = [outcome.attempts - sent[request(n).key] for n, outcome in enumerate(outcomes)]
    assert min(unread) >= 0  # on a busy machine an attempt may be given up before the server has read it
    assert sum(unread) <= client.tally.retries["timed_out"]
    assert all(count >= 1 for count in done.values()) and len(done) == 400
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        (total,) = ledger.totals()
    assert (total.number, total.attempts) == (400, client.tally.sent)


RUN = """
import asyncio, signal, sys
from pathlib import Path
from tests.asking import pool, request
from zephyr.feedback.client import Client
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Limits

async def main(url, folder, number):
    task = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Ledger(Path(folder) / "ledger.sqlite") as ledger:
        async with Client(pool(url), ledger, Limits(concurrency=16, backoff=0.01)) as client:
            print("asking", flush=True)
            await asyncio.gather(*(client.ask(request(n)) for n in range(int(number))))
            print("done", flush=True)

try:
    asyncio.run(main(*sys.argv[1:]))
except asyncio.CancelledError:
    sys.exit(143)
"""


def start(url, folder, number):
    command = [sys.executable, "-c", RUN, url, str(folder), str(number)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asking\n"
    return process


def test_killed_and_restarted_nothing_that_was_recorded_is_asked_again(tmp_path):
    number, draw = 400, random.Random(3)
    with Server(lambda seen: Answer(delay=0.02)) as server:
        for _ in range(4):
            before = recorded(tmp_path) if (tmp_path / "ledger.sqlite").exists() else set()
            sent = server.requests.copy()
            goal = sent.total() + draw.randrange(16, 80)
            process = start(server.url, tmp_path, number)
            while server.requests.total() < goal:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not {key for key in before if server.requests[key] > sent[key]}
        kept, sent = recorded(tmp_path), server.requests.copy()
        assert 0 < len(kept) < number, "not killed in the middle"
        process = start(server.url, tmp_path, number)
        assert process.communicate(timeout=60)[0] == "done\n"
        assert recorded(tmp_path) == {request(n).key for n in range(number)}
        assert all(server.completed[key] >= 1 and server.requests[key] == sent[key] for key in kept)
        # lost at a kill is what was under way, 16 requests and the replies of one commit, never what had been kept
        assert sum(count - 1 for count in server.requests.values()) <= 4 * 64


def test_a_signal_leaves_a_clean_ledger_with_what_was_in_flight(tmp_path):
    with Server(lambda seen: Answer(delay=0.15)) as server:
        process = start(server.url, tmp_path, 400)
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 143
        assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.sqlite", "ledger.sqlite.lock"]
        assert recorded(tmp_path) == {key for key, count in server.completed.items() if count}
        assert set(server.requests.values()) == {1} and 16 <= server.requests.total() < 400


def test_who_stops_waiting_leaves_the_request_to_others(tmp_path):
    async def run():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            async with Client(pool(server), ledger) as client:
                one, two = (asyncio.create_task(client.ask(request(1))) for _ in range(2))
                await asyncio.sleep(0.02)
                one.cancel()
                return await two

    with Server(lambda seen: Answer(delay=0.1)) as server:
        assert asyncio.run(run()).text == good(1)
        assert server.requests.total() == 1


def test_nothing_is_bought_that_cannot_be_kept(tmp_path):
    async def run():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            ledger._database.execute("PRAGMA max_page_count=10")  # as a full disk
            async with Client(pool(server, concurrency=1), ledger) as client:
                asks = [client.ask(Request("m", [{"role": "user", "content": f"{n}"}])) for n in range(500)]
                return await asyncio.gather(*asks, return_exceptions=True)

    with Server(lambda seen: Answer(delay=0.002, patch={"model": "m" * 2000})) as server:
        outcomes = asyncio.run(run())
        sent = server.requests.total()
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    assert {type(outcome) for outcome in outcomes} == {Reply, UserError}
    assert "database or disk is full" in str(outcomes[-1])
    assert len(replies) < sent < len(replies) + 20  # one group of commits
