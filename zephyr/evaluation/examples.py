"""A few answers of each model to the same questions, from the files that the benchmarks leave."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zephyr.evaluation.files import file_name
from zephyr.evaluation.page import Example, Said, Turn

COUNT = 4  # of MT-Bench, from different categories; of AlpacaEval

Row = Mapping[str, Any]
Models = Sequence[tuple[str, str, Path]]  # what each is called here and in its files, and the folder of its results


def mt_bench(models: Models) -> list[Example]:
    """The first question of each of the first categories that all models have answered, turn by turn, with the scores
    of single-answer judgments. A model whose files cannot be read is passed over."""
    questions: dict[Any, Row] = {}
    answers: dict[str, dict[Any, Row]] = {}
    scores: dict[str, dict[tuple[Any, int], float]] = {}
    for label, name, folder in models:
        asked = {row["question_id"]: row for row in _rows(folder / "question.jsonl") if _is_question(row)}
        questions |= {key: row for key, row in asked.items() if key not in questions}
        files = sorted((folder / "model_answer").glob("*.jsonl"))
        mine = [file for file in files if file.stem == file_name(name)]
        rows = [row for file in mine or files for row in _rows(file)]
        answers[label] = {row["question_id"]: row for row in rows if "question_id" in row and _turns(row)}
        judged = [row for file in sorted((folder / "model_judgment").glob("*_single.jsonl")) for row in _rows(file)]
        scores[label] = {
            (row["question_id"], row["turn"]): row["score"]
            for row in judged
            if {"question_id", "turn", "score"} <= {*row} and row.get("model") in (name, file_name(name))
        }
    answers = {label: own for label, own in answers.items() if own}
    shared = [row for key, row in questions.items() if answers and all(key in own for own in answers.values())]
    firsts = {str(row.get("category")): row for row in reversed(shared)}
    chosen = [row for row in shared if firsts[str(row.get("category"))] is row][:COUNT]
    found = []
    for row in chosen:
        key, turns = row["question_id"], []
        for place, question in enumerate(row["turns"]):
            said = [
                Said(label, _turns(own[key])[place], _verdict(scores[label].get((key, place + 1))))
                for label, own in answers.items()
                if place < len(_turns(own[key]))
            ]
            turns.append(Turn(str(question), said))
        found.append(Example(f"Question {key}, {row.get('category', 'without a category')}", turns))
    return found


def alpaca_eval(models: Models) -> list[Example]:
    """The first instructions that all models have answered, with the baselines' answers and the judge's choice."""
    tables: dict[str, dict[str, Row]] = {}
    for label, _, folder in models:
        rows = [row for row in _rows(folder / "annotations.json") if _is_annotation(row)]
        tables[label] = {row["instruction"]: row for row in rows}
    tables = {label: rows for label, rows in tables.items() if rows}
    if not tables:
        return []
    shared = [text for text in next(iter(tables.values())) if all(text in rows for rows in tables.values())]
    found = []
    for number, text in enumerate(shared[:COUNT], start=1):
        baselines = {str(rows[text].get("generator_1", "baseline")): rows[text]["output_1"] for rows in tables.values()}
        said = [Said(name, answer, "baseline") for name, answer in baselines.items()]
        said += [
            Said(label, rows[text]["output_2"], _won(rows[text].get("preference"))) for label, rows in tables.items()
        ]
        found.append(Example(f"Instruction {number}", [Turn(text, said)]))
    return found


def _rows(path: Path) -> list[Row]:
    """Of a file of JSON or JSON lines; none where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _is_question(row: Row) -> bool:
    return "question_id" in row and isinstance(row.get("turns"), list)


def _is_annotation(row: Row) -> bool:
    return all(isinstance(row.get(name), str) for name in ("instruction", "output_1", "output_2"))


def _turns(row: Row) -> list[str]:
    try:
        turns = row["choices"][0]["turns"]
        return [str(turn) for turn in turns]
    except (KeyError, IndexError, TypeError):
        return []


def _verdict(score: Any) -> str:
    return f"judged {score:g}" if isinstance(score, int | float) and score >= 0 else ""


def _won(preference: Any) -> str:
    if not isinstance(preference, int | float):
        return "not judged"
    if preference == 1.5:
        return "a draw"
    return "judged better" if preference > 1.5 else "judged worse"
