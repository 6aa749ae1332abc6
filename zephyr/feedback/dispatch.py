"""Which request is sent when, and to which server: concurrency, rates, rests, and the budget.

Requests of a model wait in a queue. Whenever something changes (one arrives, one ends, a rest is over) the oldest that
any server can take is given to the least loaded one. Nothing here waits or talks; the client does.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from zephyr.feedback.pool import Answering, Budget, Limits, Model, Source
from zephyr.feedback.server import Again

_OPENS = 8  # failures in a row after which a server is left alone: of one that fails three times in ten they are rare


class BudgetSpent(Exception):
    """The budget has no room for another request. What had been sent is recorded."""


class Bucket:
    """A token bucket: `per_minute` of something, of which a second's worth may come at once."""

    def __init__(self, per_minute: float | None) -> None:
        self.rate = (per_minute or math.inf) / 60
        self.capacity = max(1.0, self.rate)
        self.level = self.capacity
        self.at = 0.0

    def ready(self, now: float, amount: float) -> float:
        """When `amount` may be taken. More than fits is taken from a full bucket, which then owes it."""
        if self.rate == math.inf:
            return now
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now
        return now + max(0.0, min(amount, self.capacity) - self.level) / self.rate

    def take(self, amount: float) -> None:
        """Take what `ready` said may be taken, or give back with a negative amount."""
        if self.rate != math.inf:
            self.level = min(self.capacity, self.level - amount)


@dataclass
class Lane:
    """What is known of a server: its load, its rates, how it has been doing."""

    server: Answering
    limits: Limits
    in_flight: int = 0
    window: int = 0  # requests that it may have in flight now: cut by 429, found again by answers
    rests_until: float = 0.0
    cut_at: float = -math.inf
    failures: int = 0  # in a row
    rests: int = 0  # the same
    silent_since: float | None = None  # the first failure since it last answered
    last: str = ""  # what it said then

    def __post_init__(self) -> None:
        endpoint = self.server.endpoint
        self.window = endpoint.concurrency
        self.requests, self.tokens = Bucket(endpoint.requests_per_minute), Bucket(endpoint.tokens_per_minute)

    def ready(self, now: float, tokens: float) -> float:
        """When it can take a request; infinity while it has as many as it may."""
        if self.in_flight >= self.window:
            return math.inf
        if self.rests_until <= now and self.requests.rate == self.tokens.rate == math.inf:
            return now
        return max(self.rests_until, self.requests.ready(now, 1), self.tokens.ready(now, tokens))

    def answered(self) -> None:
        """It answered, if only to refuse: what is wrong is not the server."""
        self.failures, self.rests, self.silent_since = 0, 0, None
        self.window = min(self.server.endpoint.concurrency, self.window + 1)

    def failed(self, error: Again, sent: float, now: float) -> None:
        """It did not. After a 429, or one failure too many, it is left alone, then tried with few requests."""
        if error.cause in ("bad_reply", "too_large", "wrong_model"):
            self.answered()  # it works; what it says is another matter
            return
        self.failures += 1
        self.last = error.detail
        self.silent_since = now if self.silent_since is None else self.silent_since
        limited = error.cause == "rate_limited"
        new = sent >= self.cut_at  # one cut, and one rest, for all requests that were under way when it came
        rest = error.after
        if rest is None and new and (limited or self.failures >= _OPENS):
            rest = self.limits.backoff * 2.0 ** min(self.rests, 16)
        if rest is None:
            return
        if new:
            self.rests += 1
            self.window = max(1, self.in_flight // 2) if limited else 1
            self.cut_at = now
        self.rests_until = max(self.rests_until, now + min(rest, self.limits.longest_wait))


@dataclass
class Purse:
    """What of the budget is gone, and what requests in flight may still take."""

    budget: Budget
    cost: float = 0.0  # USD, spent
    requests: int = 0  # sent
    reserved: float = 0.0  # USD, the most that requests in flight can cost

    def holds(self, most: float) -> bool:
        """Room for one more request that costs at most `most` USD."""
        limit = self.budget.max_cost
        return limit is None or self.cost + self.reserved + most <= limit

    @property
    def sent_all(self) -> bool:
        """As many requests have been sent as may be."""
        return self.budget.max_requests is not None and self.requests >= self.budget.max_requests

    def spent(self, most: float) -> BudgetSpent:
        """Why the next request, of `most` USD, is not sent."""
        if self.sent_all:
            return BudgetSpent(f"max_requests={self.budget.max_requests} requests have been sent")
        limit = f"max_cost={self.budget.max_cost} USD"
        return BudgetSpent(f"{limit}: {self.cost:.6f} are spent, and the next request may cost {most:.6f}")


@dataclass(eq=False)
class Slot:
    """What a request under way holds: a place at a server until its answer is in, and what has been set aside for it
    until it is known what the answer took."""

    lane: Lane
    tokens: float
    most: float  # USD
    in_flight: bool = True


@dataclass(order=True)
class _Waiting:
    number: int
    tokens: float = field(compare=False)
    most: float = field(compare=False)
    slot: "asyncio.Future[Slot]" = field(compare=False)


class Dispatcher:
    """Queues in front of servers."""

    def __init__(self, pool: Iterable[Model], limits: Limits, purse: Purse, secrets: set[str]) -> None:
        pool = list(pool)
        endpoints: dict[Source, Lane] = {}
        for endpoint in (endpoint for model in pool for endpoint in model.servers):
            if endpoint not in endpoints:
                endpoints[endpoint] = Lane(endpoint.open(limits, secrets), limits)
        self.all = list(endpoints.values())
        self.lanes = {model.name: [endpoints[endpoint] for endpoint in model.servers] for model in pool}
        self._queues: dict[str, deque[_Waiting]] = {model.name: deque() for model in pool}
        self._limits, self._purse = limits, purse
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped: BaseException | None = None
        self.in_flight = 0
        self._unsettled = 0

    async def acquire(self, model: str, tokens: float, most: float) -> Slot:
        """A place at a server that may be sent `tokens` now, for `most` USD at most. Raises what `stop` was given."""
        if self._stopped is not None:
            raise self._stopped.with_traceback(None)
        self._number += 1
        waiting = _Waiting(self._number, tokens, most, asyncio.get_running_loop().create_future())
        self._queues[model].append(waiting)
        self._pump()
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            if waiting.slot.done() and not waiting.slot.cancelled() and waiting.slot.exception() is None:
                self._purse.requests -= 1
                self.release(waiting.slot.result(), 0)
            raise

    def free(self, slot: Slot) -> None:
        """The answer is in, and another request may take its place while it is read."""
        if slot.in_flight:
            slot.in_flight = False
            slot.lane.in_flight -= 1
            self.in_flight -= 1
            self._pump()

    def release(self, slot: Slot, used: float | None) -> None:
        """An attempt is over: of the tokens set aside `used` were needed (None: not known), the rest is free again."""
        self._unsettled -= 1
        self._purse.reserved -= slot.most
        if used is not None:
            slot.lane.tokens.take(used - slot.tokens)
        self.free(slot)
        self._pump()

    def stop(self, error: BaseException) -> None:
        """Give out nothing more; everyone who waits gets the error."""
        self._stopped = self._stopped or error
        for queue in self._queues.values():
            for waiting in queue:
                if not waiting.slot.done():
                    waiting.slot.set_exception(self._stopped)
            queue.clear()
        if self._timer:
            self._timer.cancel()

    def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        while self._stopped is None and self.in_flight < self._limits.concurrency:
            now, soonest = loop.time(), math.inf
            chosen: tuple[_Waiting, Lane, str] | None = None
            for model, queue in self._queues.items():
                while queue and queue[0].slot.done():  # its asker has gone
                    queue.popleft()
                if not queue or (chosen and chosen[0] < queue[0]):
                    continue
                lane, when = self._least_loaded(model, now, queue[0].tokens)
                if when <= now:
                    chosen = (queue[0], lane, model)
                else:
                    soonest = min(soonest, when)
            if chosen is None:
                self._wake(loop, soonest)
                return
            waiting, lane, model = chosen
            if self._purse.sent_all:
                self.stop(self._purse.spent(waiting.most))
                return
            if not self._purse.holds(waiting.most):
                if self._unsettled == 0:
                    self.stop(self._purse.spent(waiting.most))
                return  # when one comes back cheaper than it might have been, there may be room
            self._queues[model].popleft()
            lane.in_flight += 1
            self.in_flight += 1
            self._unsettled += 1
            self._purse.requests += 1
            self._purse.reserved += waiting.most
            lane.requests.take(1)
            lane.tokens.take(waiting.tokens)
            waiting.slot.set_result(Slot(lane, waiting.tokens, waiting.most))

    def _least_loaded(self, model: str, now: float, tokens: float) -> tuple[Lane, float]:
        """The server to take, and when it can be."""
        when = [
            (max(lane.ready(now, tokens), now), lane.in_flight / lane.window, n)
            for n, lane in enumerate(self.lanes[model])
        ]
        first = min(when)
        return self.lanes[model][first[2]], first[0]

    def _wake(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._pump) if when < math.inf else None
