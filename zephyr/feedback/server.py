"""One OpenAI-compatible server: a request sent once, and what its answer means.

Every way an attempt can end is one of four: a completion, `Again` (worth another attempt), `Refused` (this request will
never be answered) and UserError (none will be, until somebody mends something). Retrying is not done here.
"""

import asyncio
import email.utils
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2
import openai
from openai._models import FinalRequestOptions

from zephyr.errors import UserError, reason
from zephyr.feedback.http import BadResponse, Broken, Http, NotConnected, TooLarge, parts
from zephyr.feedback.pool import Answering, Limits, Model
from zephyr.redact import redact

_DETAIL = 300  # characters of a server's words that are passed on
_SECRET_LENGTH = 12  # shorter ones (EMPTY, ollama) are words that stand in answers, and no secrets
_SECRET = re.compile(r"\b(?:Bearer\s+\S+|sk-[\w*.-]+)", re.IGNORECASE)
_AGAIN = {408: "server_error", 409: "server_error", 425: "server_error", 429: "rate_limited"}


class Again(Exception):
    """An attempt that failed in a way that may pass."""

    def __init__(self, cause: str, detail: str, after: float | None = None, billed: bool = False) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail
        self.after = after  # seconds that the server asked to be left alone
        self.billed = billed  # the server may have worked, and may charge for it


class Refused(Exception):
    """A request that will not be answered, now or later."""

    def __init__(self, detail: str, cause: str = "refused") -> None:
        super().__init__(detail)
        self.cause = cause


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server."""

    base_url: str  # https://host/v1
    api_key_env: str | None = None  # the environment variable that holds the key; None for a server without keys
    concurrency: int = 64  # requests in flight
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # of prompts and completions
    identity = ""  # a model may have several servers

    def open(self, limits: Limits, secrets: set[str]) -> Answering:
        """A client of it."""
        return Server(self, limits, secrets)

    def check(self) -> None:
        """Raises UserError where the address is not one, or would carry a secret into files, or nothing may be sent."""
        url = parts(self.base_url)
        if url is None:
            raise UserError(f"base_url={redact(self.base_url)!r} is no address. Write it as http://host:port/v1.")
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


class Server:
    """A client of one endpoint. `secrets` are taken out of whatever the server says."""

    def __init__(self, endpoint: Endpoint, limits: Limits, secrets: set[str]) -> None:
        endpoint.check()
        self.endpoint = endpoint
        self.url = endpoint.base_url.rstrip("/")
        self._secrets = secrets
        self._answered: set[str] = set()  # models that it has served
        key = endpoint.key()
        if key and len(key) >= _SECRET_LENGTH:
            secrets.add(key)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it writes a line a request
        self._transport = _Transport(self.url, key, limits)
        self._openai = _Client(
            base_url=_ANYWHERE,
            api_key="-",  # the key is the transport's, and so is the address
            max_retries=0,  # two policies would multiply
            http_client=httpx2.AsyncClient(transport=self._transport, follow_redirects=False, trust_env=False),
        )

    async def complete(self, model: Model, body: bytes, key: str, free: Callable[[], None]) -> dict[str, Any]:
        """The completion as the server's JSON says it, with a text in its first choice.

        Raises Again, Refused or UserError.
        """
        try:
            known = model.name in self._answered  # a first answer may be a page, after which nothing is to be sent
            response = await self._openai.chat_completion(body, key, free if known else _nothing)
        except openai.APIStatusError as error:
            await self._refuse(model, error.response)
        completion = self._parse(model, response.content)
        self._answered.add(model.name)
        return completion

    def _parse(self, model: Model, content: bytes) -> dict[str, Any]:
        try:
            completion = json.loads(content)
        except (ValueError, RecursionError):
            if content.lstrip().startswith(b"<") and model.name not in self._answered:
                raise UserError(
                    f"{self.url} answers with a page: {self._cut(content)} Check base_url (it usually ends in /v1)."
                ) from None
            raise Again(
                "bad_reply", f"{self.url}: a body that is not JSON: {self._cut(content)}", billed=True
            ) from None
        try:
            choice = completion["choices"][0]
            text = _text(choice["message"])
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Again("bad_reply", f"{self.url}: no completion in {self._cut(content)}", billed=True) from None
        if model.answers_as is not None and completion.get("model") != model.answers_as:
            named = self._cut(str(completion.get("model")))
            raise Again("wrong_model", f"{self.url}: {named!r} replied for {model.answers_as!r}", billed=True)
        # a server that writes a key into its answers would have it published
        choice["message"]["content"] = self._without_secrets(text)
        for part, name in ((completion, "model"), (choice, "finish_reason")):
            part[name] = self._without_secrets(str(part.get(name) or ""))
        return completion

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "<removed>")
        return text

    async def _refuse(self, model: Model, response: httpx2.Response) -> None:
        status, said = response.status_code, self._said(response.content)
        asked = model.served_as or model.name
        where = f"{self.url} answered {status} for model {asked!r}: {said}"
        if status in _AGAIN or status >= 500:
            if status == 429 and "insufficient_quota" in said:
                raise UserError(f"{where} Its account has no credit left: add some, then run again to go on.")
            if status == 429 and "request too large" in said.lower():  # for the account's tokens a minute, at any time
                raise Refused(where)
            raise Again(_AGAIN.get(status, "server_error"), where, _retry_after(response.headers))
        if 300 <= status < 400:
            location = parts(response.headers.get("location", ""))
            host = location.hostname if location else "another address"
            raise UserError(
                f"{self.url} redirects to {host} ({status}). Redirects are not followed, as they could take prompts "
                "and key elsewhere: set base_url to the address that answers itself."
            )
        if status == 402:
            raise UserError(f"{where} Its account has no credit left: add some, then run again to go on.")
        served = model.name in self._answered  # then it is about this request, not about how the pool is set
        name = self.endpoint.api_key_env
        if status == 401 or (status == 403 and not served):
            mend = f"Check the key in {name}." if name else "Set api_key_env to the variable that holds its key."
            raise UserError(f"{where} {mend}")
        if not served and (status in (404, 405) or (status == 400 and f"'{asked}'" in said)):
            raise UserError(
                f"{where} Check base_url (it usually ends in /v1), and model, which is what its servers call it."
                f"{await self._models()}"
            )
        if status == 400 and "response_format" in said:
            raise UserError(f"{where} It takes no JSON schema: set structured=false for this model.")
        raise Refused(where)

    async def _models(self) -> str:
        """What the server lists, to be said beside a name that it does not know."""
        try:
            response = await self._openai.get("/models", cast_to=httpx2.Response)
            names = [str(model["id"]) for model in json.loads(response.content)["data"]]
        except Exception:  # it was only for a better message
            return ""
        return f" The server lists: {self._cut(', '.join(names))}." if names else ""

    def _said(self, content: bytes) -> str:
        """The message of an error's body, cut and without secrets, as a sentence."""
        try:
            body = json.loads(content)
            error = body.get("error", body)  # FastAPI's servers say detail, without an error around it
            named = isinstance(error, dict)
            parts = [error.get(name) for name in ("message", "detail", "code")] if named else [error]
            said = " ".join(f"{part}" for part in parts if part)
        except (ValueError, AttributeError, RecursionError):
            said = ""
        cut = self._cut(said or content) or "nothing more."
        return cut if cut.endswith((".", "!", "?")) else f"{cut}."

    def _cut(self, said: str | bytes) -> str:
        text = self._without_secrets(said.decode("utf-8", "replace") if isinstance(said, bytes) else said)
        text = text[: 8 * _DETAIL]  # only now, or half a secret could stand at the end
        text = " ".join("".join(char if char.isprintable() else " " for char in _SECRET.sub("<removed>", text)).split())
        return text if len(text) <= _DETAIL else text[:_DETAIL] + "..."

    async def close(self) -> None:
        await self._openai.close()


class _Client(openai.AsyncOpenAI):
    """The openai client, with its requests built in one step: what it merges, validates and parses for each takes as
    long as everything else together, and none of it would be sent."""

    @cached_property
    def _chat(self) -> tuple[httpx2.URL, FinalRequestOptions]:
        url = httpx2.URL(f"{_ANYWHERE}/chat/completions")
        return url, FinalRequestOptions.construct(method="post", url="", idempotency_key="-")

    async def chat_completion(self, body: bytes, key: str, free: Callable[[], None]) -> httpx2.Response:
        """The server's answer to a body. Raises openai.APIStatusError, and what the transport raises."""
        # extra_json is not sent with a content of our own: it carries what is the transport's alone
        options = self._chat[1].model_copy(update={"content": body, "extra_json": {"name": key, "free": free}})
        return await self.request(httpx2.Response, options)

    def _build_request(self, options: Any, *, retries_taken: int = 0) -> httpx2.Request:
        if options.content is None:
            return super()._build_request(options, retries_taken=retries_taken)
        return httpx2.Request("POST", self._chat[0], content=options.content, extensions=options.extra_json)

    async def _send_request(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        response = await self._client._transport.handle_async_request(request)  # no cookies, redirects or auth to mind
        response.request = request
        return response


class _Transport(httpx2.AsyncBaseTransport):
    """Our own HTTP beneath the openai client: a third of what a general one costs a request.

    It sends a body to one address, whatever the request names, with headers of its own: what the openai client takes
    from the environment (organisation, project, extra headers) and tells about the machine goes nowhere.
    """

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        self._url, self._limits = url, limits
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a bound on bytes must bound what they unpack to
            "Content-Type": "application/json",
            "User-Agent": "zephyr",
        }
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._http = Http(url, headers, limits.connect_seconds, limits.total_seconds, limits.response_bytes)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        known, path = request.extensions, request.url.raw_path.decode()
        name, free = known.get("name", ""), known.get("free", _nothing)
        try:
            response = await self._http.request(request.method, path, request.content, name, free)
            await asyncio.sleep(0)  # the requests that this one made room for go first
        except NotConnected as error:
            raise Again("connection", f"{self._url}: no connection: {error}") from None
        except TimeoutError:
            raise Again("timed_out", f"{self._url}: no answer in time.", billed=True) from None
        except ssl.SSLError as error:
            raise UserError(
                f"{self._url}: no secure connection: {reason(error)} Check the address, or name its "
                "authority in SSL_CERT_FILE."
            ) from None
        except BadResponse as error:
            raise Again("bad_reply", f"{self._url}: a broken answer: {error}", billed=True) from None
        except TooLarge:
            bound = self._limits.response_bytes
            raise Again("too_large", f"{self._url}: an answer of more than {bound:,} bytes.", billed=True) from None
        except Broken as error:
            raise Again("connection", f"{self._url}: the connection broke: {error}", billed=True) from None
        headers = {name: response.headers[name] for name in _KEPT if name in response.headers}
        return httpx2.Response(response.status, headers=httpx2.Headers(headers, "latin-1"), content=response.content)

    async def aclose(self) -> None:
        self._http.close()


def _nothing() -> None:
    pass


_ANYWHERE = "http://server"
_KEPT = ("retry-after", "date", "location")


def _text(message: dict[str, Any]) -> str:
    """The text of a message; "" where all of a completion went into what is not shown."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError
    return content


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds from a Retry-After header: a number, or a date, which is counted from the server's own clock."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    try:
        now = email.utils.parsedate_to_datetime(headers.get("date") or "").timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return max(0.0, then - now)
