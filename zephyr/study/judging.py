"""What each model of a study is worth: by the demo's teacher, or by the benchmarks of `python -m zephyr.evaluate`."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr.errors import UserError
from zephyr.study.plan import Run
from zephyr.study.settings import Ablation
from zephyr.study.training import call, ended

HEADLINES = {  # benchmark: what of its results.json is compared, and what that is called
    "mt_bench": ("score", "MT-Bench, 1 to 10"),
    "alpaca_eval": ("win_rate", "AlpacaEval, %"),
    "leaderboard": ("average", "Open LLM Leaderboard, %"),
    "preferences": ("accuracy", "preference accuracy by likelihood"),
}
TEACHER = "teacher.json"


@dataclass(frozen=True)
class Marks:
    """Of one model: a value a measure, and of the demo the teacher's score of each question, 1 to 5."""

    values: dict[str, float]
    scores: list[float]


def by_teacher(run: Run, questions: int) -> Marks:
    """The teacher's scores of greedy answers to the demo's held-out questions, kept in the run's folder."""
    file = run.folder / TEACHER
    known = _kept(file, run.folder / "summary.json")
    if known is None or known["asked"] != questions:
        from zephyr.demo.__main__ import answer, held_out
        from zephyr.demo.teacher import score

        instructions = held_out(questions)
        answers = answer(run.folder, instructions)
        rows = [
            {"instruction": asked, "answer": said, "score": score(asked, said), "tokens": tokens}
            for asked, (said, tokens) in zip(instructions, answers, strict=True)
        ]
        known = {"asked": questions, "answers": rows}
        _keep(file, known)
    scores = [row["score"] for row in known["answers"]]
    tokens = [row["tokens"] for row in known["answers"]]
    return Marks({"score": _mean(scores), "tokens": _mean(tokens)}, scores)


def by_benchmarks(run: Run, settings: Ablation) -> Marks:
    """The headline of each benchmark. Raises UserError where one gave none."""
    folder = run.folder / "evaluation"
    files = {name: folder / name / "results.json" for name in settings.benchmarks}
    if any(_kept(file, run.folder / "summary.json") is None for file in files.values()):
        wanted = f"benchmarks=[{','.join(settings.benchmarks)}]"
        command = [sys.executable, "-m", "zephyr.evaluate", str(run.folder), wanted, *shlex.split(settings.evaluate)]
        if status := call(command):
            raise UserError(f"{run.name} could not be evaluated: {ended(status)}.")
    values: dict[str, float] = {}
    for name, file in files.items():
        key, results = HEADLINES[name][0], _kept(file, run.folder / "summary.json") or {}
        if not isinstance(results.get(key), int | float):
            raise UserError(f"{file} has no {key}, by which {name} is compared: evaluate {run.folder} again.")
        values[name] = float(results[key])
    return Marks(values, [])


def _kept(file: Path, trained: Path) -> dict[str, Any] | None:
    """What was found of the model as it is now."""
    if not file.exists() or file.stat().st_mtime < trained.stat().st_mtime:
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _keep(file: Path, found: dict[str, Any]) -> None:
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
