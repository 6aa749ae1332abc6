"""What a run would take: requests, tokens, cost and time, without what the ledger holds already. Nothing is sent.

A prompt's tokens are its bytes divided by four. A completion has as many tokens as the model's have had on average in
the ledger, else a typical number; at most as many as it may. One that a file holds is a request without tokens, cost
or time. Servers' prefix caches and retries are left out: the one makes it cheaper, the other dearer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from zephyr.feedback.collect import Collector
from zephyr.feedback.judge import CRITIQUE
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Model, Source
from zephyr.feedback.prompts import Prompt
from zephyr.feedback.record import Made, usable
from zephyr.feedback.replay import held, replayed
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.settings import Feedback

_BYTES = 4  # of a token, in English
_TYPICAL = 300  # tokens of a completion: UltraFeedback's have 1,300 in four
_RATING, _CRITIQUE = 60, 250  # tokens of a judgement for each text, and of a critique
_SPEED, _DELAY = 40.0, 0.5  # tokens a second of one stream, and seconds before the first, where the ledger knows none


@dataclass
class Load:
    """What is to be asked of a model in one role."""

    role: str  # answers, judges
    model: Model
    mean: float | None  # tokens of its completions so far
    seconds: float | None  # that they took
    requests: int = 0
    known: int = 0  # answers in the ledger
    prompt: float = 0.0  # tokens
    completion: float = 0.0
    most_prompt: float = 0.0
    most_completion: float = 0.0

    @property
    def cost(self) -> float:
        """USD to expect."""
        return self.model.price.cost(round(self.prompt), round(self.completion))

    @property
    def most(self) -> float:
        """USD where every completion is as long as it may be."""
        return self.model.price.cost(round(self.most_prompt), round(self.most_completion))

    def add(self, number: int, prompt: float, longest: float, typical: float, limit: int) -> None:
        """So many requests, with tokens of each prompt and completion."""
        self.requests += number
        self.prompt += number * prompt
        self.most_prompt += number * longest
        self.completion += number * min(self.mean or typical, limit)
        self.most_completion += number * limit

    def lasts(self) -> float:
        """Seconds of one server's single stream for all of it."""
        if self.seconds is not None:
            return self.requests * self.seconds
        return self.requests * _DELAY + self.completion / _SPEED


class _Known:
    """Answers of an earlier run, if there is one."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path, read_only=True) if path.exists() else None
        totals = self.ledger.totals() if self.ledger else []
        self.totals = {t.model: t for t in totals if t.cause is None}
        self.requests = sum(t.attempts for t in totals)  # that were sent
        self.cost = sum(t.cost + t.waste for t in totals)  # USD

    def reply(self, model: Model, request: Request) -> Reply | None:
        found = self.ledger.get(model.key(request)) if self.ledger else None
        return found if isinstance(found, Reply) else None

    def load(self, role: str, model: Model) -> Load:
        total = self.totals.get(model.name)
        if replayed(model):
            return Load(role, model, None, 0.0)
        if total is None:
            return Load(role, model, None, None)
        return Load(role, model, total.completion_tokens / total.number or None, total.seconds / total.number)


def estimate(settings: Feedback, collector: Collector, prompts: Iterable[Prompt], path: Path) -> str:
    """The estimate as a table. `path` is that of the ledger, which need not be there."""
    known = _Known(path)
    pool = {model.name: model for model in collector.pool}
    judge = known.load("judges", pool[settings.judge.backend.name])
    loads = {model.name: known.load("answers", pool[model.name]) for model in settings.models}
    empty_aspects, empty_critiques = collector.judge_requests("", dict.fromkeys(range(settings.completions), ""))
    overhead = sum(ask.request.prompt_bytes for ask in empty_aspects[0]) / len(empty_aspects[0]) / _BYTES
    critique = empty_critiques[0].request.prompt_bytes / _BYTES if empty_critiques else 0.0
    limit = empty_aspects[0][0].request.most_completion_tokens
    number = 0
    for prompt in prompts:
        number += 1
        made, expected, most = [], 0.0, 0.0
        for drawn, request in collector.completion_requests(prompt):
            load = loads[drawn.model]
            reply = known.reply(load.model, request)
            if reply is not None:
                load.known += 1
            elif found := held(load.model, prompt.messages[-1]["content"]):
                load.requests += 1
                reply = Reply(found.text, load.model.name, "stop")
            made.append(Made(drawn, reply or Failure("unknown", "")))
            if reply is not None:
                size = len(reply.text.encode()) / _BYTES
                expected, most = expected + size, most + size
                continue
            size, longest = request.prompt_bytes / _BYTES, request.most_completion_tokens
            load.add(1, size, size, _TYPICAL, longest)
            expected += min(load.mean or _TYPICAL, longest)
            most += longest
        if all(isinstance(one.reply, Reply) for one in made):
            _judging(collector, prompt, usable(made), known, judge)
            continue
        asked, size = len(made), len(prompt.text.encode()) / _BYTES
        aspects = sum(map(len, empty_aspects))
        judge.add(aspects, overhead + size + expected, overhead + size + most, _RATING * asked, limit)
        if empty_critiques:
            start = critique + size
            judge.add(asked, start + expected / asked, start + most / asked, _CRITIQUE, limit)
    used = [load for load in [*loads.values(), judge] if load.requests or load.known]
    return _table(settings, number, used, known)


def _judging(collector: Collector, prompt: Prompt, texts: dict[int, str], known: _Known, judge: Load) -> None:
    """All completions are there, so what the judge is asked is known as well."""
    if len(texts) < 2:
        return
    aspects, critiques = collector.judge_requests(prompt.text, texts)
    for ask in [*(ask for asks in aspects for ask in asks), *critiques]:
        if known.reply(judge.model, ask.request) is not None:
            judge.known += 1
            continue
        size = ask.request.prompt_bytes / _BYTES
        typical = _CRITIQUE if ask.aspect == CRITIQUE else _RATING * len(texts)
        judge.add(1, size, size, typical, ask.request.most_completion_tokens)


def _table(settings: Feedback, prompts: int, loads: list[Load], known: _Known) -> str:
    head = ("model", "", "requests", "answered", "prompt", "completion", "USD", "at most")
    total = [sum(getattr(load, name) for load in loads) for name in _COLUMNS]
    rows: list[tuple[str, ...]] = [head]
    rows += [(load.model.name, load.role, *_figures([getattr(load, name) for name in _COLUMNS])) for load in loads]
    rows.append(("all", "", *_figures(total)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    seconds, why = _seconds(settings, loads)
    measured = any(load.mean is not None for load in loads)
    length = "completions as long as those in the ledger, else" if measured else "completions of"
    return "\n".join(
        [
            f"{prompts:,} prompts; what is still to be asked, in tokens and USD:",
            *lines,
            f"time: about {timedelta(seconds=round(seconds))}, {why}",
            f"assumed: {_BYTES} bytes a token; {length} {_TYPICAL} tokens, judgements of {_RATING} a text, critiques "
            f"of {_CRITIQUE}; no prefix cache, no retries. At most: each completion as long as it may be (max_tokens).",
            *_budget(settings, total, known),
        ]
    )


_COLUMNS = ("requests", "known", "prompt", "completion", "cost", "most")


def _figures(values: list[float]) -> list[str]:
    return [f"{value:,.0f}" for value in values[:4]] + [f"{value:,.2f}" for value in values[4:]]


def _budget(settings: Feedback, total: list[float], known: _Known) -> list[str]:
    lines = []
    if settings.max_requests is not None and known.requests + total[0] > settings.max_requests:
        lines.append(f"max_requests={settings.max_requests:,} will stop it before its end.")
    if settings.max_cost is not None and known.cost + total[4] > settings.max_cost:
        lines.append(f"max_cost={settings.max_cost:g} will stop it before its end.")
    return lines


def _seconds(settings: Feedback, loads: list[Load]) -> tuple[float, str]:
    """How long it takes, and what decides that: the slowest server, its rates, or how much may be in flight."""
    streams: dict[Source, float] = {}
    requests: dict[Source, float] = {}
    tokens: dict[Source, float] = {}
    for load in loads:
        for server in load.model.servers:
            share = 1 / len(load.model.servers)
            streams[server] = streams.get(server, 0.0) + load.lasts() * share
            requests[server] = requests.get(server, 0.0) + load.requests * share
            tokens[server] = tokens.get(server, 0.0) + (load.prompt + load.completion) * share
    known = all(load.seconds is not None for load in loads)
    speed = "by the ledger's times" if known else f"at {_SPEED:g} tokens/s a request where the ledger has no times"
    together = settings.limits.concurrency
    found = [(sum(streams.values()) / together, f"{speed}, limits.concurrency={together} in flight")]
    for server in streams:
        found.append((streams[server] / server.concurrency, f"{speed}, concurrency={server.concurrency} at a server"))
        for rate, amount in (("requests_per_minute", requests[server]), ("tokens_per_minute", tokens[server])):
            if (bound := getattr(server, rate)) is not None:
                found.append((60 * amount / bound, f"by {rate}={bound:g} of a server"))
    return max(found, key=lambda one: one[0])
