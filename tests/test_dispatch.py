"""When a request is sent, and to whom: rates, rests, waits that a server asks for, and the budget."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest

from tests.asking import QUICK, ask, first, free_port, good, pool, recorded, request
from tests.openai_server import FAULTS, GOOD, Answer, Server, http_date
from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import Bucket, BudgetSpent, Lane
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Limits, Model, Price
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.server import Again, Endpoint


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
    late = 0.5  # seconds: the first may be seen so long after it was sent, where the machine has other work
    assert 2 - late < times[-1] < 4
    assert times[19] < 1 and all(times[n] >= (n - 20) / 20 - late for n in range(60))


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


def test_prices_by_hand():
    assert Price(2, 10).cost(1_000_000, 100_000, 400_000) == pytest.approx(3.0)
    assert Price(2, 10, 0.5).cost(1_000_000, 100_000, 400_000) == pytest.approx(2.4)
    assert Price(2, 10, 0.0).cost(10, 0, 99) == 0  # more cached than there are: no negative cost
