"""What tests of asking models share: a pool of scripted servers, requests, and what they come to."""

import asyncio
import socket
from pathlib import Path

from tests.openai_server import GOOD, text_of
from zephyr.feedback.client import Client
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Limits, Model
from zephyr.feedback.request import Reply, Request
from zephyr.feedback.server import Endpoint

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


def recorded(folder):
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        return {key for key, _, outcome in ledger.entries() if isinstance(outcome, Reply)}
