"""AlpacaEval (Li et al., 2023; Dubois et al., 2024): how often a judge prefers a model's answers to a baseline's.

The files are the official tool's, so that it can take over at any point: outputs.json is what it is given as model
outputs, annotations.json what it writes. A preference is 1 where the baseline's answer is better, 2 where the model's
is, 1.5 for a draw (once written 0), and between where the judge's choice is weighted by its probability.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.data import sources
from zephyr.errors import UserError, reason
from zephyr.evaluation import pairwise
from zephyr.evaluation.asking import all_of
from zephyr.evaluation.files import write
from zephyr.evaluation.intervals import bootstrap
from zephyr.evaluation.settings import AlpacaEval, Evaluation
from zephyr.feedback.client import Client
from zephyr.feedback.request import Failure, Request

_TEMPERATURE, _MAX_TOKENS = 0.7, 2048  # of Zephyr's published answers
_PROMPTS = 805  # of AlpacaEval


class WinRate(NamedTuple):
    """Scores in per cent, as the official leaderboard has them. NaN where there are too few preferences."""

    win_rate: float
    standard_error: float  # of the win rate: sample standard deviation / sqrt(n)
    n: int  # preferences that count
    n_wins: int  # preferences above 1.5
    n_wins_base: int
    n_draws: int
    discrete_win_rate: float  # with each preference rounded to 1 or 2 beforehand; a draw is half a win


class Example(NamedTuple):
    """An instruction and what the baseline answered."""

    instruction: str
    dataset: str | None  # that it comes from
    output: str
    generator: str  # the baseline's name


class Trouble(NamedTuple):
    """Why there is no preference."""

    cause: str
    detail: str
    asked: str | None  # who gave no reply: model or judge


class Annotated(NamedTuple):
    """What became of an example."""

    row: dict[str, Any] | None  # of annotations.json; None where the model gave no answer
    trouble: Trouble | None = None
    weighted: bool = False  # by log-probabilities
    first: float | None = None  # how far the judge preferred what it saw first: 1, 0.5, 0, or between


def win_rate(preferences: Iterable[Any]) -> WinRate:
    """The official rule: what is missing or outside of 1 to 2 is dropped, 0 is a draw, and the rest is averaged.

    A preference is a number, a text that says one, or missing (None, NaN). Raises ValueError at other texts, TypeError
    at what is no preference, such as a whole row.
    """
    numbers = _numbers(preferences)
    values = counted(numbers)
    rounded = [value if value == 1.5 else round(value) or 1.5 for value in numbers if math.isfinite(value)]
    discrete = [value - 1 for value in rounded if 1 <= value <= 2]
    shares = [value - 1 for value in values]
    n, draws, wins = len(values), values.count(1.5), sum(value > 1.5 for value in values)
    mean = math.fsum(shares) / n if n else math.nan
    variance = math.fsum((share - mean) ** 2 for share in shares) / (n - 1) if n > 1 else math.nan
    return WinRate(
        mean * 100,
        math.sqrt(variance / n) * 100 if n > 1 else math.nan,
        n,
        wins,
        n - wins - draws,
        draws,
        math.fsum(discrete) / len(discrete) * 100 if discrete else math.nan,
    )


def counted(preferences: Iterable[Any]) -> list[float]:
    """The preferences that count, each in 1 to 2."""
    return [value for value in _numbers(preferences) if 1 <= value <= 2]


def check(settings: Evaluation) -> None:
    """Raise UserError at what is wrong before anything is asked."""
    if settings.alpaca_eval.annotations is None:
        _inputs(settings)
    else:
        _annotations(settings.alpaca_eval.annotations)


async def run(client: Client, settings: Evaluation, folder: Path) -> dict[str, Any]:
    """Answer, judge and count; the results. Writes outputs.json and annotations.json into `folder`. Raises UserError
    where the model or the judge has not answered once."""
    own = settings.alpaca_eval
    if own.annotations is not None:
        rows, missing = _annotations(own.annotations)
        write(folder / "annotations.json", official_json(rows))
        return _results(rows, missing)
    examples, template, given = _inputs(settings)
    works = [_annotated(client, settings, example, given, template) for example in examples]
    annotated = await all_of(client, "AlpacaEval", works)
    rows = [entry.row for entry in annotated if entry.row is not None]
    troubles = [entry.trouble for entry in annotated if entry.trouble is not None]
    who = "judge" if rows else "model"
    silent = [trouble for trouble in troubles if trouble.asked == who]
    heard = any(entry.first is not None for entry in annotated) or any(trouble.asked is None for trouble in troubles)
    if silent and not heard:
        raise UserError(f"AlpacaEval: the {who} has not answered once. {silent[0].cause}: {silent[0].detail}")
    write(folder / "outputs.json", official_json([_output(row) for row in rows]))
    write(folder / "annotations.json", official_json(rows))
    firsts = [entry.first for entry in annotated if entry.first is not None]
    return {
        **_results(rows, Counter(trouble.cause for trouble in troubles)),
        "first_failure": troubles[0].detail if troubles else None,
        "first_preferred": math.fsum(firsts) / len(firsts) if firsts else None,
        "weighted": sum(entry.weighted for entry in annotated),
    }


def _annotations(source: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of a file, and why some of them have no preference that counts."""
    rows = [row for _, row in sources.read(sources.files(source, "alpaca_eval.annotations"))]
    if not all("preference" in row for row in rows):
        raise UserError(f"{source} holds no annotations: rows need a preference.")
    try:
        missing = Counter(_missing(row["preference"]) for row in rows if not counted([row["preference"]]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} holds a preference that is no number: {reason(error)}") from error
    return rows, missing


def _inputs(settings: Evaluation) -> tuple[list[Example], list[sources.Message] | None, dict[str, str] | None]:
    """What is asked, the judge's template and the answers of a file, where there are such."""
    own = settings.alpaca_eval
    examples = _examples(own, settings.limit)
    template = pairwise.load_template(own.prompt) if own.prompt is not None else None
    given = _outputs(own.outputs, examples) if own.outputs is not None else None
    settings.the_judge()
    if given is None:
        settings.the_model()
    return examples, template, given


async def _annotated(
    client: Client,
    settings: Evaluation,
    example: Example,
    given: dict[str, str] | None,
    template: list[sources.Message] | None,
) -> Annotated:
    """The model's answer beside the baseline's, and which is the better one."""
    own, judge = settings.alpaca_eval, settings.the_judge()
    if given is not None:
        answer = given[example.instruction]
    else:
        model = settings.the_model()
        messages = [{"role": "user", "content": example.instruction}]
        reply = await client.ask(Request(model.backend.name, messages, model.sampling(_TEMPERATURE, _MAX_TOKENS)))
        if isinstance(reply, Failure):
            return Annotated(None, Trouble(f"answer {reply.cause}", reply.detail, "model"))
        answer = reply.text.strip()  # as the official tool does
    row: dict[str, Any] = {
        "instruction": example.instruction,
        "output_1": example.output,
        "generator_1": example.generator,
        **({} if example.dataset is None else {"dataset": example.dataset}),
        "output_2": answer,
        "generator_2": settings.name,
        "annotator": judge.name,
        "preference": None,
        "price_per_example": None,
        "time_per_example": None,
    }
    if answer == example.output:  # the official tool asks nobody either
        return Annotated({**row, "preference": 1.5})
    weighs = own.style == "weighted"
    swapped = _swapped(example.instruction, own.seed)
    shown = (answer, example.output) if swapped else (example.output, answer)
    verdict = await client.ask(pairwise.request(judge, example.instruction, shown, weighs, template))
    if isinstance(verdict, Failure):
        return Annotated(row, Trouble(f"judgement {verdict.cause}", verdict.detail, "judge"))
    row |= {"price_per_example": verdict.cost, "time_per_example": verdict.seconds}
    weight = pairwise.read_weight(verdict.extra) if weighs else None
    second = pairwise.read_choice(verdict.text, tie=not weighs) if weight is None else weight
    if second is None:
        return Annotated(row, Trouble("judgement unreadable", repr(verdict.text[-200:]), None))
    preference = 2 - second if swapped else 1 + second
    return Annotated({**row, "preference": preference}, None, weight is not None, 1 - second)


def summary(results: dict[str, Any]) -> str:
    """The results in a few lines."""
    if results["win_rate"] is None:
        lines = [f"AlpacaEval: no preference could be counted ({_shown(results['failures'])})."]
    else:
        low, high = results["win_rate_low"], results["win_rate_high"]
        lines = [
            f"AlpacaEval: {results['model']} wins {results['win_rate']:.2f} % against "
            f"{results['baseline'] or 'the baseline'} (95 % of resamples {low:.2f} to {high:.2f}; "
            f"{results['n']} judgements by {results['annotator'] or 'a judge'}, {results['n_draws']} draws)."
        ]
        if results["avg_length"] is not None:
            lines.append(
                f"Characters an answer: {results['avg_length']}; the baseline's {results['avg_length_baseline']}."
            )
        if results["failed"]:
            first = f" First: {results['first_failure']}" if results.get("first_failure") else ""
            lines.append(f"{results['failed']} without a preference: {_shown(results['failures'])}.{first}")
    if results["length_controlled_winrate"] is not None:
        lines.append(f"Length-controlled, by alpaca_eval: {results['length_controlled_winrate']:.2f} %.")
    else:
        lines.append(f"Length-controlled win rate left out: {results['length_controlled_note']}")
    return "\n".join(lines)


def length_controlled(annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The win rate without the advantage of length (Dubois et al., 2024), by the official package's own function.

    Where it cannot be had, `length_controlled_note` says why. The package knows an instruction's difficulty by its
    place in AlpacaEval's list alone, so that no other list will do.
    """
    scores: dict[str, Any] = {"length_controlled_winrate": None, "lc_standard_error": None}
    if len(annotations) != _PROMPTS:
        note = f"it is defined for AlpacaEval's {_PROMPTS} instructions, in their order; here are {len(annotations)}."
        return scores | {"length_controlled_note": note}
    try:
        import pandas as pd
        from alpaca_eval.metrics import get_length_controlled_winrate
    except Exception as error:  # it, or one of the two dozen packages that it wants, in whatever state
        note = f"alpaca_eval is not installed ({reason(error)}) pip install alpaca_eval."
        return scores | {"length_controlled_note": note}
    try:
        found = get_length_controlled_winrate(pd.DataFrame(annotations), save_weights_dir=None)
    except Exception as error:  # above all: the hub, from which it fetches its instructions' difficulties
        note = f"alpaca_eval could not compute it ({reason(error)}) It fetches df_gamed.csv from the hub."
        return scores | {"length_controlled_note": note}
    return {name: float(found[name]) for name in scores} | {"length_controlled_note": None}


def official_json(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as the official tool writes them, which is as pandas does: byte for byte."""
    text = json.dumps(_rounded(rows), indent=2, separators=(",", ":"), allow_nan=False)
    return text.replace("/", "\\/")  # which stands in texts only


def _results(rows: Sequence[dict[str, Any]], failures: Counter[str]) -> dict[str, Any]:
    preferences = [row["preference"] for row in rows]
    scores = win_rate(preferences)
    values = counted(preferences)
    low, high = bootstrap([(value - 1) * 100 for value in values]) if values else (None, None)
    finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in scores._asdict().items()}
    return {
        **({} if (name := _one(rows, "generator_2")) is None else {"model": name}),
        "baseline": _one(rows, "generator_1"),
        "annotator": _one(rows, "annotator"),
        **finite,
        "win_rate_low": low,
        "win_rate_high": high,
        "avg_length": _length(rows, "output_2"),
        "avg_length_baseline": _length(rows, "output_1"),
        "failed": failures.total(),
        "failures": dict(sorted(failures.items())),
        **length_controlled(rows),
    }


def _examples(own: AlpacaEval, limit: int | None) -> list[Example]:
    """The instructions to answer, each once and in their order, with the baseline's answers."""
    if own.baseline is None:
        raise UserError(
            "alpaca_eval.baseline is not set: give the outputs of the model to compare with, a file of rows with "
            "instruction and output (AlpacaEval 1: text_davinci_003; 2: gpt4_1106_preview)."
        )
    baseline = _rows(own.baseline, "alpaca_eval.baseline", ("instruction", "output"))
    prompts = baseline if own.prompts is None else _rows(own.prompts, "alpaca_eval.prompts", ("instruction",))
    name = Path(own.baseline).name.split(".")[0]
    examples = []
    for instruction, row in list(prompts.items())[:limit]:
        if instruction not in baseline:
            raise UserError(f"{own.baseline} has no output for the instruction {instruction[:80]!r} of {own.prompts}.")
        answer = baseline[instruction]
        dataset = row.get("dataset", answer.get("dataset"))
        examples.append(Example(instruction, dataset, answer["output"], str(answer.get("generator") or name)))
    return examples


def _outputs(source: str, examples: Sequence[Example]) -> dict[str, str]:
    rows = _rows(source, "alpaca_eval.outputs", ("instruction", "output"))
    if missing := [example.instruction for example in examples if example.instruction not in rows]:
        raise UserError(f"{source} lacks {len(missing)} of {len(examples)} instructions, first {missing[0][:80]!r}.")
    return {instruction: row["output"] for instruction, row in rows.items()}


def _rows(source: str, key: str, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of a file by instruction; of equal ones the first."""
    found: dict[str, dict[str, Any]] = {}
    for where, row in sources.read(sources.files(source, key)):
        if wrong := [column for column in columns if not isinstance(row.get(column), str)]:
            raise UserError(f"{where}: {key} needs rows with the text {wrong[0]}; found {', '.join(row) or 'nothing'}.")
        found.setdefault(row["instruction"], row)
    return found


def _swapped(instruction: str, seed: int) -> bool:
    """Whether the judge sees the model's answer first: drawn by the instruction, so alike in every run."""
    return hashlib.sha256(f"{seed} {instruction}".encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


def _output(row: dict[str, Any]) -> dict[str, Any]:
    names = {"dataset": "dataset", "instruction": "instruction", "output": "output_2", "generator": "generator_2"}
    return {name: row[column] for name, column in names.items() if column in row}


def _numbers(preferences: Iterable[Any]) -> list[float]:
    """All that is there as numbers, draws as 1.5."""
    values = []
    for preference in preferences:
        if preference is not None and type(preference).__name__ != "NAType":  # what pandas has for it
            values.append(float(preference) or 1.5)
    return values


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 10) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _missing(preference: Any) -> str:
    return "no preference" if preference is None or preference != preference else "preference outside of 1 to 2"


def _one(rows: Sequence[dict[str, Any]], column: str) -> str | None:
    names = dict.fromkeys(str(row[column]) for row in rows if row.get(column) is not None)
    return ", ".join(names) or None


def _length(rows: Sequence[dict[str, Any]], column: str) -> int | None:
    """Mean characters, without the fraction: as the leaderboard has it."""
    lengths = [len(row[column]) for row in rows if isinstance(row.get(column), str)]
    return sum(lengths) // len(lengths) if lengths else None


def _shown(failures: dict[str, int]) -> str:
    return ", ".join(f"{number} {cause}" for cause, number in failures.items()) or "nothing was judged"
