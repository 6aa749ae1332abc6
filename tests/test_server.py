"""What is said to one server and what its answers mean; keys, redirects and bodies that nobody should trust."""

import asyncio
import json
import logging

import httpx2
import pytest

from tests.asking import SECRET, ask, first, good, pool, request
from tests.openai_server import GOOD, Answer, Server, completion, text_of
from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Limits, Model, Price
from zephyr.feedback.request import Reply, Request
from zephyr.feedback.server import Endpoint, _retry_after, _text


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


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("http://127.0.0.1:{}", "/chat/completions"),
        ("HTTP://LOCALHOST:{}/V1/", "/V1/chat/completions"),
        ("http://localhost:{}/ä%20b/../v1", "/%C3%A4%20b/../v1/chat/completions"),
    ],
)
def test_where_a_base_url_leads(tmp_path, address, path):
    with Server() as server:
        (reply,), _ = ask(tmp_path, pool(address.format(server.port)), [1])
        assert reply.text == good(1) and server.seen[0].path == path


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


@pytest.mark.parametrize("address", ["/v2", "http://[a", "http://b\xfccher\x9b.example", ""])
def test_a_redirect_to_nowhere(tmp_path, address):
    with Server(lambda seen: Answer(302, {"Location": address})) as server:
        (outcome,), _ = ask(tmp_path, pool(server), [1])
    assert isinstance(outcome, UserError) and f"{server.url} redirects to another address (302)" in str(outcome)


@pytest.mark.parametrize("name", ["Retry-After", "Date", "Server"])
def test_headers_that_are_not_ascii(tmp_path, name):
    with Server(first(Answer(429, {name: "sp\xe4ter"}, b""))) as server:
        (reply,), _ = ask(tmp_path, pool(server), [1])
    assert (reply.text, reply.attempts) == (good(1), 2)


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
        ([Model("m", (Endpoint(" http://a/v1"),))], "' http://a/v1' is no address"),
        ([Model("m", (Endpoint("http://a\0/v1"),))], "is no address"),
        ([Model("m", (Endpoint("https://faß.de/v1"),))], "is no address"),  # fass.de, or xn--fa-hia.de?
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
