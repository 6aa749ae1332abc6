"""Models side by side: `python -m zephyr.evaluate report DIR... [output=FOLDER]`.

A DIR is an output folder of `python -m zephyr.evaluate`, or a training run's, which has it as evaluation/. Of each,
<benchmark>/results.json is read, and of MT-Bench and AlpacaEval a few answers. Written are report.md with its plots,
and report.html, one page that needs nothing else. Equal results give equal bytes.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.errors import UserError, reason
from zephyr.evaluation import charts, examples, plots
from zephyr.evaluation.charts import Point, Value
from zephyr.evaluation.files import write
from zephyr.evaluation.page import Cell, Column, Page, Plot, Section, Table, to_html, to_markdown

BENCHMARKS = ("mt_bench", "alpaca_eval", "leaderboard", "preferences")
TITLES = {
    "mt_bench": "MT-Bench",
    "alpaca_eval": "AlpacaEval",
    "leaderboard": "Open LLM Leaderboard",
    "preferences": "Preference accuracy",
}
PUBLISHED = "Zephyr-7B-beta, published"
_MODEL = Column("Model", numeric=False)
_PAIRS = "mt_bench pairs"  # a share, which is no score from 1 to 10


class Result(NamedTuple):
    """A model's results.json of a benchmark."""

    label: str  # the model's name, with its folder where another one has the same
    folder: Path  # that holds it
    values: Mapping[str, Any]


class Missing(NamedTuple):
    """What could not be read."""

    where: Path
    why: str


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    folders = [Path(argument) for argument in arguments if not argument.startswith("output=")]
    output = Path(next((a.removeprefix("output=") for a in arguments if a.startswith("output=")), "report"))
    left_out = report(folders, output)
    for missing in left_out:
        print(f"Left out: {missing.where}: {missing.why}")
    print(f"-> {output / 'report.html'}\n-> {output / 'report.md'}")
    return 0


def report(folders: Sequence[Path], output: Path) -> list[Missing]:
    """Compare what the folders hold; write report.html, report.md and its plots into `output`. Returns what was left
    out. Raises UserError where a folder does not exist, or none holds any result."""
    if not folders:
        raise UserError("report needs the folders to compare: python -m zephyr.evaluate report DIR... [output=FOLDER]")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}. Give output folders of python -m zephyr.evaluate.")
    found, missing = read(folders)
    kinds: dict[str, Callable[[Sequence[Result]], Section]] = {
        "mt_bench": _mt_bench,
        "alpaca_eval": _alpaca_eval,
        "leaderboard": _leaderboard,
        "preferences": _preferences,
    }
    sections: dict[str, Section] = {}
    for benchmark, build in kinds.items():
        whole = []
        for result in found[benchmark]:
            try:
                build([result])
                whole.append(result)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                why = f"has not what such results hold ({type(error).__name__}: {error}). Evaluate again."
                missing.append(Missing(result.folder / "results.json", why))
        found[benchmark] = whole
        if whole:
            sections[benchmark] = build(whole)
    if not sections:
        raise UserError("; ".join(f"{where}: {why}" for where, why in missing))
    parts = [_overview(found), *sections.values()]
    if missing:
        parts.append(Section("Left out", points=[f"{where}: {why}" for where, why in missing]))
    models = list(dict.fromkeys(result.label for results in found.values() for result in results))
    page = Page("Evaluation", f"{_count(len(models), 'model')}: {', '.join(models)}.", parts)
    images = {plot.name: plot.draw() for part in parts for plot in part.plots}
    for name, image in images.items():
        write(output / f"{name}.png", image.png)
    write(output / "report.md", to_markdown(page))
    write(output / "report.html", to_html(page, images))
    return missing


def read(folders: Sequence[Path]) -> tuple[dict[str, list[Result]], list[Missing]]:
    """The results of each benchmark in the order of the folders, and what is not readable."""
    found: dict[str, list[Result]] = {benchmark: [] for benchmark in BENCHMARKS}
    missing: list[Missing] = []
    named: list[tuple[str, Path, Path, Mapping[str, Any]]] = []
    for folder in dict.fromkeys(folders):
        root = folder / "evaluation" if (folder / "evaluation").is_dir() else folder
        files = [root / benchmark / "results.json" for benchmark in BENCHMARKS]
        if not any(file.is_file() for file in files):
            missing.append(Missing(folder, "holds no results of python -m zephyr.evaluate."))
        for file in filter(Path.is_file, files):
            try:
                values = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
                name = values["model"]
                if not isinstance(name, str):
                    raise ValueError("model is no text")
                named.append((name, folder, file, values))
            except (ValueError, KeyError, TypeError) as error:
                missing.append(Missing(file, f"cannot be read: {reason(error)}"))
    homes = Counter(name for name, folder in dict.fromkeys((name, folder) for name, folder, _, _ in named))
    for name, folder, file, values in named:
        label = name if homes[name] == 1 else f"{name} ({folder})"
        found[file.parent.name].append(Result(label, file.parent, values))
    return found, missing


def _overview(found: Mapping[str, Sequence[Result]]) -> Section:
    def score(benchmark: str, values: Mapping[str, Any]) -> Cell:
        if benchmark in ("mt_bench", _PAIRS):
            return _with_interval(values["score"], values["interval"])
        if benchmark == "alpaca_eval":
            return _with_interval(values["win_rate"], (values["win_rate_low"], values["win_rate_high"]))
        if benchmark == "leaderboard":
            return _number(values["average"])
        return _with_interval(100 * values["accuracy"], (100 * values["low"], 100 * values["high"]))

    names = {"mt_bench": "", _PAIRS: ", share won", "alpaca_eval": ", % won", "leaderboard": ", % mean",
             "preferences": ", %"}  # fmt: skip
    cells: dict[str, dict[str, Cell]] = {}
    for benchmark in BENCHMARKS:
        for result in found[benchmark]:
            kind = _PAIRS if benchmark == "mt_bench" and result.values["mode"] == "pair" else benchmark
            cells.setdefault(result.label, {})[kind] = score(kind, result.values)
    shown = [kind for kind in names if any(kind in own for own in cells.values())]
    columns = [_MODEL, *(Column(TITLES[kind.removesuffix(" pairs")] + names[kind]) for kind in shown)]
    rows = [[Cell(label), *(own.get(b, Cell("–")) for b in shown)] for label, own in cells.items()]
    note = "Behind a score: the interval that holds 95 % of its bootstrap resamples over questions or pairs."
    return Section("Overview", tables=[Table("Scores", columns, rows, note)])


def _mt_bench(results: Sequence[Result]) -> Section:
    tables, drawn = [], []
    for mode, title, unit in (("single", "Scores, 1 to 10", "score"), ("pair", "Wins, and half of the ties", "share")):
        some = [result for result in results if result.values["mode"] == mode]
        if not some:
            continue
        turns = list(dict.fromkeys(turn for result in some for turn in result.values["turns"]))
        baseline = [Column("Against", numeric=False)] if mode == "pair" else []
        ends = [Column("Judge", numeric=False), Column("Judgments"), Column("Left out")]
        columns = [_MODEL, *baseline, Column("All"), *(Column(f"Turn {turn}") for turn in turns), *ends]
        rows = [
            [
                Cell(result.label),
                *([Cell(result.values["baseline"])] if baseline else []),
                _part(result.values),
                *(_part(result.values["turns"].get(turn)) for turn in turns),
                Cell(result.values["judge"]),
                _whole(result.values["n"]),
                _whole(result.values["failed"] + result.values.get("unanswered", 0)),
            ]
            for result in some
        ]
        tables.append(Table(title, columns, rows, "Left out: judgments without a verdict, and questions unanswered."))
        names = list(dict.fromkeys(name for result in some for name in result.values["categories"]))
        rows = [[Cell(r.label), *(_part(r.values["categories"].get(name)) for name in names)] for r in some]
        if names:
            tables.append(Table(f"{title}, by category", [_MODEL, *map(Column, names)], rows))
        overall = {r.label: Value(r.values["score"], *r.values["interval"]) for r in some if r.values["interval"]}
        if overall:
            drawn.append(_bars(f"mt-bench-{mode}", "MT-Bench", overall, unit, 10 if mode == "single" else 1, None))
        scores = {r.label: {name: part["score"] for name, part in r.values["categories"].items()} for r in some}
        if len(names) >= 3:
            top = 10.0 if mode == "single" else 1.0
            draw = partial(charts.written, partial(plots.radar, scores, title="", top=top))
            said = {label: {k: v for k, v in own.items() if v is not None} for label, own in scores.items()}
            drawn.append(Plot(f"mt-bench-{mode}-categories", "MT-Bench by category", _said(said), draw))
    judges = {result.values["judge"] for result in results}
    text = "Zephyr-7B-beta's published score is 7.34, with GPT-4 as judge (Tunstall et al., 2023)."
    if len(judges) > 1:
        text += " These models were judged by different judges: their scores do not compare."
    return Section(TITLES["mt_bench"], text, tables, drawn, examples.mt_bench(_homes(results)))


def _alpaca_eval(results: Sequence[Result]) -> Section:
    controlled = any(result.values["length_controlled_winrate"] is not None for result in results)
    columns = [
        _MODEL,
        Column("Won, %"),
        Column("Standard error"),
        *([Column("Length-controlled, %")] if controlled else []),
        Column("Won or lost as a whole, %"),
        Column("Preferences"),
        Column("Left out"),
        Column("Characters an answer"),
        Column("Against", numeric=False),
        Column("Judge", numeric=False),
    ]
    rows, values = [], {}
    for label, _, v in results:
        interval = (v["win_rate_low"], v["win_rate_high"])
        if v["win_rate"] is not None:
            values[label] = Value(v["win_rate"], *interval)
        error = v["lc_standard_error"]
        note = "" if error is None else f"± {error:.2f}"
        rows.append(
            [
                Cell(label),
                _with_interval(v["win_rate"], interval),
                _number(v["standard_error"]),
                *([_number(v["length_controlled_winrate"], note)] if controlled else []),
                _number(v["discrete_win_rate"]),
                _whole(v["n"]),
                _whole(v["failed"]),
                _whole(v["avg_length"]),
                Cell(v["baseline"] or "–"),
                Cell(v["annotator"] or "–"),
            ]
        )
    drawn = [_bars("alpaca-eval", "AlpacaEval", values, "% of comparisons won", 100, 50.0)] if values else []
    text = "Zephyr-7B-beta's published win rate is 90.60 % against text_davinci_003, with GPT-4 as judge."
    if len({(result.values["baseline"], result.values["annotator"]) for result in results}) > 1:
        text += " These models met different baselines or judges: their win rates do not compare."
    table = Table("Win rates", columns, rows)
    return Section(TITLES["alpaca_eval"], text, [table], drawn, examples.alpaca_eval(_homes(results)))


def _leaderboard(results: Sequence[Result]) -> Section:
    tasks: dict[str, Mapping[str, Any]] = {}
    for result in results:
        for name, score in result.values["scores"].items():
            tasks.setdefault(name, score)
    columns = [Column("Task", numeric=False), Column("Metric", numeric=False), Column("Shots"), Column(PUBLISHED)]
    rows = []
    for name, task in tasks.items():
        own = [result.values["scores"].get(name) for result in results]
        title, metric = task["title"] or name, str(task["metric"]).partition(",")[0]
        cells = [Cell("–") if score is None else _number(score["score"], _error(score["stderr"])) for score in own]
        rows.append([Cell(title), Cell(metric), _whole(task["shots"]), _number(task["published"]), *cells])
    averages = [result.values["average"] for result in results]
    if any(average is not None for average in averages):
        published = next(r.values["published_average"] for r in results if r.values["average"] is not None)
        rows.append([Cell("Mean"), Cell(""), Cell(""), _number(published), *map(_number, averages)])
    bars = {result.label: [_plus_minus(result.values["scores"].get(name)) for name in tasks] for result in results}
    titles = [task["title"] or name for name, task in tasks.items()]
    beside = [task["published"] for task in tasks.values()]
    draw = partial(charts.drawn, partial(charts.grouped, titles, bars, beside, PUBLISHED, "per cent"), "leaderboard")
    said = {
        label: {title: bar.value for title, bar in zip(titles, own, strict=True) if bar} for label, own in bars.items()
    }
    plot = Plot("leaderboard", "Open LLM Leaderboard", _said(said), draw)
    sources = "; ".join(dict.fromkeys(task["source"] for task in tasks.values() if task["source"]))
    note = "In per cent, with standard errors; a mean is of the leaderboard's tasks among these."
    note += f" Published: {sources}." if sources else ""
    columns = [*columns, *(Column(result.label) for result in results)]
    return Section(TITLES["leaderboard"], "", [Table("Tasks", columns, rows, note)], [plot])


def _preferences(results: Sequence[Result]) -> Section:
    ways = {"reward": "implicit reward", "sum": "log-likelihood", "mean": "log-likelihood a token"}
    columns = [
        _MODEL,
        Column("In the right order, %"),
        Column("Pairs"),
        Column("Left out"),
        Column("Margin, nats"),
        Column("Calibration error"),
        Column("The longer one is chosen, %"),
        Column("By", numeric=False),
        Column("Data", numeric=False),
    ]
    rows, values = [], {}
    for label, _, v in results:
        values[label] = Value(100 * v["accuracy"], 100 * v["low"], 100 * v["high"])
        rows.append(
            [
                Cell(label),
                _share(v),
                _whole(v["n"]),
                _whole(v["failed"]),
                _number(v["margin"], digits=3),
                _number(v["expected_calibration_error"], digits=3),
                _number(100 * v["longer_preferred"]),
                Cell(ways[v["score"]] + (f" against {v['reference']}" if v["reference"] else "")),
                Cell(str(v["data"])),
            ]
        )
    tables = [Table("Pairs in the right order", columns, rows)]
    origins = list(dict.fromkeys(name for result in results for name in result.values["by_source"]))
    if origins:
        parts = [[Cell(r.label), *(_share(r.values["by_source"].get(name)) for name in origins)] for r in results]
        tables.append(Table("By source, %", [_MODEL, *map(Column, origins)], parts))
    for key, title in (
        ("by_length_difference", "By tokens that the chosen answer has more, %"),
        ("by_prompt_length", "By tokens of the prompt, %"),
    ):
        spans = {
            (part["from"], part["to"]): f"{part['from']} to {part['to']}" for r in results for part in r.values[key]
        }
        parts = []
        for result in results:
            own = {(part["from"], part["to"]): part for part in result.values[key]}
            parts.append([Cell(result.label), *(_share(own.get(span)) for span in sorted(spans))])
        tables.append(Table(title, [_MODEL, *(Column(spans[span]) for span in sorted(spans))], parts))
    curves = {
        result.label: [Point(b["confidence"], b["accuracy"], b["n"]) for b in result.values["calibration"] if b["n"]]
        for result in results
    }
    said = {label: {f"{p.expected:.2f}": p.observed for p in points} for label, points in curves.items()}
    draw = partial(charts.drawn, partial(charts.calibration, curves), "calibration")
    drawn = [
        _bars("preferences", "Pairs in the right order", values, "%", 100, 50.0),
        Plot("calibration", "How often a verdict is right, by how sure the model is", _said(said), draw),
    ]
    return Section(TITLES["preferences"], "", tables, drawn)


def _homes(results: Sequence[Result]) -> examples.Models:
    return [(result.label, result.values["model"], result.folder) for result in results]


def _bars(name: str, title: str, values: Mapping[str, Value], unit: str, end: float, line: float | None) -> Plot:
    said = "; ".join(
        f"{label} {v.value:.2f}" + ("" if v.low is None else f" ({v.low:.2f} to {v.high:.2f})")
        for label, v in values.items()
    )
    draw = partial(charts.drawn, partial(charts.bars, values, unit, end, line), name)
    return Plot(name, f"{title}, {unit}", said, draw)


def _said(values: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(f"{label}: " + ", ".join(f"{k} {v:.2f}" for k, v in own.items()) for label, own in values.items())


def _part(part: Mapping[str, Any] | None) -> Cell:
    return Cell("–") if part is None else _with_interval(part["score"], part["interval"])


def _share(group: Mapping[str, Any] | None) -> Cell:
    if group is None:
        return Cell("–")
    return _with_interval(100 * group["accuracy"], (100 * group["low"], 100 * group["high"]))


def _plus_minus(score: Mapping[str, Any] | None) -> Value | None:
    if score is None or score["score"] is None:
        return None
    error = score["stderr"]
    around = () if error is None else (score["score"] - 1.96 * error, score["score"] + 1.96 * error)
    return Value(score["score"], *around)


def _error(error: float | None) -> str:
    return "" if error is None else f"± {error:.2f}"


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> Cell:
    if interval is None or None in interval:
        return _number(value)
    low, high = interval
    return _number(value, f"{low:.2f} to {high:.2f}")


def _number(value: float | None, note: str = "", digits: int = 2) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}"), note, float(value))


def _whole(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{math.floor(value + 0.5):,}", "", float(value))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
