"""A scripted OpenAI-compatible server on localhost: what it answers, what it does wrong, and what it has seen.

In a thread of its own (`with Server(script) as server`), so that a test can kill the process that asks and still read
the counts; or as a process, `python -m tests.openai_server PORT_FILE DELAY`, to measure against.

It is written on bare asyncio because it must cost less than what is measured, and because its faults stand below what
any web framework lets one do: half a body, a body without an end, a connection that is closed in the middle.
"""

import asyncio
import email.utils
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REASONS = {200: "OK", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass
class Seen:
    """One request as it arrived."""

    key: str  # the client's own name of the request, X-Client-Request-Id
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]
    attempt: int  # how often this key has come, this time included
    at: float  # seconds, monotonic
    path: str = ""


@dataclass
class Answer:
    """What to do with a request. A plain Answer() is a good chat completion after `delay` seconds."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of the completion
    delay: float = 0.0
    cut: int | None = None  # bytes of the body after which the connection is closed
    drip: float = 0.0  # seconds between the bytes of the body
    endless: bool = False  # after the body go on for ever, chunked
    silent: bool = False  # never answer
    patch: dict[str, Any] = field(default_factory=dict)  # top-level fields of the completion to replace


def text_of(body: dict[str, Any]) -> str:
    """The completion of a request: a pure function of it, so that runs can be compared. A judge's, where one is asked
    for: JSON by the schema, or text in the form that the prompt names."""
    digest = hashlib.sha256(json.dumps([body["messages"], body.get("seed"), body["model"]]).encode()).hexdigest()
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    if "properties" in schema:
        return json.dumps(_filled(schema, digest))
    asked = body["messages"][-1]["content"]
    if "# Answer format" not in asked:
        return "answer " + digest[:12]
    heads = re.findall(r"^Text [0-9]+ \[[0-9a-f]{12}\]$", asked, re.MULTILINE)
    blocks = [f"{head}\nRationale: so it is.\nRating: {int(digest[n], 16) % 5 + 1}" for n, head in enumerate(heads)]
    return "\n\n".join(blocks) or f"It is {digest[:6]}.\n\nOverall Score: {int(digest[0], 16) % 10 + 1}"


def _filled(schema: dict[str, Any], digest: str) -> Any:
    """A value that the schema allows."""
    if schema["type"] == "object":
        parts = schema["properties"].items()
        return {name: _filled(part, hashlib.sha256((name + digest).encode()).hexdigest()) for name, part in parts}
    choices = schema.get("enum")
    return choices[int(digest, 16) % len(choices)] if choices else f"so it is, {digest[:6]}"


def completion(body: dict[str, Any], **patch: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"] + "-0613",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text_of(body)}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
        **patch,
    }


def http_date(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


GOOD = Answer()
FAULTS: dict[str, Answer] = {
    "429": Answer(429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'),
    "500": Answer(500, {}, b"<html>oops</html>"),
    "503": Answer(503, {}, b""),
    "silent": Answer(silent=True),
    "dropped": Answer(cut=40),
    "closed": Answer(cut=-1),
    "truncated": Answer(body=b'{"id": "chatcmpl-1", "choices": [{"index": 0, "mess'),
    "garbage": Answer(body=b"\xff\xfe not json \x00"),
    "no choice": Answer(patch={"choices": []}),
    "wrong model": Answer(patch={"model": "somebody-else"}),
    "wrong ids": Answer(patch={"id": 7, "object": "list"}),
    "slow": Answer(drip=0.0005),
}

Script = Callable[[Seen], Answer]


class Server:
    """A server with a script: for each request, the Answer to give."""

    def __init__(self, script: Script = lambda seen: GOOD, keep: bool = True) -> None:
        self.script = script
        self.keep = keep  # what was seen; not where a million requests are measured
        self.seen: list[Seen] = []
        self.requests: Counter[str] = Counter()  # per key
        self.completed: Counter[str] = Counter()  # per key: good answers handed wholly to the network
        self.in_flight = self.most_in_flight = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> "Server":
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.listen())
        self._ready.set()
        self._loop.run_forever()
        self.close()

    async def listen(self, port: int = 0) -> None:
        self._connections: set[_Connection] = set()
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self), "127.0.0.1", port, backlog=1024
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.server._connections.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self.server._connections.discard(self)
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        arrived = asyncio.get_running_loop().time()  # a delay runs from here, whatever else is being done
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        key = headers.get("x-client-request-id", "")
        server = self.server
        server.requests[key] += 1
        seen = Seen(key, headers, json.loads(rest[:length] or b"{}"), server.requests[key], time.monotonic())
        seen.path = first.split(" ")[1]
        if server.keep:
            server.seen.append(seen)
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        answer = server.script(seen)
        if answer.drip or answer.endless:
            self.task = asyncio.get_running_loop().create_task(self._slowly(seen, answer))
        elif not answer.silent:
            loop = asyncio.get_running_loop()
            loop.call_at(arrived + answer.delay, self._answer, seen, answer, self._body(seen, answer))

    def _body(self, seen: Seen, answer: Answer) -> bytes:
        return json.dumps(completion(seen.body, **answer.patch)).encode() if answer.body is None else answer.body

    def _head(self, answer: Answer, size: str) -> bytes:
        extra = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        reason = REASONS.get(answer.status, "Said")
        return f"HTTP/1.1 {answer.status} {reason}\r\nContent-Type: application/json\r\n{size}\r\n{extra}\r\n".encode()

    def _answer(self, seen: Seen, answer: Answer, body: bytes) -> None:
        self.server.in_flight -= 1
        if self.transport.is_closing():
            return
        if answer.cut is not None:
            if answer.cut >= 0:
                self.transport.write(self._head(answer, f"Content-Length: {len(body)}") + body[: answer.cut])
            self.transport.close()
            return
        self.transport.write(self._head(answer, f"Content-Length: {len(body)}") + body)
        if answer.status == 200 and answer.body is None and "choices" not in answer.patch:
            self.server.completed[seen.key] += 1

    async def _slowly(self, seen: Seen, answer: Answer) -> None:
        await asyncio.sleep(answer.delay)
        body = self._body(seen, answer)
        if answer.endless:
            self.transport.write(self._head(answer, "Transfer-Encoding: chunked"))
            while not self.transport.is_closing():
                self.transport.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await asyncio.sleep(0)
        self.transport.write(self._head(answer, f"Content-Length: {len(body)}"))
        for byte in body:
            self.transport.write(bytes([byte]))
            await asyncio.sleep(answer.drip)
        self.server.in_flight -= 1
        self.server.completed[seen.key] += 1


async def _serve(port_file: Path, delay: float) -> None:
    server = Server(lambda seen: answer, keep=False)
    answer = Answer(delay=delay)
    await server.listen()
    port_file.write_text(str(server.port))
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
