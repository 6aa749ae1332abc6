"""A sweep: several runs by one command, each in a folder of its own, and one table of what came of them.

The jobs may run here, one after the other, or elsewhere at the same time (SLURM): what they have to tell each other
is in the sweep's folder. Nothing here knows torch, nor who chooses the values.
"""

import csv
import hashlib
import json
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from zephyr import distributed
from zephyr.errors import Stopped, UserError
from zephyr.launching.launch import JobFailed
from zephyr.redact import redact

ALONE = "run"  # the folder of a job in which nothing varies
_LONGEST = 100  # characters of a name; W&B takes 128
_LOG_SCALED = ("beta", "lr")
_COLUMNS = ("eval/rewards/accuracies", "eval/loss", "eval/rewards/margins", "seconds")
# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")

Direction = Literal["minimize", "maximize"]
Varied = dict[str, str]  # the keys by which the jobs differ, and a job's values


def direction(stage: str) -> Direction:
    """Whether the metric by which runs of a stage are compared is good when low or when high."""
    return "maximize" if stage == "dpo" else "minimize"


def name_of(varied: Varied) -> str:
    """A job's name: `key=value,key=value`, in the order of the keys. What no folder may be called is left out or cut
    off, and a hash tells such names apart."""
    exact = ",".join(f"{key}={varied[key]}" for key in sorted(varied)) or ALONE
    safe = re.sub(r"[^\w.,=+@-]+", "_", exact).lstrip(".")
    if safe == exact and len(safe) <= _LONGEST:
        return safe
    return f"{safe[: _LONGEST - 9]}-{hashlib.blake2b(exact.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Job:
    """What a sweep knows of one of its jobs. `metric` and the rest of its figures are in its folder."""

    name: str
    varied: Varied
    command: str  # the sweep that had it last
    status: Literal["unfinished", "finished", "failed"] = "unfinished"
    message: str = ""  # of a failure


@dataclass(frozen=True)
class Sweep:
    """The jobs of one command, in `folder`; `keys` are those that vary. It can be pickled, for jobs elsewhere."""

    folder: Path
    keys: frozenset[str]
    command: str = field(default_factory=lambda: secrets.token_hex(8))
    home: tuple[str, int] = field(default_factory=lambda: (socket.gethostname(), os.getpid()))

    def expect(self, jobs: Iterable[Varied]) -> None:
        """Enter jobs that are to come, so that the table has them whatever happens."""
        for varied in jobs:
            self._enter(self._job(varied))

    def run(
        self, varied: Varied, config: dict[str, Any], start: Callable[[dict[str, Any]], float | None]
    ) -> float | None:
        """One job: left alone if its folder holds the finished run of this configuration, gone on with if it holds an
        unfinished one, else started. Returns its metric: None if there is none, or if it failed, which is said and
        entered. Raises Stopped when the whole sweep is to end.
        """
        job = self._job(varied)
        output = self.folder / job.name
        config = {**config, "output_dir": str(output), "resume": None, "logger": self._logger(config, job.name)}
        with self._turn(job.name):
            here = holds(output, config)
            done = _summary(output) if here else None
            if done is not None:
                self._enter(replace(job, status="finished"))
                _say(f"{job.name}: finished already.")
                return _metric(done)
            self._enter(job)
            _say(f"{job.name}: {'going on' if here else 'starting'}.")
            try:
                metric = start({**config, "resume": "auto" if here else None})
            except (UserError, JobFailed) as error:
                self._enter(replace(job, status="failed", message=str(error)))
                _say(f"{job.name} failed. {'Error: ' if isinstance(error, UserError) else ''}{error}")
                return None
            except Stopped as stopped:
                if (socket.gethostname(), os.getpid()) == self.home:
                    raise
                _say(f"{job.name}: stopped by {stopped.signal.name}.")  # in a queue, which lets the others run
                return None
            except Exception as error:
                self._enter(replace(job, status="failed", message=repr(error)))
                raise
            self._enter(replace(job, status="finished"))
        return metric if metric is not None and math.isfinite(metric) else None

    def report(self) -> bool:
        """Print the table of this command's jobs, best first, and leave it in sweep.csv, sweep.md and sweep.png.
        Whether one failed."""
        (self.folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's: nobody needs it, and no secret is taken out
        jobs = [job for job in self._jobs() if job.command == self.command]
        if not jobs:
            with suppress(OSError):
                self.folder.rmdir()  # of a dry run; any other is not empty
            return False
        rows = sorted((_Row(job, _figures(self.folder / job.name, job)) for job in jobs), key=_Row.place)
        keys = sorted({key for row in rows for key in row.job.varied})
        columns = [column for column in _COLUMNS if any(column in row.figures for row in rows)]
        header = [*keys, "status", *columns]
        cells = [
            [*(row.job.varied.get(key, "") for key in keys), row.job.status, *map(row.figures.get, columns)]
            for row in rows
        ]
        with (self.folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*header, "folder"])
            writer.writerows([*line, row.job.name] for line, row in zip(cells, rows, strict=True))
        table = _markdown(header, cells)
        (self.folder / "sweep.md").write_text(table)
        (self.folder / "sweep.png").unlink(missing_ok=True)
        plotted = _plot(rows, self.folder / "sweep.png")
        print(table)
        failed = [job for job in jobs if job.status == "failed"]
        for job in failed:
            _say(f"{job.name} failed: {job.message.splitlines()[0]}")
        _say(f"Table: {self.folder / 'sweep.md'}, sweep.csv{', sweep.png' if plotted else ''}.")
        return bool(failed)

    def _logger(self, config: dict[str, Any], name: str) -> dict[str, Any] | None:
        """W&B's settings: one group, and each run called by what varies, unless the user has chosen."""
        logger = config["logger"]
        if logger is None:
            return None
        default = logger["name"] == f"{config['recipe']}-{config['stage']}"
        group = logger["group"] or self.folder.resolve().name
        return {**logger, "group": group, "name": name if default else logger["name"]}

    def _job(self, varied: Varied) -> Job:
        varied = redact(varied)
        return Job(name_of(varied), varied, self.command)

    def _enter(self, job: Job) -> None:
        if distributed.rank() > 0:
            return
        file = self.folder / ".jobs" / f"{job.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{secrets.token_hex(4)}")
        unfinished.write_text(json.dumps(asdict(job)))
        unfinished.replace(file)

    def _jobs(self) -> list[Job]:
        return [Job(**json.loads(file.read_text())) for file in sorted((self.folder / ".jobs").glob("*.json"))]

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """One process at a time trains in a folder: a sampler may draw the same values twice, a command be given again
        while the jobs of the first are still in a queue. The lock goes with its process."""
        if distributed.rank() > 0:
            yield
            return
        import fcntl  # which Windows lacks

        file = self.folder / ".jobs" / f"{name}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"{name}: another process is at it; waiting.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            yield


@dataclass(frozen=True)
class _Row:
    job: Job
    figures: dict[str, Any]  # of _COLUMNS, and of a finished one metric and stage

    def place(self) -> tuple[Any, ...]:
        """In the table: what is good comes early."""
        metric, stage = self.figures.get("metric"), self.figures.get("stage", "")
        rank = ("finished", "unfinished", "failed").index(self.job.status) if metric is None else -1
        cost = 0.0 if metric is None else -metric if direction(stage) == "maximize" else metric
        return rank, stage, cost, [_sortable(self.job.varied[key]) for key in sorted(self.job.varied)]


def holds(output: Path, config: dict[str, Any]) -> bool:
    """Whether a run of this configuration was begun in a folder. Where `auto` is asked for, it was settled there."""
    try:
        saved = yaml.safe_load((output / "config.yaml").read_text())
        trainer = {**saved["trainer"]}
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return False
    for key in ("devices", "strategy"):
        if config["trainer"].get(key) == "auto":
            trainer[key] = "auto"
    return bool({**saved, "trainer": trainer, "resume": None} == redact({**config, "resume": None}))


def _summary(output: Path) -> dict[str, Any] | None:
    """What a finished run says of itself."""
    with suppress(OSError, json.JSONDecodeError):
        return json.loads((output / "summary.json").read_text())
    return None


def _metric(summary: dict[str, Any]) -> float | None:
    """As zephyr.running.record.headline, which returns it at the end of a run."""
    value = summary["eval"].get("eval/rewards/accuracies", summary["eval"].get("eval/loss"))
    return value if value is not None and math.isfinite(value) else None


def _figures(output: Path, job: Job) -> dict[str, Any]:
    summary = _summary(output) if job.status == "finished" else None
    if summary is None:
        return {}
    known = {**summary["eval"], "seconds": summary["seconds"]}
    figures = {column: known[column] for column in _COLUMNS if column in known}
    return figures | {"metric": _metric(summary), "stage": summary["stage"]}


def _markdown(header: list[str], cells: list[list[Any]]) -> str:
    """A table that also reads well as it is."""
    text = [
        [f"{cell:.4g}" if isinstance(cell, float) else str("" if cell is None else cell) for cell in row]
        for row in cells
    ]
    widths = [max(len(row[i]) for row in [header, *text]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *text]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def _plot(rows: list[_Row], path: Path) -> bool:
    """The metric against what varies: against the number with most values, a line for each of the rest; where most such
    lines would be a single dot (random search), dots against each number; where no number varies, bars."""
    rows = [row for row in rows if row.figures.get("metric") is not None]
    rows = [row for row in rows if row.figures["stage"] == rows[0].figures["stage"]]
    if not rows:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = {key: {row.job.varied.get(key, "") for row in rows} for key in sorted(rows[0].job.varied)}
    varied = [key for key in values if len(values[key]) > 1]
    numbers = [key for key in varied if all(_number(value) is not None for value in values[key])]
    numbers.sort(key=lambda key: -len(values[key]))
    lines = _lines(rows, numbers[0], varied) if numbers else {}
    scattered = len(numbers) > 1 and 2 * len(lines) > len(rows)
    panels = numbers if scattered else numbers[:1]
    figure = Figure(figsize=(max(7.5, 4.0 * len(panels)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    metric = "eval/rewards/accuracies" if direction(rows[0].figures["stage"]) == "maximize" else "eval/loss"
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for panel, key in zip(axes, panels, strict=False):
        for line, (label, points) in enumerate((_lines(rows, key, [key]) if scattered else lines).items()):
            style = "o" if scattered else "o-" if line < len(_COLOURS) else "s--"
            panel.plot(*zip(*points, strict=True), style, color=_COLOURS[line % len(_COLOURS)], label=label or None)
        if key.rpartition(".")[2] in _LOG_SCALED:
            panel.set_xscale("log")
        if not scattered:
            few = len(values[key]) <= 6
            panel.set_xticks(
                *zip(*((float(text), text) for text in values[key]), strict=True),
                **({} if few else {"rotation": 45, "ha": "right"}),
            )
            panel.minorticks_off()
        panel.set_xlabel(key)
    axes[0].set_ylabel(metric)
    if not panels:
        axes[0].barh(
            *zip(*((row.job.name, row.figures["metric"]) for row in rows[::-1]), strict=True), color=_COLOURS[0]
        )
        axes[0].set(xlabel=metric, ylabel="")
    for panel in axes:
        panel.grid(color="0.92", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(path.parent.resolve().name, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if any(lines) and not scattered:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
    return True


def _lines(rows: list[_Row], key: str, varied: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Points (value of key, metric) in order, by what else varies."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        rest = ", ".join(f"{other}={row.job.varied.get(other)}" for other in varied if other != key)
        lines.setdefault(rest, []).append((float(row.job.varied[key]), row.figures["metric"]))
    return {rest: sorted(lines[rest]) for rest in sorted(lines)}


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text) if math.isfinite(float(text)) else None
    return None


def _sortable(text: str) -> tuple[bool, float, str]:
    number = _number(text)
    return number is None, number or 0.0, text


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, file=sys.stderr, flush=True)
