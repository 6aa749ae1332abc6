"""HTTP/1.1 to one address over kept connections: a request's bytes go out in one write, and httptools reads the answer.

What general clients do around a request (sessions, redirects, cookies, streams) costs several times what is needed
here, and it is spent between an answer and the next request, while a place at the server is empty. Nothing is sent
twice: a connection that breaks is the caller's to judge.
"""

import asyncio
import base64
import select
import ssl
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import httptools

from zephyr.errors import UserError, reason

_HEAD = 256 * 1024  # bytes that a response may have beside its body and the marks of its chunks
_CHUNKED = 8  # bytes that a byte of the body may come as: 6 in a chunk of its own
_IDLE = 4.0  # seconds: servers commonly close what was idle for 5, some in the very moment of the next request


class NotConnected(Exception):
    """There was no connection, so nothing was sent."""


class Broken(Exception):
    """The connection ended before the response began."""


class BadResponse(Exception):
    """What came is not HTTP, or ends before its end."""


class TooLarge(Exception):
    """The response has more bytes than it may."""


@dataclass(frozen=True)
class Response:
    """A response, whole. Header names are in lower case; of a repeated one the last counts."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class _Connection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._transport: Any = None
        self._answer: asyncio.Future[Response] | None = None
        self.idle_since = 0.0

    @property
    def closed(self) -> bool:
        return self._transport is None or bool(self._transport.is_closing())

    @property
    def silent(self) -> bool:
        """Nothing has come that the loop has not seen yet, such as the end: servers close behind an answer without a
        word, and what waits for a place is sent before the loop looks again."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return not poll.poll(0)

    def request(self, data: bytes, over: Callable[[Response], None], tunnel: bool = False) -> asyncio.Future[Response]:
        """Send it. `over` is told of the response at once, whoever waits for it in the loop's next round. A tunnel's
        is over with its head."""
        self._over = over
        self._answer = asyncio.get_running_loop().create_future()
        self._tunnel = tunnel
        self._parser = httptools.HttpResponseParser(self)
        self._come = self._size = 0  # bytes, of all and of the body
        self._headed = self._to_the_end = False
        self._transport.write(data)
        return self._answer

    async def secure(self, context: ssl.SSLContext, host: str) -> None:
        """TLS from here on."""
        self._transport = await asyncio.get_running_loop().start_tls(
            self._transport, self, context, server_hostname=host
        )

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked for it
            return
        self._come += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BadResponse(reason(error)))
        if self._come > _HEAD + _CHUNKED * self._size:
            self._fail(BadResponse("what is not its body does not end."))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is None or self._answer.done():
            return
        if self._headed and self._to_the_end and error is None:
            self._done()
        elif self._come:
            self._fail(BadResponse("it ends too early."))
        else:
            self._fail(Broken(reason(error) if error else "it was closed."))

    # what httptools calls

    def on_message_begin(self) -> None:
        if self._answer is not None and self._answer.done():
            self.close()  # a second response
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._headed = self._status >= 200  # else an interim one, and the response is still to come
        self._to_the_end = not {"content-length", "transfer-encoding"} & self._headers.keys()
        if self._tunnel and self._headed:
            self._done()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > self._bound:
            self._fail(TooLarge())
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._headed and not self._tunnel:
            if not self._parser.should_keep_alive() or self._transport.get_write_buffer_size():
                self.close()  # the rest of a request that was answered early would stand before the next one
            self._done()

    def _done(self) -> None:
        if self._answer is not None and not self._answer.done():
            content = b"".join(self._body)
            if self._headers.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
                try:
                    content = _unpacked(content, self._bound)
                except (BadResponse, TooLarge) as error:
                    self._fail(error)
                    return
            response = Response(self._status, self._headers, content)
            self._over(response)
            self._answer.set_result(response)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()


def _unpacked(content: bytes, bound: int) -> bytes:
    """A body that was packed, though nobody asked for it: some proxies do so whatever they are told."""
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, by its head
    try:
        unpacked = unpacking.decompress(content, bound + 1)
    except zlib.error as error:
        raise BadResponse(reason(error)) from None
    if len(unpacked) > bound:
        raise TooLarge()
    if not unpacking.eof:
        raise BadResponse("what was packed ends too early.")
    return unpacked


def parts(address: str) -> SplitResult | None:
    """Those of an http or https address; None where it is none, or its host could be taken for another's."""
    try:
        url = urlsplit(address)
        host = url.hostname or ""
        named = bool(host.encode("idna")) and (host.isascii() or host.encode("idna").decode("idna") == host)
        right = named and url.scheme in ("http", "https") and url.port != 0
    except ValueError:  # a port that is none, a host that no name service knows
        return None
    return url if right and address.isprintable() and " " not in address else None


def _proxy(host: str) -> SplitResult | None:
    """The proxy that the environment names for an https address. Raises UserError where it names no address."""
    address = urllib.request.getproxies().get("https")
    if not address or urllib.request.proxy_bypass(host):
        return None
    proxy = parts(address if "//" in address else f"http://{address}")
    if proxy is None:  # it may hold a password, so it is not shown
        raise UserError("https_proxy in the environment is no address of an HTTP proxy. Write it as http://host:port.")
    return proxy


class Http:
    """Connections to the server of `base_url`, as many as there are requests at a time.

    `headers` go with every request. An https address is reached through the proxy that the environment names for it, by
    a tunnel; an http one never through a proxy, which would read what is sent. Raises UserError for one that is none.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        connect_seconds: float,
        total_seconds: float,
        response_bytes: int,
    ) -> None:
        url = urlsplit(base_url)
        self._host = (url.hostname or "").encode("idna").decode()
        self._context = ssl.create_default_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._context else 80)
        self._proxy = _proxy(self._host) if self._context else None
        authority = f"[{self._host}]" if ":" in self._host else self._host
        self._tunnelled = f"{authority}:{self._port}"
        named = authority if url.port is None else f"{authority}:{url.port}"
        self._path = quote(url.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": named, **headers}.items())
        self._connect_seconds = min(connect_seconds, total_seconds)
        self._total_seconds, self._bound = total_seconds, response_bytes
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, content: bytes, name: str, free: Callable[[], None]) -> Response:
        """The response to `content` sent to `base_url` + `path` under the client's own `name` for it.

        `free` is called the moment that one of status 200 is in, before it is returned, so that what waits to be sent
        goes out first. Another status may say something that has to be known before.

        Raises NotConnected, Broken, BadResponse, TooLarge, TimeoutError (the response did not end in time) and
        ssl.SSLError.
        """
        named = f"X-Client-Request-Id: {name}\r\n" if name else ""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{named}Content-Length: {len(content)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        until = loop.time() + self._total_seconds
        connection = self._kept() or await self._connected()

        def over(response: Response) -> None:
            if not connection.closed:
                connection.idle_since = loop.time()
                self._idle.append(connection)
            if response.status == 200:
                free()

        async with asyncio.timeout_at(until):
            answer = connection.request(head.encode("latin-1") + content, over)
            try:
                return await answer
            except asyncio.CancelledError:
                if answer.cancelled():  # else it is in, and the connection may be another's already
                    connection.close()
                raise

    def _kept(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - _IDLE
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since > oldest and connection.silent:
                return connection
            connection.close()
        return None

    async def _connected(self) -> _Connection:
        whose = "the proxy: " if self._proxy else ""
        try:
            async with asyncio.timeout(self._connect_seconds):
                if self._proxy:
                    return await self._through(self._proxy)
                return await self._open(self._host, self._port, self._context)
        except ssl.SSLError:
            raise
        except TimeoutError:
            raise NotConnected(f"{whose}not in time.") from None
        except (OSError, Broken, BadResponse) as error:
            raise NotConnected(f"{whose}{reason(error)}") from None

    async def _open(self, host: str, port: int, context: ssl.SSLContext | None) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._bound), host, port, ssl=context, happy_eyeballs_delay=0.25
        )
        return connection

    async def _through(self, proxy: SplitResult) -> _Connection:
        """A connection by CONNECT (RFC 9110, 9.3.6)."""
        context = ssl.create_default_context() if proxy.scheme == "https" else None
        connection = await self._open(proxy.hostname or "", proxy.port or (443 if context else 80), context)
        try:
            allowed = ""
            if proxy.username:
                pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
                allowed = f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
            ask = f"CONNECT {self._tunnelled} HTTP/1.1\r\nHost: {self._tunnelled}\r\n{allowed}\r\n"
            response = await connection.request(ask.encode("latin-1"), lambda _: None, tunnel=True)
            if response.status != 200:
                raise NotConnected(f"the proxy answered {response.status}.")
            assert self._context is not None
            await connection.secure(self._context, self._host)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the connections that nobody waits on."""
        while self._idle:
            self._idle.pop().close()
