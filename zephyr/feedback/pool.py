"""Which models there are, what answers for them and what they cost; how fast and how much may be asked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from zephyr.feedback.request import Request
from zephyr.settings import Count, Decay, Positive


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    prompt: Decay = 0.0
    completion: Decay = 0.0
    cached: Decay | None = None  # of the prompt's tokens that the server had in its cache; None: as others

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        """USD for so many tokens; the cached ones are among the prompt's."""
        rate = self.prompt if self.cached is None else self.cached
        cached = min(cached, prompt)
        return ((prompt - cached) * self.prompt + cached * rate + completion * self.completion) / 1e6


class Answering(Protocol):
    """A source that has been opened."""

    @property
    def endpoint(self) -> "Source": ...

    async def complete(self, model: "Model", body: bytes, key: str, free: Callable[[], None]) -> dict[str, Any]:
        """The completion that a request's body asks for, with a text in its first choice, as OpenAI's servers say it.

        `free` may be called as soon as the answer is in and all that is left is to read it: then the next is sent.
        Raises Again, Refused or UserError, of zephyr.feedback.server and zephyr.errors.
        """

    async def close(self) -> None:
        """Nothing more is asked."""


class Source(Protocol):
    """What answers for a model: a server (Endpoint), a model in this process (Local), a file (Replay).

    Equal sources of several models are opened once, with one set of limits.
    """

    @property
    def concurrency(self) -> int: ...
    @property
    def requests_per_minute(self) -> float | None: ...
    @property
    def tokens_per_minute(self) -> float | None: ...

    @property
    def identity(self) -> str:
        """What tells it from another one that stands behind the same name; "" where the name alone is known."""

    def open(self, limits: "Limits", secrets: set[str]) -> Answering:
        """Raises UserError where it cannot be used. `secrets` are added to, and taken out of whatever is said."""


@dataclass(frozen=True)
class Model:
    """A model of the pool."""

    name: str  # in requests and records
    servers: tuple[Source, ...]
    served_as: str | None = None  # what its servers call it; None: the name
    price: Price = Price()
    structured: bool = True  # its servers take a JSON schema; if not, the schema is not sent
    answers_as: str | None = None  # the model that replies must name, else they are asked again; None: any

    def key(self, request: Request) -> str:
        """By which the ledger knows a request of this model: other weights behind its name are another model."""
        known = "".join(source.identity for source in self.servers)
        return hashlib.sha256(f"{known} {request.key}".encode()).hexdigest() if known else request.key


@dataclass(frozen=True)
class Limits:
    """Bounds of the client."""

    concurrency: Count = 64  # requests in flight, all servers together
    attempts: Count = 6  # of a request, before it is a failure; a 429 is none
    backoff: Decay = 1.0  # seconds: the n-th wait of a request is drawn from 0 to backoff * 2**(n - 1)
    longest_wait: Decay = 60.0  # seconds, for any wait, also one that a server asks for
    patience: Positive = 120.0  # seconds without one answer from any server of a model, after which the run stops
    connect_seconds: Positive = 10.0
    total_seconds: Positive = 600.0  # of an attempt, to the last byte
    drain_seconds: Decay = 5.0  # that replies under way are waited for when the client is left by an exception
    response_bytes: Count = 8 * 1024 * 1024


@dataclass(frozen=True)
class Budget:
    """What may be spent, earlier runs with the same ledger included. None: no bound."""

    max_cost: float | None = None  # USD; kept even if every request in flight costs the most it can
    max_requests: int | None = None  # requests sent, each attempt counted
