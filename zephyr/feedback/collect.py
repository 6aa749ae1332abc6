"""What is asked for each prompt, and the asking of it: many prompts at once, their records in order."""

import asyncio
import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import BudgetSpent
from zephyr.feedback.draw import Drawn, draw, load_principles, with_system
from zephyr.feedback.judge import CRITIQUE, Ask, aspect_asks, critique_asks, load_rubrics
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Model
from zephyr.feedback.progress import Shown
from zephyr.feedback.prompts import Prompt
from zephyr.feedback.rating import shown as one_line
from zephyr.feedback.record import Made, Recorded, Told, record, usable
from zephyr.feedback.replay import as_recorded, holding
from zephyr.feedback.report import named
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.server import Endpoint
from zephyr.feedback.settings import Feedback

_AHEAD = 2  # times the requests that may be in flight: so many wait or fly, so that budgets end with finished prompts
_HELD = 32  # times the same: prompts that wait for an earlier one, so as to be written in order
_SOONEST, _FEW = 50, 200  # requests: before these none is too many failed; before those the share is one of _FEW
_LATEST = 1_000  # requests that the share is one of: what an earlier run was answered must not hide what fails now


class Result(NamedTuple):
    """What became of a prompt, with the prompt; None where the budget did not reach."""

    prompt: Prompt
    recorded: Recorded | None
    paid: Mapping[str, float] = {}  # USD of its completions, by request


class Collector:
    """What of the settings decides a prompt's requests, and the asking. Raises UserError for what cannot be used."""

    def __init__(self, settings: Feedback) -> None:
        self.settings = settings
        self.principles = load_principles(_path(settings.principles))
        self.rubrics = load_rubrics(_path(settings.judge.rubrics))
        self.sampling = {model.name: model.sampling for model in settings.models}
        self.pool, self.warnings = _pool(settings)
        self._answering = {model.name: model for model in self.pool if model.name in self.sampling}
        names = [model.name for model in settings.models]
        draw("", None, names, self.principles, settings.seed, settings.completions)  # says what is wrong with it
        if settings.completions < 2:
            raise UserError(f"completions={settings.completions}: a preference needs at least 2 completions a prompt.")

    @property
    def deciding(self) -> dict[str, Any]:
        """What requests depend on, as JSON values."""
        settings, judge = self.settings, self.settings.judge
        values = {
            "seed": settings.seed,
            "models": [{"name": model.name, **model.sampling} for model in settings.models],
            "completions": settings.completions,
            "principles": _digest([self.principles.wordings, self.principles.mixtures]),
            "judge": {"model": judge.backend.name, "structured": judge.backend.structured, **judge.backend.sampling},
            "rubrics": _digest([[rubric.aspect, rubric.text] for rubric in self.rubrics.values()]),
        }
        return json.loads(json.dumps(values))

    def completion_requests(self, prompt: Prompt) -> list[tuple[Drawn, Request]]:
        """Who answers the prompt, and what each is asked. Fewer than wanted where files do not hold more."""
        settings, last = self.settings, prompt.messages[-1]["content"]
        names = holding(self._answering.values(), last)
        count = min(settings.completions, len(names))
        drawn = draw(prompt.text, prompt.source, names, self.principles, settings.seed, count)
        drawn = [as_recorded(self._answering, last, one) for one in drawn]
        return [
            (one, Request(one.model, with_system(prompt.messages, one.system), self.sampling[one.model]))
            for one in drawn
        ]

    def judge_requests(self, prompt: str, texts: dict[int, str]) -> tuple[list[list[Ask]], list[Ask]]:
        """The requests for the aspects, by judgement, and those for critiques."""
        settings, judge = self.settings, self.settings.judge
        name, sampling, structured = judge.backend.name, judge.backend.sampling, judge.backend.structured
        aspects = [
            aspect_asks(
                name, sampling, self.rubrics, prompt, texts, settings.seed, structured=structured, judgement=number
            )
            for number in range(1 + judge.second)
        ]
        critiques = critique_asks(name, sampling, self.rubrics, prompt, texts, structured=structured)
        return aspects, critiques if judge.critique else []

    async def collect(self, prompts: Iterable[Prompt], ledger: Ledger, write: Any, shown: Shown) -> Client:
        """Ask everything; `write` is called with each prompt's Result, in their order. The client, which has been left.

        Raises UserError, also where too large a share of requests ends without an answer that can be used.
        """
        settings = self.settings
        watch = _Watch(settings.max_failures)
        window: deque[asyncio.Task[Result]] = deque()
        budget = Budget(settings.max_cost, settings.max_requests)
        counted: set[int] = set()  # completions whose cost a record holds

        def done(result: Result) -> None:
            _count_once(result, counted)
            write(result)

        async def one(prompt: Prompt) -> Result:
            try:
                result = await self._result(prompt, asker, watch)
                shown.done += 1
                return result
            except BudgetSpent as error:
                shown.spent = str(error)
                return Result(prompt, None)

        async with (
            _ungrouped(),
            Client(self.pool, ledger, settings.limits, budget) as client,
            shown.beside(client),
            asyncio.TaskGroup() as group,
        ):
            asker = _Asker(client, _AHEAD * client.limits.concurrency)
            for prompt in prompts:
                await asker.room()
                window.append(group.create_task(one(prompt)))
                while window and (window[0].done() or len(window) > _HELD * client.limits.concurrency):
                    done(await window.popleft())
            while window:
                done(await window.popleft())
        return client

    async def _result(self, prompt: Prompt, asker: "_Asker", watch: "_Watch") -> Result:
        asked = self.completion_requests(prompt)

        async def made_of(drawn: Drawn, request: Request) -> Made:
            made = Made(drawn, await asker.ask(request))
            cause = made.reply.cause if isinstance(made.reply, Failure) else "empty_response"
            detail = made.reply.detail if isinstance(made.reply, Failure) else f"of {drawn.model}"
            watch.ended(None if usable([made]) else cause, detail)
            return made

        made = await asyncio.gather(*(made_of(*one) for one in asked))
        texts = usable(made)
        told: list[Told] = []
        if len(texts) > 1:
            aspects, critiques = self.judge_requests(prompt.text, texts)
            parts = await asyncio.gather(_told(asker, critiques), *(_ahead(asker, asks) for asks in aspects))
            told = [one for part in parts for one in part]
        recorded = record(prompt.text, prompt.source or "unknown", made, told, self.rubrics)
        if recorded.row is not None and len(prompt.messages) > 1:
            recorded.row["prompt"] = list(prompt.messages)  # that pairs are made of, in place of the text of all turns
        _judged(recorded, made, told, watch)
        replies = {request.key: one.reply for (_, request), one in zip(asked, made, strict=True)}
        return Result(prompt, recorded, {k: r.cost for k, r in replies.items() if isinstance(r, Reply) and r.cost})


def _count_once(result: Result, counted: set[int]) -> None:
    """Two prompts can share a completion, where a system prompt in one is the principle of the other: it was paid for
    once, and its cost stands in the first record that holds it."""
    row = result.recorded and result.recorded.row
    if row is None or row["cost"] is None:
        return
    costs = {int(key[:16], 16): cost for key, cost in result.paid.items()}  # 64 bits of each: a million prompts' fit
    if again := [cost for mark, cost in costs.items() if mark in counted]:
        row["cost"] = math.fsum([row["cost"], *(-cost for cost in again)])
    counted.update(costs)


class _Watch:
    """Stops the run where too large a share of the latest requests ends without an answer that can be used."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed
        self.latest: deque[str | None] = deque()  # why each failed; None where it did not
        self.causes: Counter[str] = Counter()  # of these
        self.examples: dict[str, str] = {}

    def ended(self, cause: str | None, detail: str = "") -> None:
        self.latest.append(cause)
        if len(self.latest) > _LATEST and (before := self.latest.popleft()):
            self.causes[before] -= 1
        if cause is None:
            return
        self.causes[cause] += 1
        self.examples.setdefault(cause, detail)
        failed, number = self.causes.total(), len(self.latest)
        if number >= _SOONEST and failed > self.allowed * max(number, _FEW):
            raise UserError(
                f"{failed} of the latest {number} requests ended without an answer that can be used, more than "
                f"max_failures={self.allowed:g}: {named(self.causes, self.examples)}. Mend that, or raise "
                "max_failures; what has been answered is kept."
            )


def _judged(recorded: Recorded, made: Sequence[Made], told: Sequence[Told], watch: _Watch) -> None:
    """Judgements count as requests: one whose reply says nothing of one text or more has failed."""
    failures: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in recorded.failures:
        if row["stage"] == "judge":
            about = row["model"] if row["aspect"] == CRITIQUE else None
            failures.setdefault((row["aspect"], row["judgement"], about), row)
    for ask, reply in told:
        about = made[ask.order[0]].drawn.model if ask.aspect == CRITIQUE else None
        failed = failures.get((ask.aspect, ask.judgement, about))
        if failed is None:
            watch.ended(None)
            continue
        wrote = f"; the judge wrote {one_line(reply.text)!r}" if isinstance(reply, Reply) else ""
        watch.ended(failed["cause"], f"{ask.aspect}: {failed['detail']}{wrote}")


class _Asker:
    """The client, with a bound on what is asked of it at once."""

    def __init__(self, client: Client, bound: int) -> None:
        self._client, self._bound = client, bound
        self._open = 0
        self._less = asyncio.Event()

    async def ask(self, request: Request) -> Reply | Failure:
        self._open += 1
        try:
            return await self._client.ask(request)
        finally:
            self._open -= 1
            self._less.set()

    async def room(self) -> None:
        """Returns when another prompt may be begun."""
        await asyncio.sleep(0)  # the one before begins to ask
        while self._open >= self._bound:
            self._less.clear()
            await self._less.wait()


async def _told(asker: _Asker, asks: Sequence[Ask]) -> list[Told]:
    replies: list[Reply | Failure] = await asyncio.gather(*(asker.ask(ask.request) for ask in asks))
    return list(zip(asks, replies, strict=True))


async def _ahead(asker: _Asker, asks: Sequence[Ask]) -> list[Told]:
    """The first request ahead of the others, which then find what they share in the server's cache."""
    return [*await _told(asker, asks[:1]), *await _told(asker, asks[1:])]


@asynccontextmanager
async def _ungrouped() -> AsyncIterator[None]:
    """Of several errors at once the first that says something to the user, alone."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(error: BaseException) -> BaseException:
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [_first(one) for one in error.exceptions]
    return next((one for one in inner if isinstance(one, UserError)), inner[0])


def _pool(settings: Feedback) -> tuple[list[Model], list[str]]:
    """The client's models, the judge among them, and what is odd."""
    pool = [model.pooled() for model in settings.models]
    judge = settings.judge.backend.pooled()
    warnings = []
    for number, model in enumerate(pool):
        if model.name == judge.name and model != judge:
            raise UserError(
                f"models[{number}] and the judge are both named {judge.name!r} and differ otherwise. Name the model "
                "apart; its key `model` says what the servers call it."
            )
        if model.served_as == judge.served_as and (model == judge or set(model.servers) & set(judge.servers)):
            warnings.append(f"the judge {judge.name!r} rates its own answers too: it is models[{number}].")
    pool = pool if judge in pool else [*pool, judge]
    for endpoint in endpoints(pool):
        endpoint.check()  # before a file says where it is
    return pool, warnings


def endpoints(pool: Sequence[Model]) -> set[Endpoint]:
    """The servers among what answers."""
    return {server for model in pool for server in model.servers if isinstance(server, Endpoint)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
