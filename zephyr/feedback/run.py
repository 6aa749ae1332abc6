"""AI feedback from beginning to end: prompts, completions, judgements, records, the report.

The result depends on the prompts, the settings and the answers; never on the order in which they came, how many were
asked at once, or how often a run was killed. All that is kept of a run under way is the ledger: a run that goes on
takes every prompt from the beginning, and finds there what has been answered.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from zephyr.command import interruptible
from zephyr.errors import UserError, reason
from zephyr.feedback.client import Client
from zephyr.feedback.dispatch import BudgetSpent
from zephyr.feedback.draw import Drawn, draw, load_principles, with_system
from zephyr.feedback.judge import CRITIQUE, Ask, aspect_asks, critique_asks, load_rubrics
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Budget, Endpoint, Model
from zephyr.feedback.progress import Shown
from zephyr.feedback.prompts import Prompt, Prompts
from zephyr.feedback.rating import shown as one_line
from zephyr.feedback.record import Made, Recorded, Told, record, usable
from zephyr.feedback.replay import as_recorded, holding
from zephyr.feedback.report import Account
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.settings import Feedback, listed, parse
from zephyr.redact import redact

FILES = ("feedback.jsonl", "failures.jsonl")
_AHEAD = 2  # times the requests that may be in flight: so many wait or fly, so that budgets end with finished prompts
_HELD = 32  # times the same: prompts that wait for an earlier one, so as to be written in order
_SOONEST, _FEW = 50, 200  # requests: before these none is too many failed; before those the share is one of _FEW
_LATEST = 1_000  # requests that the share is one of: what an earlier run was answered must not hide what fails now


class Result(NamedTuple):
    """What became of a prompt, with the prompt; None where the budget did not reach."""

    prompt: Prompt
    recorded: Recorded | None


def run(config: dict[str, Any]) -> None:
    """The command. Raises UserError, Stopped."""
    config = {**config, "models": listed(config["models"])}  # as it is kept, whatever becomes of the file
    settings = parse(config)
    prompts = Prompts(settings.prompts, settings.limit, settings.bad_rows)
    collector = Collector(settings)
    output = Path(settings.output).expanduser()
    for said in collector.warnings:
        print(f"Note: {said}", file=sys.stderr)
    if settings.dry_run:
        from zephyr.feedback.estimate import estimate

        print(estimate(settings, collector, prompts, output / "ledger.sqlite"))
        return
    for endpoint in _endpoints(collector.pool):
        endpoint.key()
    with _disk(output):
        output.mkdir(parents=True, exist_ok=True)
        with Ledger(output / "ledger.sqlite") as ledger:
            _said(output / "config.json", config, redact(collector.deciding))
            total = sum(1 for _ in prompts)  # mistakes in the file are met before anything is sent
            if prompts.bad:
                print(f"Note: {prompts.bad:,} rows are left out, the first: {prompts.named[0]}", file=sys.stderr)
            print(_run(config, settings, collector, prompts, total, output, ledger))


def _run(
    config: dict[str, Any],
    settings: Feedback,
    collector: "Collector",
    prompts: Prompts,
    total: int,
    output: Path,
    ledger: Ledger,
) -> str:
    """The last line that is printed."""
    started = time.monotonic()
    account = Account()
    with _whole([output / name for name in FILES]) as (feedback, failures):

        def write(result: Result) -> None:
            account.add(result.prompt.source, result.recorded)
            if result.recorded is not None:
                for file, rows in ((feedback, [result.recorded.row]), (failures, result.recorded.failures)):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row is not None)

        with Shown(total, settings, redact(config), output) as shown:
            client = asyncio.run(interruptible(collector.collect(prompts, ledger, write, shown)))
            report = account.report(
                redact(config), prompts, client, ledger,
                second=settings.judge.second, seconds=time.monotonic() - started,
            )  # fmt: skip
            shown.summary(report)
    with _whole([output / "report.json"]) as (file,):
        file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return account.told(report, shown.spent, output)


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

        async def one(prompt: Prompt) -> Result:
            try:
                result = Result(prompt, await self._recorded(prompt, asker, watch))
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
                    write(await window.popleft())
            while window:
                write(await window.popleft())
        return client

    async def _recorded(self, prompt: Prompt, asker: "_Asker", watch: "_Watch") -> Recorded:
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
        return recorded


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
            common = "; ".join(f"{n} {cause} ({self.examples[cause]})" for cause, n in self.causes.most_common(3) if n)
            raise UserError(
                f"{failed} of the latest {number} requests ended without an answer that can be used, more than "
                f"max_failures={self.allowed:g}: {common}. Mend that, or raise max_failures; what has been answered is "
                "kept."
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


@contextmanager
def _whole(paths: Sequence[Path]) -> Iterator[Sequence[IO[str]]]:
    """Files to write to, which get their names at the end, when they are on the disk; PATH.partial until then."""
    partial = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in partial]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for old, new in zip(partial, paths, strict=True):
            old.replace(new)
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        mend = "Make room or give another output, then run again: what has been answered is kept."
        raise UserError(f"output: {output} cannot be written: {error.strerror or reason(error)}. {mend}") from error


def _said(path: Path, config: dict[str, Any], deciding: dict[str, Any]) -> None:
    """Keep what requests depend on, and say what of it an earlier run in this folder had otherwise."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["requests"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = deciding
    others = [name for name, value in deciding.items() if earlier.get(name) != value]
    if others:
        print(
            f"Note: {path.parent} was begun with other {', '.join(others)}. Requests that are the same are not asked "
            "again; the others are, and the files will hold this run's.",
            file=sys.stderr,
        )
    with _whole([path]) as (file,):
        file.write(json.dumps({"requests": deciding, "config": redact(config)}, indent=1, ensure_ascii=False) + "\n")


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
    for endpoint in _endpoints(pool):
        endpoint.check()  # before a file says where it is
    return pool, warnings


def _endpoints(pool: Sequence[Model]) -> set[Endpoint]:
    return {server for model in pool for server in model.servers if isinstance(server, Endpoint)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
