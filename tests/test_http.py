"""Requests and responses as bytes on real sockets: what ends a response, what breaks one, what a connection is kept for."""

import asyncio
import base64
import gzip
import shutil
import ssl
import subprocess
import time
import zlib
from functools import partial

import pytest

from zephyr.errors import UserError
from zephyr.feedback import http
from zephyr.feedback.http import BadResponse, Broken, Http, NotConnected, TooLarge

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOUND = 1000


class Script:
    """A server that answers the n-th request with the n-th of `answers` (the last for ever). None in them closes the
    connection without a word, a trailing b"" after an answer closes it behind it, a number waits so many seconds."""

    def __init__(self, *answers, context=None):
        self.answers, self.context = list(answers), context
        self.requests, self.connections = [], 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(size))
                answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
                for part in answer if isinstance(answer, tuple) else (answer,):
                    if not part and part != 0:
                        return
                    if isinstance(part, bytes):
                        writer.write(part)
                        await writer.drain()
                    else:
                        await asyncio.sleep(part)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def ask(script, times=1, scheme="http", host="127.0.0.1", pause=0.0, **changes):
    """What so many requests, one after the other, return or raise."""
    outcomes, freed = [], []

    async def run():
        async with script:
            limits = {"connect_seconds": 2.0, "total_seconds": 2.0, "response_bytes": BOUND, **changes}
            client = Http(f"{scheme}://{host}:{script.port}/v1", {"Authorization": "Bearer key"}, **limits)
            for n in range(times):
                try:
                    answer = await client.request("POST", "/x", b"body %d" % n, f"name{n}", partial(freed.append, n))
                    assert (n in freed) == (answer.status == 200)
                    outcomes.append(answer)
                except Exception as error:
                    outcomes.append(error)
                await asyncio.sleep(pause)
            client.close()

    asyncio.run(run())
    return outcomes


def test_what_is_sent_to_the_byte():
    script = Script(OK)
    (answer,) = ask(script)
    assert (answer.status, answer.content, answer.headers) == (200, b"hi", {"content-length": "2"})
    assert script.requests == [
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer key\r\n" % script.port
        + b"X-Client-Request-Id: name0\r\nContent-Length: 6\r\n\r\nbody 0"
    ]


def packed(body, coding=b"gzip", pack=gzip.compress):
    said = pack(body)
    return b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding, len(said)) + said


def test_a_body_that_is_packed_unasked_is_unpacked_within_the_bound():
    script = Script(packed(b"x" * BOUND), packed(b"hi", b"Deflate", zlib.compress), packed(b"x" * (BOUND + 1)),
                    packed(b"hi", pack=lambda body: gzip.compress(body)[:-1]), OK)  # fmt: skip
    *whole, large, cut, last = ask(script, 5)
    assert [answer.content for answer in whole] == [b"x" * BOUND, b"hi"]
    assert isinstance(large, TooLarge) and isinstance(cut, BadResponse) and last.content == b"hi"
    assert script.connections == 3  # one is kept behind what was whole, none behind what was not


@pytest.mark.parametrize(
    ("said", "status", "content"),
    [
        ((OK[:20], 0.02, OK[20:-1], 0.02, OK[-1:]), 200, b"hi"),
        (CHUNKED + b"1\r\nh\r\n1;x=y\r\ni\r\n0\r\nTrailer: x\r\n\r\n", 200, b"hi"),
        ((b"HTTP/1.1 200 OK\r\n\r\nall there is", b""), 200, b"all there is"),
        ((b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b""), 200, b"hi"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, 200, b"hi"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n", 500, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BOUND + b"x" * BOUND, 200, b"x" * BOUND),
    ],
)  # fmt: skip
def test_what_ends_a_response(said, status, content):
    (answer,) = ask(Script(said))
    assert (answer.status, answer.content) == (status, content)
    assert "link" not in answer.headers


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (None, Broken),
        ((b"HTTP/1.1 200 O", b""), BadResponse),
        ((OK[:-1], b""), BadResponse),
        ((CHUNKED + b"2\r\nh", b""), BadResponse),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", b""), BadResponse),
        (b"<html>hello</html>", BadResponse),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", BadResponse),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000, BadResponse),
        ((CHUNKED + b"1\r\nh\r\n0\r\nX: " + b"y" * 300_000, 5), BadResponse),
        ((CHUNKED + b"1\r\nh\r\n0\r\n" + b"X: y\r\n" * 50_000, 5), BadResponse),
        ((CHUNKED + b"1;" + b"y" * 300_000, 5), BadResponse),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, TooLarge),
        ((b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001, b""), TooLarge),
        ((OK[:-1], 5), TimeoutError),
    ],
)
def test_what_breaks_one(said, error):
    started = time.monotonic()
    outcomes = ask(Script(said, OK), times=2, total_seconds=0.3)
    assert isinstance(outcomes[0], error)
    assert outcomes[1].content == b"hi"  # on a connection of its own
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("said", "connections"),
    [
        (OK, 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", 3),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 3),
        ((OK, b""), 3),  # closed while nobody asks
        (OK + OK.replace(b"hi", b"no"), 3),  # one answer too many is nobody's
        ((OK, 0.01, OK.replace(b"hi", b"no")), 3),
    ],
)
def test_what_a_connection_is_kept_for(said, connections):
    script = Script(said)
    answers = ask(script, times=3, pause=0.05)
    assert [answer.content for answer in answers] == [b"hi"] * 3
    assert script.connections == connections and len(script.requests) == 3


def test_a_body_may_come_byte_by_byte(monkeypatch):
    monkeypatch.setattr(http, "_HEAD", 100)
    chunks = b"1\r\nx\r\n" * (BOUND // 2)
    (answer,) = ask(Script((CHUNKED + chunks, 0.02, chunks, 0.02, b"0\r\n\r\n")))
    assert answer.content == b"x" * BOUND


def test_what_was_answered_before_it_was_read_leaves_nothing_to_the_next():
    class Early(Script):
        async def serve(self, reader, writer):
            self.connections += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")

    async def run():
        async with Early() as script:
            client = Http(f"http://127.0.0.1:{script.port}", {}, 1.0, 1.0, BOUND)
            for _ in range(2):
                answer = await client.request("POST", "/", b"x" * 16_000_000, "", lambda: None)
                assert answer.status == 413
            assert script.connections == 2

    asyncio.run(run())


def test_a_connection_that_was_long_idle_is_not_used(monkeypatch):
    monkeypatch.setattr(http, "_IDLE", 0.02)
    script = Script(OK)
    ask(script, times=2, pause=0.05)
    assert script.connections == 2


def test_nothing_is_sent_twice():
    script = Script(OK, None, OK)
    outcomes = ask(script, times=3)
    assert isinstance(outcomes[1], Broken)
    assert [request[-6:] for request in script.requests] == [b"body 0", b"body 1", b"body 2"]


def test_who_is_cancelled_leaves_no_answer_to_the_next():
    async def run():
        async with Script((0.1, OK.replace(b"hi", b"no")), OK) as script:
            client = Http(f"http://127.0.0.1:{script.port}", {}, 1.0, 1.0, BOUND)
            task = asyncio.create_task(client.request("GET", "/", b"", "", lambda: None))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            answer = await client.request("GET", "/", b"", "", lambda: None)
            assert answer.content == b"hi" and script.connections == 2

    asyncio.run(run())


def test_who_is_cancelled_when_his_answer_is_in_leaves_the_connection_to_the_next():
    async def run():
        async with Script(OK, (0.05, OK.replace(b"hi", b"ho"))) as script:
            client = Http(f"http://127.0.0.1:{script.port}", {}, 1.0, 1.0, BOUND)
            tasks = []

            def free():
                tasks.append(asyncio.create_task(client.request("GET", "/", b"", "", lambda: None)))
                asyncio.get_running_loop().call_soon(first.cancel)

            first = asyncio.create_task(client.request("GET", "/", b"", "", free))
            with pytest.raises(asyncio.CancelledError):
                await first
            assert (await tasks[0]).content == b"ho" and script.connections == 1

    asyncio.run(run())


@pytest.mark.parametrize(("said", "connections"), [(OK, 1), ((OK, b""), 2)])
def test_a_place_is_free_in_time_for_the_connection_to_be_used_again(said, connections):
    """What waits for the place is woken before who waits for the answer, and finds the connection; if the server has
    closed it without a word, another."""

    async def run():
        async with Script(said) as script:
            client = Http(f"http://127.0.0.1:{script.port}", {}, 1.0, 1.0, BOUND)
            order, place = [], asyncio.Event()

            async def second():
                await place.wait()
                order.append("sent")
                await client.request("GET", "/", b"", "", lambda: None)

            waiting = asyncio.create_task(second())
            await asyncio.sleep(0)
            await client.request("GET", "/", b"", "", place.set)
            order.append("read")
            await waiting
            assert order == ["sent", "read"] and script.connections == connections

    asyncio.run(run())


def test_nobody_there():
    async def run():
        async with Script(OK) as script:
            pass
        with pytest.raises(NotConnected, match="Connect call failed"):
            await Http(f"http://127.0.0.1:{script.port}", {}, 1.0, 1.0, BOUND).request(
                "GET", "/", b"", "", lambda: None
            )
        with pytest.raises(NotConnected):
            await Http("http://no-such-host.invalid", {}, 1.0, 1.0, BOUND).request("GET", "/", b"", "", lambda: None)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("http://host/v1/", "host", "/v1/x"),
        ("http://host:80", "host:80", "/x"),
        ("http://[::1]:8000/v1", "[::1]:8000", "/v1/x"),
        ("http://bücher.example/a b", "xn--bcher-kva.example", "/a%20b/x"),
    ],
)
def test_addresses(url, host, target):
    client = Http(url, {}, 1.0, 1.0, BOUND)
    assert client._head == f"Host: {host}\r\n" and client._path + "/x" == target


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that signs itself, for localhost: its files, and a server's context."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command for a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    key, chain = folder / "key.pem", folder / "chain.pem"
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*line, *names, "-keyout", key, "-out", chain], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, key)
    return chain, context


@pytest.fixture
def trusted(certificate, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    return certificate[1]


def test_a_server_with_a_certificate(trusted):
    script = Script(OK, context=trusted)
    assert [answer.content for answer in ask(script, 2, "https", "localhost")] == [b"hi", b"hi"]
    assert script.connections == 1


def test_a_certificate_must_be_known_and_name_the_host(trusted, monkeypatch):
    script = Script(OK, context=trusted)
    (outcome,) = ask(script, 1, "https", "127.0.0.1")
    assert isinstance(outcome, ssl.SSLError) and "127.0.0.1" in str(outcome)
    monkeypatch.delenv("SSL_CERT_FILE")
    (outcome,) = ask(Script(OK, context=trusted), 1, "https", "localhost")
    assert isinstance(outcome, ssl.SSLError) and "self-signed" in str(outcome).replace("self signed", "self-signed")
    assert not script.requests


def test_what_is_not_connected_in_time_has_not_been_sent(trusted):
    (outcome,) = ask(Script(OK), 1, "https", "localhost", total_seconds=0.2)  # it does not know TLS, and waits
    assert isinstance(outcome, NotConnected) and str(outcome) == "not in time."


class Proxy(Script):
    """A proxy that opens tunnels, or says `answer` in their place."""

    async def serve(self, reader, writer):
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answers[0])
        if b" 200 " not in self.answers[0]:
            writer.close()
            return
        host, _, port = self.requests[-1].split()[1].decode().rpartition(":")
        others = await asyncio.open_connection(host, int(port))

        async def pass_on(source, target):
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(pass_on(reader, others[1]), pass_on(others[0], writer))


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 Connected\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"])
def test_a_proxy_sees_a_tunnel_and_no_request(trusted, monkeypatch, said):
    async def run():
        async with Script(OK, context=trusted) as script, Proxy(said) as proxy:
            monkeypatch.setenv("https_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
            client = Http(f"https://localhost:{script.port}/v1", {"Authorization": "Bearer key"}, 2.0, 2.0, BOUND)
            for _ in range(2):
                answer = await client.request("POST", "/x", b"body", "", lambda: None)
                assert answer.content == b"hi"
            assert len(proxy.requests) == 1 and b"Bearer" not in proxy.requests[0]
            pair = base64.b64encode(b"me:p@ss")
            assert b"CONNECT localhost:%d HTTP/1.1\r\n" % script.port in proxy.requests[0]
            assert b"Proxy-Authorization: Basic " + pair in proxy.requests[0]
            assert b"Proxy-Authorization" not in script.requests[0] and b"Bearer key" in script.requests[0]
            client.close()
            other = Http(f"https://127.0.0.1:{script.port}/v1", {}, 2.0, 2.0, BOUND)
            with pytest.raises(ssl.SSLError, match="127.0.0.1"):  # which the certificate does not name
                await other.request("POST", "/x", b"body", "", lambda: None)
            assert len(proxy.requests) == 2 and len(script.requests) == 2

    asyncio.run(run())


def test_a_proxy_that_refuses(trusted, monkeypatch):
    async def run():
        async with Proxy(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n") as proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            client = Http("https://localhost:1/v1", {}, 2.0, 2.0, BOUND)
            with pytest.raises(NotConnected, match="the proxy answered 407"):
                await client.request("POST", "/x", b"body", "", lambda: None)

    asyncio.run(run())


def test_a_proxy_that_is_not_there(trusted, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    (outcome,) = ask(Script(OK, context=trusted), 1, "https", "localhost")
    assert isinstance(outcome, NotConnected) and str(outcome).startswith("the proxy: [Errno")
    monkeypatch.setenv("no_proxy", "localhost")
    (outcome,) = ask(Script(OK, context=trusted), 1, "https", "localhost")
    assert outcome.content == b"hi"


@pytest.mark.parametrize(
    "address", ["http://me:p#ss@host:1", "http://host:port", "a..b:1", "socks5://host:1", "http://"]
)
def test_a_proxy_that_is_none(trusted, monkeypatch, address):
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(UserError, match="https_proxy in the environment is no address of an HTTP proxy") as error:
        Http("https://host/v1", {}, 1.0, 1.0, BOUND)
    assert "p#ss" not in str(error.value)
    Http("http://host/v1", {}, 1.0, 1.0, BOUND)
