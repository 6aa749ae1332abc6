"""Asking the models of a pool: each request once, through whichever of a model's servers can take it."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from zephyr.errors import UserError
from zephyr.feedback.dispatch import BudgetSpent, Dispatcher, Lane, Purse
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Limits, Model
from zephyr.feedback.request import Failure, Reply, Request, whole
from zephyr.feedback.server import Again, Refused

_COMPLETION_TOKENS = 512  # that a completion without a limit is taken to need, for a server's tokens a minute


@dataclass
class Tally:
    """What this run has done so far."""

    sent: int = 0  # requests, each attempt counted
    replayed: int = 0  # answers found in the ledger
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0  # USD, of replies
    waste: float = 0.0  # USD, at most, of attempts without one
    failures: Counter[str] = field(default_factory=Counter)  # by cause
    retries: Counter[str] = field(default_factory=Counter)  # attempts that failed, by cause


@dataclass
class _Ask:
    """A request under way."""

    request: Request
    model: Model
    key: str  # in the ledger
    body: bytes
    tokens: float  # set aside at a server with tokens a minute
    most: float  # USD
    earlier: int = 0  # attempts, in runs before this one
    wasted: float = 0.0  # USD, at most, in runs before this one
    attempts: int = 0
    faults: int = 0  # attempts that count against it
    waste: float = 0.0
    last: Again | None = None


class _Closed(Exception):
    """The client has been left."""


class Client:
    """`async with Client(pool, ledger, limits, budget) as client: await client.ask(request)`.

    The ledger is the caller's to close, after the client. Raises UserError for a pool that cannot be used: no or two
    models of a name, a model without a server, an address that is none, a key that is not set.
    """

    def __init__(
        self, pool: Sequence[Model], ledger: Ledger, limits: Limits | None = None, budget: Budget | None = None
    ):
        self.limits = limits or Limits()
        self.tally = Tally()
        self._ledger = ledger
        self._models = {model.name: model for model in pool}
        if len(self._models) < len(pool):
            twice = [name for name, number in Counter(model.name for model in pool).items() if number > 1]
            raise UserError(f"the pool has two models named {twice[0]!r}. Name them apart.")
        for model in pool:
            if not model.servers:
                raise UserError(f"model {model.name!r} has no server. Give it a base_url, a path or a replay.")
        budget = budget or Budget()
        if budget.max_cost is not None and all(model.price.prompt == model.price.completion == 0 for model in pool):
            raise UserError("max_cost is set, but no model has a price. Give prices, or use max_requests.")
        totals = ledger.totals()
        self.purse = Purse(budget, sum(t.cost + t.waste for t in totals), sum(t.attempts for t in totals))
        self._dispatcher = Dispatcher(pool, self.limits, self.purse, set())
        self._asking: dict[str, asyncio.Task[Reply | Failure]] = {}
        self._answered: set[str] = set()  # models with a reply in this run
        self._stopped: Exception | None = None
        self._stopping = asyncio.Event()
        self._retrying = AsyncRetrying(
            sleep=self._sleep,
            stop=self._gives_up,
            # Retry-After is honoured by the dispatcher: it speaks of the server, not of the request
            wait=wait_random_exponential(multiplier=self.limits.backoff, max=self.limits.longest_wait),
            retry=retry_if_exception_type(Again),
            reraise=True,
        )

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return self._dispatcher.in_flight

    async def ask(self, request: Request) -> Reply | Failure:
        """The answer, which is on the disk when this returns; from the ledger where it has been given before.

        Equal requests that are asked at the same time are one. Who is cancelled while he waits leaves the request
        under way. Raises BudgetSpent, and UserError when a server can answer nothing until somebody mends something;
        after either nothing more is sent, and every request that is still waiting raises the same.
        """
        model = self._models.get(request.model)
        if model is None:
            raise UserError(f"model {request.model!r} is not in the pool, which has {', '.join(self._models)}.")
        key = model.key(request)
        task = self._asking.get(key)
        if task is None:
            found = self._ledger.get(key)
            if found is not None:
                self.tally.replayed += 1
                return found
            if self._stopped is not None:
                raise self._stopped.with_traceback(None)  # it would grow with everyone who is told
            task = asyncio.create_task(self._answer(self._prepared(request, model, key)))
            self._asking[key] = task
            task.add_done_callback(lambda task: self._done(key, task))
        return await asyncio.shield(task)

    def _done(self, key: str, task: asyncio.Task[Reply | Failure]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more

    async def _answer(self, ask: _Ask) -> Reply | Failure:
        attempts, waste = ask.earlier, ask.wasted = self._ledger.earlier(ask.key)
        completion: dict[str, Any]
        seconds: float
        try:
            try:
                completion, seconds = await self._attempt(ask)
            except Again as error:  # tenacity's loop costs a tenth of a request: only those that need it enter it
                completion, seconds = await self._retrying(self._again, ask, [error])
        except Refused as error:
            outcome: Reply | Failure = Failure(error.cause, str(error), attempts + ask.attempts, waste + ask.waste)
        except (Again, BudgetSpent, UserError, _Closed, asyncio.CancelledError) as error:
            if ask.last is None:
                raise
            outcome = Failure(ask.last.cause, ask.last.detail, attempts + ask.attempts, waste + ask.waste)
            hopeless = isinstance(error, Again) and self._hopeless(ask)
            if hopeless or not isinstance(error, Again):
                self._record(ask, outcome)  # what was sent counts in the next run too
                raise hopeless or error from None
        else:
            outcome = self._reply(ask, completion, seconds, attempts + ask.attempts, waste + ask.waste)
        self._record(ask, outcome)
        if isinstance(outcome, Failure):
            self.tally.failures[outcome.cause] += 1
        else:
            self.tally.replies += 1
        return outcome

    def _record(self, ask: _Ask, outcome: Reply | Failure) -> None:
        try:
            self._ledger.put(ask.key, ask.model.name, outcome)
        except UserError as error:
            self._stop(error)  # nothing more is bought that cannot be kept
            raise

    def _prepared(self, request: Request, model: Model, key: str) -> _Ask:
        body = {"model": model.served_as or model.name, "messages": list(request.messages), **request.parameters}
        if request.schema is not None and model.structured:
            schema = {"name": "reply", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        given = request.parameters.get("max_completion_tokens") or request.parameters.get("max_tokens")
        tokens = request.prompt_bytes / 4 + (given or _COMPLETION_TOKENS)
        most = model.price.cost(request.prompt_bytes, request.most_completion_tokens)
        return _Ask(request, model, key, json.dumps(body).encode(), tokens, most)

    async def _attempt(self, ask: _Ask) -> tuple[dict[str, Any], float]:
        """Send it once. The completion, and the seconds it took."""
        loop = asyncio.get_running_loop()
        slot = await self._dispatcher.acquire(ask.model.name, ask.tokens, ask.most)
        lane, sent, used = slot.lane, loop.time(), None
        ask.attempts += 1
        self.tally.sent += 1
        try:
            self._sending(ask, ask.most)
            free = partial(self._dispatcher.free, slot)
            completion = await lane.server.complete(ask.model, ask.body, ask.request.key, free)
            lane.answered()
            self._answered.add(ask.model.name)
            prompt, answer, cached = _usage(completion)
            if prompt is not None and answer is not None:
                used = prompt + answer
                self.purse.cost += ask.model.price.cost(prompt, answer, cached or 0)
            else:
                self.purse.cost += ask.most
            return completion, loop.time() - sent
        except Again as error:
            ask.last = error
            self._failed(ask, lane, error, sent, loop.time())
            raise
        except Refused:
            lane.answered()
            raise
        except asyncio.CancelledError:
            ask.last = Again("interrupted", "The run was left before an answer came.", billed=True)
            self._charge(ask)
            raise
        except UserError as error:
            self._stop(error)
            self._sending(ask, 0.0)  # it has been refused, which costs nothing
            raise
        finally:
            self._dispatcher.release(slot, used)

    def _sending(self, ask: _Ask, most: float) -> None:
        """Where there is a budget, an attempt stands in the ledger before it goes out: a process that is killed says
        nothing more."""
        if self.purse.budget != Budget():
            waste = ask.wasted + ask.waste + most
            self._ledger.sending(ask.key, ask.model.name, ask.earlier + ask.attempts, waste)

    async def _again(self, ask: _Ask, failed: list[Again]) -> tuple[dict[str, Any], float]:
        """As `_attempt`, after one that failed before the retrying began: so it begins with a wait."""
        if failed:
            raise failed.pop()
        return await self._attempt(ask)

    def _failed(self, ask: _Ask, lane: Lane, error: Again, sent: float, now: float) -> None:
        self.tally.retries[error.cause] += 1
        ask.faults += error.cause != "rate_limited"  # which says nothing about the request
        if error.billed:
            self._charge(ask)
        lane.failed(error, sent, now)
        lanes = self._dispatcher.lanes[ask.model.name]
        silent = [now - lane.silent_since for lane in lanes if lane.silent_since is not None]
        if len(silent) == len(lanes) and min(silent) > self.limits.patience and not self._known(ask, error):
            self._stop(_no_answer(ask.model, lanes, f"in {min(silent):.0f} s"))

    def _charge(self, ask: _Ask) -> None:
        """An attempt without an answer may have cost the most it can."""
        ask.waste += ask.most
        self.tally.waste += ask.most
        self.purse.cost += ask.most

    def _hopeless(self, ask: _Ask) -> UserError | None:
        """Why nothing more is asked, where a request that ran out of attempts says more of the servers than of it."""
        lanes = self._dispatcher.lanes[ask.model.name]
        answered = ask.model.name in self._answered or any(lane.silent_since is None for lane in lanes)
        if answered or self._known(ask, ask.last):
            return None
        self._stop(error := _no_answer(ask.model, lanes, f"in {ask.attempts} attempts"))
        return error

    def _known(self, ask: _Ask, error: Again | None) -> bool:
        """Whether the request ran out of attempts in earlier runs already: then it is what is wrong, not the servers.
        Else a run of which nothing but such a request is left could never end."""
        rate_limited = error is not None and error.cause == "rate_limited"
        return ask.earlier >= self.limits.attempts and not rate_limited

    def _reply(self, ask: _Ask, completion: dict[str, Any], seconds: float, attempts: int, waste: float) -> Reply:
        prompt, answer, cached = _usage(completion)
        cost = None if ask.most else 0.0
        if prompt is not None and answer is not None:
            cost = ask.model.price.cost(prompt, answer, cached or 0)
        elif ask.most:
            waste += ask.most  # nobody says what it cost
            self.tally.waste += ask.most
        self.tally.prompt_tokens += prompt or 0
        self.tally.completion_tokens += answer or 0
        self.tally.cached_tokens += cached or 0
        self.tally.cost += cost or 0.0
        choice = completion["choices"][0]
        reason = "refusal" if choice["message"].get("refusal") else choice.get("finish_reason")
        said = choice["message"]["content"], completion.get("model") or "", reason
        text, model, reason = (whole(str(part)) for part in said)
        extra = json.dumps(choice["logprobs"]) if choice.get("logprobs") else None
        return Reply(text, model, reason, prompt, answer, cached, cost, seconds, attempts, waste, extra)

    def _stop(self, error: Exception) -> None:
        if self._stopped is None:
            self._stopped = error
            self._dispatcher.stop(error)
            self._stopping.set()

    def _gives_up(self, state: RetryCallState) -> bool:
        return state.args[0].faults >= self.limits.attempts

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """What is in flight is paid for, so it is waited for: `drain_seconds`, or to its end after BudgetSpent."""
        self._stop(_Closed())
        group = error if isinstance(error, BaseExceptionGroup) else None
        patient = kind is None or isinstance(error, BudgetSpent) or bool(group and group.subgroup(BudgetSpent))
        try:
            if self._asking:
                await asyncio.wait(self._asking.values(), timeout=None if patient else self.limits.drain_seconds)
        finally:
            tasks = list(self._asking.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for lane in self._dispatcher.all:
                await lane.server.close()


def _usage(completion: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt, of the completion, and of the prompt's those that were cached."""
    usage = completion.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens"), cached]
    prompt, answer, cached = (n if isinstance(n, int) and 0 <= n < 2**53 else None for n in counts)
    return prompt, answer, cached


def _no_answer(model: Model, lanes: Sequence[Lane], how_long: str) -> UserError:
    said = " ".join(sorted({lane.last for lane in lanes}))
    return UserError(
        f"no server of model {model.name!r} has answered {how_long}. {said} "
        "Start it or mend its base_url, then run again: what has been answered is kept."
    )
