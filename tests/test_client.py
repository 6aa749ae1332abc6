"""The client against a scripted server on a real socket: every fault alone, all of them together, kills and stops."""

import asyncio
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from tests.openai_server import FAULTS, GOOD, Answer, Server, completion, http_date, text_of
from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import Bucket, BudgetSpent, Lane
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Limits, Model, Price
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.server import Again, Endpoint, _retry_after, _text

ROOT = Path(__file__).parents[1]
QUICK = Limits(backoff=0.01, total_seconds=1.0, attempts=3, response_bytes=4096)
SECRET = "sk-very-secret-0123456789"


def request(number, **parameters):
    return Request("m", [{"role": "user", "content": f"question {number}"}], parameters)


def good(number):
    return text_of({"model": "m", "messages": request(number).messages})


def pool(*servers, **kwargs):
    endpoint = {name: kwargs.pop(name) for name in list(kwargs) if name in Endpoint.__dataclass_fields__}
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return [Model("m", tuple(Endpoint(url, **endpoint) for url in urls), **kwargs)]


def ask(folder, models, numbers, limits=QUICK, budget=None, then=()):
    """The outcomes (or exceptions) of the requests asked together, then of those asked one after the other."""

    async def run():
        with Ledger(Path(folder) / "ledger.sqlite") as ledger:
            async with Client(models, ledger, limits, budget) as client:
                outcomes = await asyncio.gather(*(client.ask(request(n)) for n in numbers), return_exceptions=True)
                for number in then:
                    outcomes += await asyncio.gather(client.ask(request(number)), return_exceptions=True)
                return outcomes, client

    return asyncio.run(run())


def first(answer, times=1):
    """A script that answers each request so many times so, then well."""
    return lambda seen: answer if seen.attempt <= times else GOOD


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_request_and_its_reply(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_KEY", f" {SECRET}\n")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "mine-alone")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: mine-alone")
    asked = Request("m", [{"role": "user", "content": "hé"}], {"temperature": 0.5}, {"type": "object"})

    async def run():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            models = pool(server, api_key_env="POOL_KEY", served_as="vendor/m", price=Price(2, 10, 0.5))
            async with Client(models, ledger) as client:
                return await client.ask(asked)

    with Server() as server:
        reply = asyncio.run(run())
        (seen,) = server.seen
    assert seen.body == {
        "model": "vendor/m",
        "messages": [{"role": "user", "content": "hé"}],
        "temperature": 0.5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": {"type": "object"}, "strict": True},
        },
    }
    assert seen.path == "/v1/chat/completions"
    assert seen.headers.pop("host") == f"127.0.0.1:{server.port}"
    assert seen.headers.pop("content-length").isdigit()
    assert seen.headers == {
        "accept": "application/json",
        "accept-encoding": "identity",
        "authorization": f"Bearer {SECRET}",
        "content-type": "application/json",
        "user-agent": "zephyr",
        "x-client-request-id": asked.key,
    }
    # 6 tokens of the prompt at 2, 4 from the cache at 0.5, 5 of the completion at 10 USD a million
    assert reply == Reply(text_of(seen.body), "vendor/m-0613", "stop", 10, 5, 4, 64e-6, reply.seconds)
    assert 0 < reply.seconds < 5


def test_a_server_without_keys_or_schemas_gets_neither(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    async def run():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            async with Client(pool(server, structured=False), ledger) as client:
                await client.ask(Request("m", [{"role": "user", "content": "x"}], schema={"type": "object"}))

    with Server() as server:
        asyncio.run(run())
        (seen,) = server.seen
    assert "authorization" not in seen.headers and "response_format" not in seen.body


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


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            Answer(401, body=b'{"error": {"message": "bad key"}}'),
            "answered 401 for model 'm': bad key. Set api_key_env",
        ),
        (Answer(403, body=b"no"), "answered 403 for model 'm': no. Set api_key_env"),
        (Answer(402, body=b""), "answered 402 for model 'm': nothing more. Its account has no credit left"),
        (
            Answer(429, body=b'{"error": {"code": "insufficient_quota"}}'),
            "insufficient_quota. Its account has no credit",
        ),
        (Answer(400, body=b'{"error": "no response_format here"}'), "takes no JSON schema: set structured=false"),
        (Answer(404, body=b'{"detail": "Not Found"}'), r"'m': Not Found. Check base_url .* The server lists: a, b\.$"),
        (Answer(405, body=b"<html>No</html>"), r"'m': <html>No</html>. Check base_url"),
        (Answer(body=b"\n<!doctype html><title>Hello</title>"), "answers with a page: .*Hello.* Check base_url"),
        (
            Answer(400, body=b"{\"detail\": \"Pinned to 'x'; requested 'm'.\"}"),
            r"requested 'm'. Check base_url .* lists: a",
        ),
    ],
)
def test_what_no_request_gets_past_stops_the_run(tmp_path, answer, message):
    listed = Answer(body=b'{"data": [{"id": "a"}, {"id": "b"}]}')
    with Server(lambda seen: listed if seen.path == "/v1/models" else answer) as server:
        outcomes, _ = ask(tmp_path, pool(server), range(5), Limits(concurrency=1), then=[9])
        assert len(outcomes) == 6 and len(set(map(str, outcomes))) == 1
        with pytest.raises(UserError, match=message):
            raise outcomes[0]
        assert [seen.path for seen in server.seen].count("/v1/chat/completions") == 1


def test_a_429_that_waiting_does_not_mend_is_a_refusal(tmp_path):
    said = b'{"error": {"message": "Request too large for m on tokens per min (TPM): Limit 10, Requested 12."}}'
    with Server(lambda seen: Answer(429, body=said) if "question 1" in json.dumps(seen.body) else GOOD) as server:
        outcomes, _ = ask(tmp_path, pool(server), [1, 2])
    assert (outcomes[0].cause, outcomes[0].attempts, outcomes[1].text) == ("refused", 1, good(2))


def test_a_server_that_never_answered_is_the_users_to_mend(tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    (outcome,), _ = ask(tmp_path, pool(url), [1])
    assert isinstance(outcome, UserError)
    assert f"no server of model 'm' has answered in 3 attempts. {url}: no connection" in str(outcome)


def test_a_server_that_has_gone_silent_stops_the_run_after_a_while(tmp_path):
    silent = Limits(backoff=0.01, longest_wait=0.05, patience=0.4, attempts=1000)
    with Server(lambda seen: GOOD if "question 0" in json.dumps(seen.body) else FAULTS["500"]) as server:
        start = time.monotonic()
        outcomes, _ = ask(tmp_path, pool(server), [0], silent, then=[1, 2])
        assert 0.4 < time.monotonic() - start < 5
        assert outcomes[0].text == good(0)
        assert isinstance(outcomes[1], UserError) and "answered in 0 s. " + server.url in str(outcomes[1])
        assert outcomes[2] is outcomes[1]


@pytest.mark.parametrize("fault", ["500", "silent"])
def test_a_run_ends_although_only_what_is_never_answered_is_left(tmp_path, fault):
    """Whose failures say no more of the servers than in the runs before."""
    limits = Limits(backoff=0.01, total_seconds=0.2, attempts=3, patience=0.1 if fault == "silent" else 60.0)
    with Server(lambda seen: GOOD if "question 0" in json.dumps(seen.body) else FAULTS[fault]) as server:
        outcomes = [ask(tmp_path, pool(server), [0, 1], limits)[0] for _ in range(4)]
    assert [outcome[0].text for outcome in outcomes] == [good(0)] * 4
    last = outcomes[-1][1]
    assert isinstance(last, Failure) and last.attempts == server.requests[request(1).key]


@pytest.mark.parametrize(("value", "least"), [(lambda: "0.5", 0.5), (lambda: http_date(2), 0.9)])
def test_retry_after_is_honoured_as_seconds_and_as_a_date(tmp_path, value, least):
    with Server(first(Answer(429, {"Retry-After": value()}))) as server:
        (reply,), _ = ask(tmp_path, pool(server), [1])
        waited = server.seen[1].at - server.seen[0].at
        assert reply.attempts == 2 and least <= waited < least + 2


def test_a_server_told_to_wait_for_hours_is_asked_again_after_the_longest_wait(tmp_path):
    with Server(first(Answer(503, {"Retry-After": "9999"}))) as server:
        limits = Limits(backoff=0.01, longest_wait=0.3)
        ask(tmp_path, pool(server), [1], limits)
        assert 0.3 <= server.seen[1].at - server.seen[0].at < 2


def test_another_server_answers_while_one_wants_to_be_left_alone(tmp_path):
    with Server(lambda seen: Answer(429, {"Retry-After": "30"})) as busy, Server() as idle:
        start = time.monotonic()
        replies, _ = ask(tmp_path, pool(busy, idle), range(20))
        assert time.monotonic() - start < 5
        assert [reply.text for reply in replies] == [good(n) for n in range(20)]
        assert 1 <= busy.requests.total() <= 20 and idle.completed.total() == 20


def test_a_429_lessens_what_is_sent_at_once(tmp_path):
    """A server that takes 4 at once and answers 429 to more: few of 60 requests are refused more than once."""
    with Server(lambda seen: FAULTS["429"] if server.in_flight > 4 else Answer(delay=0.02)) as server:
        replies, _ = ask(tmp_path, pool(server), range(60))
        assert [reply.text for reply in replies] == [good(n) for n in range(60)]
        assert server.requests.total() < 60 * 4


@pytest.mark.parametrize(("limits", "each", "most"), [(5, 64, 5), (64, 3, 3)])
def test_so_many_are_in_flight_and_no_more(tmp_path, limits, each, most):
    with Server(lambda seen: Answer(delay=0.02)) as server:
        ask(tmp_path, pool(server, concurrency=each), range(40), Limits(concurrency=limits))
        assert server.most_in_flight == most


def test_servers_share_by_load(tmp_path):
    with Server(lambda seen: Answer(delay=0.01)) as quick, Server(lambda seen: Answer(delay=0.2)) as slow:
        ask(tmp_path, pool(quick, slow), range(120), Limits(concurrency=8))
        assert quick.requests.total() + slow.requests.total() == 120
        assert 4 <= slow.requests.total() < 40


def test_one_server_of_two_models_has_one_set_of_limits(tmp_path):
    async def run():
        endpoint = Endpoint(server.url, concurrency=2)
        with Ledger(tmp_path / "l.sqlite") as ledger:
            async with Client([Model("m", (endpoint,)), Model("n", (endpoint,))], ledger) as client:
                asks = [Request(name, request(n).messages) for n in range(10) for name in "mn"]
                await asyncio.gather(*(client.ask(one) for one in asks))

    with Server(lambda seen: Answer(delay=0.01)) as server:
        asyncio.run(run())
        assert server.most_in_flight == 2
        assert {seen.body["model"] for seen in server.seen[:4]} == {"m", "n"}


@pytest.mark.parametrize("broken", ["500", "closed", "nobody"])
def test_a_failing_server_is_rested_and_the_other_goes_on(tmp_path, broken):
    with Server(lambda seen: FAULTS[broken]) as bad, Server(lambda seen: Answer(delay=0.005)) as server:
        url = f"http://127.0.0.1:{free_port()}/v1" if broken == "nobody" else bad.url
        limits = Limits(concurrency=8, backoff=1.0)
        replies, client = ask(tmp_path, pool(url, server), range(200), limits)
        assert [reply.text for reply in replies] == [good(n) for n in range(200)]
        failed = client.tally.retries.total()
        assert 3 <= failed <= 12  # what was in flight, and a try after each rest


@pytest.mark.parametrize("cause", ["connection", "rate_limited"])
def test_what_fails_at_once_is_one_reason_to_rest(cause):
    """64 requests under way when a server is restarted, or refuses to take so many: it is left alone for `backoff`,
    then for twice that after each request that it is tried with; not for the longest wait."""
    lane = Lane(SimpleNamespace(endpoint=Endpoint("http://a/v1", concurrency=64)), Limits(backoff=1.0))
    lane.in_flight = 64
    for _ in range(64):
        lane.failed(Again(cause, "down"), sent=0.0, now=5.0)
    assert (lane.rests_until, lane.window) == (6.0, 1 if cause == "connection" else 32)
    for now, rested in ((7.0, 2.0), (10.0, 4.0), (20.0, 8.0)):
        lane.failed(Again(cause, "down"), sent=now - 0.5, now=now)
        assert lane.rests_until == now + rested
    lane.answered()
    assert (lane.failures, lane.rests, lane.silent_since) == (0, 0, None)


def test_the_rate_of_requests_is_kept(tmp_path):
    """1,200 a minute: 20 at once, then 20 a second: the last of 60 is sent after 2 s."""
    with Server() as server:
        ask(tmp_path, pool(server, requests_per_minute=1200), range(60))
        times = [seen.at - server.seen[0].at for seen in server.seen]
    assert 1.9 < times[-1] < 4
    assert times[19] < 1 and all(times[n] >= (n - 20) / 20 - 0.1 for n in range(60))


def test_the_rate_of_tokens_is_kept_with_what_was_used_in_truth(tmp_path):
    """12,000 a minute are 200 a second. A request is taken for 7 + 512 tokens and is found to need 15: so 13 a second,
    where they went at what is set aside it would be one in 2.6 s."""
    with Server() as server:
        ask(tmp_path, pool(server, tokens_per_minute=12_000, concurrency=1), range(40))
        took = server.seen[-1].at - server.seen[0].at
    assert 1.5 < took < 8  # 40 * 15 tokens, less the 200 at the start, at 200 a second: 2 s


def test_a_bucket_by_hand():
    bucket = Bucket(60)  # one a second, of which one may come at once
    assert bucket.ready(10.0, 1) == 10.0
    bucket.take(1)
    assert bucket.ready(10.0, 1) == 11.0
    assert bucket.ready(10.75, 1) == 11.0
    assert bucket.ready(11.0, 5) == 11.0  # more than it holds: from a full one
    bucket.take(5)
    assert bucket.ready(11.0, 1) == 16.0
    assert Bucket(None).ready(3.0, 1e9) == 3.0


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


def test_a_budget_of_requests_stops_cleanly_and_a_larger_one_goes_on(tmp_path):
    with Server(lambda seen: Answer(delay=0.01)) as server:
        outcomes, _ = ask(tmp_path, pool(server, concurrency=4), range(20), budget=Budget(max_requests=7))
        spent = [outcome for outcome in outcomes if isinstance(outcome, BudgetSpent)]
        assert len(spent) == 13 and str(spent[0]) == "max_requests=7 requests have been sent"
        assert server.requests.total() == server.completed.total() == 7
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            assert sum(1 for _ in ledger.entries()) == 7
        outcomes, _ = ask(tmp_path, pool(server), range(20), budget=Budget(max_requests=20))
        assert [reply.text for reply in outcomes] == [good(n) for n in range(20)]
        assert set(server.completed.values()) == {1}


def test_a_budget_of_dollars_is_never_passed_and_nearly_used_up(tmp_path):
    """A reply costs 10 + 5 tokens at 1 USD each per 1000: 0.015; the worst case is 10 times that."""
    price = Price(1000, 1000)

    async def run():
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            async with Client(pool(server, price=price), ledger, QUICK, Budget(max_cost=0.5)) as client:
                asks = [client.ask(request(n, max_tokens=100)) for n in range(200)]
                return await asyncio.gather(*asks, return_exceptions=True), client

    with Server(lambda seen: Answer(delay=0.005)) as server:
        outcomes, client = asyncio.run(run())
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    assert {type(outcome) for outcome in outcomes} == {Reply, BudgetSpent}
    assert server.requests.total() == len(replies)
    assert client.purse.cost == pytest.approx(0.015 * len(replies))
    assert 0.5 - 0.13 < client.purse.cost <= 0.5
    with Ledger(tmp_path / "l.sqlite") as ledger, pytest.raises(UserError, match="max_cost is set, but no model has"):
        Client(pool(server), ledger, budget=Budget(max_cost=1))


def test_a_server_that_counts_no_tokens_is_charged_the_worst_case(tmp_path):
    with Server(lambda seen: Answer(patch={"usage": None})) as server:
        (reply,), client = ask(tmp_path, pool(server, price=Price(1, 1)), [1])
    assert (reply.cost, reply.prompt_tokens) == (None, None)
    assert reply.waste == pytest.approx(4122e-6) == client.purse.cost == client.tally.waste


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
from tests.test_client import pool, request
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


def recorded(folder):
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        return {key for key, _, outcome in ledger.entries() if isinstance(outcome, Reply)}


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


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_refused_and_the_key_goes_nowhere(tmp_path, monkeypatch, status):
    monkeypatch.setenv("POOL_KEY", SECRET)
    with Server() as thief:
        elsewhere = Answer(status, {"Location": thief.url.replace("127.0.0.1", "localhost") + "/chat/completions"})
        with Server(lambda seen: elsewhere) as server:
            (outcome,), _ = ask(tmp_path, pool(server, api_key_env="POOL_KEY"), [1])
            assert isinstance(outcome, UserError)
            assert f"{server.url} redirects to localhost ({status}). Redirects are not followed" in str(outcome)
            assert thief.requests.total() == 0 and server.requests.total() == 1


def test_proxies_do_not_see_requests_of_plain_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_KEY", SECRET)
    with Server() as proxy, Server() as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        (reply,), _ = ask(tmp_path, pool(server, api_key_env="POOL_KEY"), [1])
        assert reply.text == good(1) and proxy.requests.total() == 0


@pytest.mark.parametrize("secret", [SECRET, "of-another-form-9876543210"])
def test_the_key_is_nowhere_but_in_the_header(tmp_path, monkeypatch, caplog, capfd, secret):
    """A server that says the key back, in every kind of answer; all that is written is searched for it."""
    monkeypatch.setenv("POOL_KEY", secret)
    caplog.set_level(logging.DEBUG)
    said = f"bad key {secret} or Bearer {secret} or sk-v*******{secret[-4:]}".encode()

    def script(seen):
        assert seen.headers["authorization"] == f"Bearer {secret}"
        number = int(seen.body["messages"][0]["content"].split()[1])
        return [GOOD, Answer(400, body=said), Answer(500, body=said), Answer(body=said)][number]

    everything = ""
    with Server(script) as server:
        models = pool(server, api_key_env="POOL_KEY")
        outcomes, client = ask(tmp_path, models, [0], then=[1, 2, 3])
        everything += repr(outcomes) + repr(client.tally) + repr(models)
        with Server(lambda seen: Answer(401, body=said)) as closed:
            (error,), _ = ask(tmp_path, pool(closed, api_key_env="POOL_KEY"), [4])
        link = error
        while link is not None:
            everything += repr(link)
            link = link.__cause__ or link.__context__
    assert isinstance(error, UserError) and "Check the key in POOL_KEY." in str(error)
    assert [getattr(outcome, "cause", "") for outcome in outcomes] == ["", "refused", "server_error", "bad_reply"]
    everything += caplog.text + "".join(capfd.readouterr())
    files = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"question" not in files and b"answer " in files  # the search would find what is there
    for part in (secret, secret[-9:], secret[:9]):
        assert part not in everything and part.encode() not in files


def test_a_key_in_an_answer_is_not_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_KEY", SECRET)
    choice = {"index": 0, "message": {"content": f"your key is {SECRET}"}, "finish_reason": SECRET}
    with Server(lambda seen: Answer(patch={"choices": [choice], "model": f"m {SECRET}"})) as server:
        (reply,), _ = ask(tmp_path, pool(server, api_key_env="POOL_KEY"), [1])
    assert (reply.text, reply.model, reply.finish_reason) == ("your key is <removed>", "m <removed>", "<removed>")


def test_a_key_that_is_a_word_is_no_secret(tmp_path, monkeypatch):
    """Servers of one's own take any key; EMPTY is what vLLM's documentation gives."""
    monkeypatch.setenv("POOL_KEY", "EMPTY")
    choice = {"index": 0, "message": {"content": "the EMPTY set"}, "finish_reason": "stop"}
    with Server(lambda seen: Answer(patch={"choices": [choice]})) as server:
        (reply,), _ = ask(tmp_path, pool(server, api_key_env="POOL_KEY"), [1])
    assert reply.text == "the EMPTY set"


def test_half_characters_are_replaced(tmp_path):
    choice = {"index": 0, "message": {"content": "a\ud800b \ud83d\ude00"}, "finish_reason": "stop"}
    with Server(lambda seen: Answer(patch={"choices": [choice], "model": "m\udfff"})) as server:
        (reply,), _ = ask(tmp_path, pool(server), [1])
    assert (reply.text, reply.model) == ("a\ufffdb \U0001f600", "m\ufffd")


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


def test_budget_spent_in_a_task_group_still_waits_for_what_is_in_flight(tmp_path):
    async def run():
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            limits = Limits(drain_seconds=0.0)
            client = Client(pool(server), ledger, limits, Budget(max_requests=3))
            async with client, asyncio.TaskGroup() as group:
                for n in range(5):
                    group.create_task(client.ask(request(n)))

    with Server(lambda seen: Answer(delay=0.1)) as server, pytest.raises(ExceptionGroup) as error:
        asyncio.run(run())
    assert error.value.subgroup(BudgetSpent)
    assert recorded(tmp_path) == {request(n).key for n in range(3)}


def test_long_and_strange_error_bodies_are_cut(tmp_path):
    with Server(lambda seen: Answer(400, body=b"\x1b[31m\n" + b"x" * 3000)) as server:
        (outcome,), _ = ask(tmp_path, pool(server), [1])
    assert "\x1b" not in outcome.detail and "\n" not in outcome.detail and len(outcome.detail) < 400


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([Model("m", ())], "model 'm' has no server"),
        ([Model("m", (Endpoint("http://a"),))] * 2, "two models named 'm'"),
        ([Model("m", (Endpoint("localhost:8000"),))], "'localhost:8000' is no address"),
        ([Model("m", (Endpoint("http://a..b/v1"),))], "'http://a..b/v1' is no address"),
        ([Model("m", (Endpoint("http://u:hunter2@a:99999/v1"),))], "'http://<removed>@a:99999/v1' is no address"),
        ([Model("m", (Endpoint("https://user:pw@host/v1"),))], "The base_url of host carries|base_url of host carries"),
        ([Model("m", (Endpoint("http://a/v1", "NOT_SET_AT_ALL"),))], "set the environment variable NOT_SET_AT_ALL"),
        ([Model("m", (Endpoint("http://a/v1", SECRET),))], "is not the name of an environment variable"),
        ([Model("m", (Endpoint("http://a/v1", "TWO_LINES"),))], "TWO_LINES holds blanks"),
        (
            [Model("m", (Endpoint("http://a/v1", concurrency=0),))],
            "http://a/v1 has concurrency=0. It must be at least 1",
        ),
        ([Model("m", (Endpoint("http://a/v1", tokens_per_minute=0),))], "tokens_per_minute=0. It must be above 0"),
    ],
)
def test_a_pool_that_cannot_be_used(tmp_path, monkeypatch, models, message):
    monkeypatch.setenv("TWO_LINES", f"{SECRET}\n{SECRET}")
    with Ledger(tmp_path / "l.sqlite") as ledger, pytest.raises(UserError, match=message) as error:
        Client(models, ledger)
    assert SECRET not in str(error.value) and "pw" not in str(error.value)


def test_a_model_that_is_not_in_the_pool(tmp_path):
    async def run():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            async with Client([Model("n", (Endpoint("http://a/v1"),))], ledger) as client:
                await client.ask(request(1))

    with pytest.raises(UserError, match="model 'm' is not in the pool, which has n"):
        asyncio.run(run())


def test_prices_by_hand():
    assert Price(2, 10).cost(1_000_000, 100_000, 400_000) == pytest.approx(3.0)
    assert Price(2, 10, 0.5).cost(1_000_000, 100_000, 400_000) == pytest.approx(2.4)
    assert Price(2, 10, 0.0).cost(10, 0, 99) == 0  # more cached than there are: no negative cost


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({"content": None, "refusal": "I will not"}, "I will not"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}, "ab"),
    ],
)
def test_texts_of_messages(message, text):
    assert _text(message) == text


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 01 Jan 2020 00:00:00 +99999999999999999999"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT", "date": "Sun, 06 Nov 1994 08:49:07 GMT"}, 30),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
    ],
)
def test_retry_after_by_hand(headers, seconds):
    assert _retry_after(httpx2.Headers(headers)) == seconds


def test_the_scripted_completion_is_what_servers_send():
    from openai.types.chat import ChatCompletion

    ChatCompletion.model_validate(
        completion({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}), strict=True
    )
