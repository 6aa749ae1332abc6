"""Which models there are, what answers for them and what they cost; how fast and how much may be asked."""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from zephyr.errors import UserError
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

    async def complete(self, model: "Model", body: bytes, key: str) -> dict[str, Any]:
        """The completion that a request's body asks for, with a text in its first choice, as OpenAI's servers say it.

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
class Endpoint:
    """An OpenAI-compatible server."""

    base_url: str  # https://host/v1
    api_key_env: str | None = None  # the environment variable that holds the key; None for a server without keys
    concurrency: int = 64  # requests in flight
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # of prompts and completions
    identity = ""  # a model may have several servers

    def open(self, limits: "Limits", secrets: set[str]) -> Answering:
        """A client of it."""
        from zephyr.feedback.server import Server

        return Server(self, limits, secrets)

    def check(self) -> None:
        """Raises UserError where the address is not one, or would carry a secret into files, or nothing may be sent."""
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"base_url={self.base_url!r} is no address. Write it as http://host:port/v1.")
        if url.username or url.password or url.query or url.fragment:
            raise UserError(
                f"the base_url of {url.hostname} carries a user name, a password or a query. Give the address alone, "
                "and put the key into an environment variable named by api_key_env."
            )
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise UserError(
                f"api_key_env of {self.base_url} is not the name of an environment variable. It must name the "
                "variable that holds the key (api_key_env: OPENAI_API_KEY), never be the key."
            )

        if self.concurrency < 1:
            raise UserError(f"{self.base_url} has concurrency={self.concurrency}. It must be at least 1.")
        for name in ("requests_per_minute", "tokens_per_minute"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise UserError(f"{self.base_url} has {name}={rate}. It must be above 0, or null for no bound.")

    def key(self) -> str | None:
        """The API key. Raises UserError where the variable is not set or holds no key; its value is not shown."""
        if self.api_key_env is None:
            return None
        value = os.environ.get(self.api_key_env, "").strip()
        if not value:
            raise UserError(f"{self.base_url} needs a key: set the environment variable {self.api_key_env}.")
        if not re.fullmatch(r"[!-~]+", value):
            raise UserError(f"{self.api_key_env} holds blanks or characters that no key has. Set it again.")
        return value


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
