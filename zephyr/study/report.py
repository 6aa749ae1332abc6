"""A study on paper: results.json for programs, report.md for people, and its two pictures."""

import json
from dataclasses import asdict
from pathlib import Path

from zephyr.study import figures
from zephyr.study.estimates import Estimate, Interval
from zephyr.study.plan import ARMS
from zephyr.study.results import ACCURACY, LABELS, PUBLISHED, SCORE, TOKENS, TRAIN_ACCURACY, WINS, Results

_DIGITS = {
    SCORE: 2,
    WINS: 1,
    "mt_bench": 2,
    "alpaca_eval": 1,
    "leaderboard": 1,
    ACCURACY: 3,
    TRAIN_ACCURACY: 3,
    TOKENS: 1,
}


def write(results: Results, output: Path, seconds: float) -> list[Path]:
    """Write everything into the study's folder; the paths. `seconds`: that this command took."""
    output.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(results, output)
    held = {**asdict(results), "published": PUBLISHED, "command_seconds": round(seconds, 1)}
    files = {
        output / "results.json": json.dumps(held, indent=2) + "\n",
        output / "report.md": "\n".join(_report(results, [picture.name for picture in pictures])),
    }
    for path, text in files.items():
        draft = path.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return [*files, *pictures]


def _report(results: Results, pictures: list[str]) -> list[str]:
    several = len(results.seeds) > 1
    lines = [f"# Ablation of {results.recipe}", ""]
    lines += [
        f"Seeds {', '.join(map(str, results.seeds))}; training took {results.seconds / 60:.0f} minutes. "
        "A value is the mean over seeds" + (", ± half of Student's interval over them" if several else "") + "; in "
        "brackets, a bootstrap interval over questions, each with its mean over seeds. Both of 95 %.",
        "",
    ]
    if results.questions:
        lines += [f"The teacher judged greedy answers to {results.questions} held-out questions.", ""]
    lines += ["## The four arms", "", *_arms(results), ""]
    lines += [
        "The paper's are GPT-4's scores of a 7B model, AlpacaEval with its standard error: compare the arms' order "
        "with ours, not the values. Preference accuracy is the share of pairs whose chosen answer has the higher "
        "implicit reward.",
        "",
        *(f"![The four arms]({name})\n" for name in pictures if name == figures.ARMS_FILE),
        "## The paper's order",
        "",
        *_order(results),
        "",
    ]
    if results.epochs:
        lines += ["## Epochs of dDPO", "", *_epochs(results), ""]
        lines += [
            "Each line is a run of its own, with its whole schedule; training accuracy is over its last epoch, where a "
            "pair is scored before it is learned from. In the paper training accuracy nears 100 % after one epoch, "
            "without harm to either benchmark, and three epochs are best.",
            "",
            *(f"![Epochs of dDPO]({name})\n" for name in pictures if name == figures.EPOCHS_FILE),
        ]
    if results.failed:
        lines += ["## Failed", "", *(f"- {name}: {why}" for name, why in results.failed.items()), ""]
    return lines


def _arms(results: Results) -> list[str]:
    measures = [*results.measures, ACCURACY, TOKENS]
    measures = [measure for measure in measures if any(measure in arm for arm in results.arms.values())]
    rows = [
        [
            label,
            f"{PUBLISHED[arm]['mt_bench']:.2f}",
            f"{PUBLISHED[arm]['alpaca_eval']:.2f} ± {PUBLISHED[arm]['error']:.2f}",
            *(_cell(results.arms.get(arm, {}).get(measure), measure) for measure in measures),
        ]
        for arm, label in ARMS.items()
    ]
    return _table(["", "paper: MT-Bench", "paper: AlpacaEval, %", *(LABELS[measure] for measure in measures)], rows)


def _order(results: Results) -> list[str]:
    measure = results.measures[0]
    rows = []
    for better, worse, difference in results.ahead:
        rows.append(
            [
                f"{ARMS[better]} above {ARMS[worse]}",
                f"+{PUBLISHED[better]['mt_bench'] - PUBLISHED[worse]['mt_bench']:.2f}",
                _cell(difference, measure, sign=True),
                verdict(difference),
            ]
        )
    return _table(["in the paper", "by, MT-Bench", f"here by, {LABELS[measure]}", "so here"], rows)


def verdict(difference: Estimate) -> str:
    """Whether a difference that the paper found positive was found: told from zero by each interval that there is."""
    known = [interval for interval in (difference.seeds, difference.questions) if interval is not None]
    if known and all(low > 0 for low, _ in known):
        return "as in the paper"
    if known and all(high < 0 for _, high in known):
        return "the other way round"
    return "not told apart" if known else "not known"


def _epochs(results: Results) -> list[str]:
    measures = [TRAIN_ACCURACY, ACCURACY, *results.measures]
    rows = [
        [str(epochs), *(_cell(known.get(measure), measure) for measure in measures)]
        for epochs, known in results.epochs.items()
    ]
    return _table(["epochs", *(LABELS[measure] for measure in measures)], rows)


def _cell(found: Estimate | None, measure: str, sign: bool = False) -> str:
    if found is None:
        return ""
    digits = _DIGITS.get(measure, 3)
    text = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    if found.seeds is not None:
        text += f" ± {(found.seeds[1] - found.seeds[0]) / 2:.{digits}f}"
    return text if found.questions is None else f"{text} {_interval(found.questions, digits, sign)}"


def _interval(interval: Interval, digits: int, sign: bool) -> str:
    low, high = (f"{end:{'+' if sign else ''}.{digits}f}" for end in interval)
    return f"[{low}, {high}]"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
