"""How far a run is: a panel on a terminal, else a plain line on standard error every half minute; and W&B's panels."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from zephyr.feedback.client import Client
from zephyr.feedback.settings import Feedback
from zephyr.progress import Lines

_REFRESH = 0.5  # seconds
_SAMPLES = 60  # refreshes that rates are taken over
_LOGGED = 20  # refreshes between two points of W&B's panels


class Shown(Lines):
    """The figures of a run. `done` prompts are counted by whoever has done them."""

    def __init__(
        self,
        total: int,
        settings: Feedback,
        config: dict[str, Any],  # without secrets
        output: Path,
        console: Console | None = None,
        seconds: float = 30.0,
    ) -> None:
        super().__init__(console, seconds)
        self.total, self.done = total, 0
        self.spent: str | None = None  # what of the budget is
        self._settings, self._config, self._output = settings, config, output
        self._samples = deque([(0.0, 0, 0)], maxlen=_SAMPLES)  # seconds, requests and tokens until then
        self._replayed = (0.0, 0)  # seconds and prompts done when the first request was sent
        self._live: Live | None = None
        self._run: Any = None

    def __enter__(self) -> "Shown":
        if (wandb := self._settings.logger) is not None:
            from zephyr.observe.weights_and_biases import start

            self._run = start(self._output, self._config, wandb.project, wandb.name, wandb.group, wandb.tags)
        if self.console.is_interactive:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)

    @asynccontextmanager
    async def beside(self, client: Client) -> AsyncIterator[None]:
        """Show the client's figures while what is inside works."""
        task = asyncio.create_task(self._follow(client))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._log(client)

    async def _follow(self, client: Client) -> None:
        refreshes = 0
        while True:
            await asyncio.sleep(_REFRESH)
            refreshes += 1
            self._samples.append((self.elapsed, client.tally.sent, _tokens(client)))
            if client.tally.sent == 0:
                self._replayed = (self.elapsed, self.done)
            if self._live is not None:
                self._live.update(_panel(self.figures(client)), refresh=True)
            elif self.due():
                self.say("  ".join(f"{name} {value}" for name, value in self.figures(client).items()))
            if refreshes % _LOGGED == 0:
                self._log(client)

    def figures(self, client: Client) -> dict[str, str]:
        """What is shown, in words."""
        tally = client.tally
        requests, tokens = self._rates(client)
        seconds, done = self.elapsed - self._replayed[0], self.done - self._replayed[1]
        left = seconds * (self.total - self.done) / done if done else None
        shown = {
            "prompts": f"{self.done:,}/{self.total:,}",
            "requests/s": f"{requests:,.1f}",
            "tokens/s": f"{tokens:,.0f}",
            "in flight": f"{client.in_flight}",
            "cost": f"{tally.cost + tally.waste:.4f} USD",
            "failures": _counted(tally.failures),
            "retries": _counted(tally.retries),
            "ETA": "?" if left is None else f"{timedelta(seconds=round(left))}",
        }
        return {name: value for name, value in shown.items() if value}

    def _rates(self, client: Client) -> tuple[float, float]:
        """Requests and tokens a second, of the last half minute."""
        since, requests, tokens = self._samples[0]
        seconds = max(self.elapsed - since, 1e-9)
        return (client.tally.sent - requests) / seconds, (_tokens(client) - tokens) / seconds

    def summary(self, report: dict[str, Any]) -> None:
        """The report's figures as those of the W&B run."""
        if self._run is not None:
            self._run.summary.update(
                {name: value for name, value in report.items() if name not in ("config", "bad_rows")}
            )

    def _log(self, client: Client) -> None:
        if self._run is None:
            return
        tally = client.tally
        requests, tokens = self._rates(client)
        values = {
            "prompts": self.done,
            "requests": tally.sent,
            "requests_per_second": requests,
            "tokens_per_second": tokens,
            "in_flight": client.in_flight,
            "cost": tally.cost + tally.waste,
        }
        for kind, counts in (("failures", tally.failures), ("retries", tally.retries)):
            values |= {f"{kind}/{cause}": number for cause, number in counts.items()}
        self._run.log(values)


def _tokens(client: Client) -> int:
    return client.tally.prompt_tokens + client.tally.completion_tokens


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {cause}" for cause, number in counts.most_common())


def _panel(figures: dict[str, str]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, value in figures.items():
        table.add_row(f"[dim]{name}", value)
    return Panel(table, title="feedback", expand=False)
