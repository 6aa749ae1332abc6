"""MT-Bench (Zheng et al., 2023): questions of two turns, judged from 1 to 10 or against another model.

The folder of a run is laid out as FastChat's data/mt_bench, so its gen_judgment, show_result and qa_browser can go on
from any point: question.jsonl, reference_answer/, model_answer/<model>.jsonl, model_judgment/<judge>_<mode>.jsonl.
Rows are plain dictionaries with FastChat's keys in FastChat's order.
"""

import asyncio
import gzip
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.data.messages import BadRow, Message, checked_list
from zephyr.data.sources import files, read
from zephyr.errors import UserError
from zephyr.evaluation.asking import all_of
from zephyr.evaluation.files import file_name, write
from zephyr.evaluation.judging import NEED_REFERENCE, Prompts, case, score_of, winner_of
from zephyr.evaluation.judging import parse_score as parse_score
from zephyr.evaluation.scoring import CATEGORIES, NO_REPLY, compared, scored
from zephyr.evaluation.settings import Answering, Evaluation
from zephyr.feedback.client import Client
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.settings import Backend

Row = dict[str, Any]

# FastChat's llm_judge/common.py; other categories are sampled at 0.7
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
MAX_TOKENS = 1024

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of the ids that FastChat draws


class Match(NamedTuple):
    """What is judged: the answers of a model, or of it and its baseline, to a question up to a turn."""

    question: Row
    answers: list[Row]
    reference: Row | None
    turn: int


class Inputs(NamedTuple):
    """What a run starts from; rows by question, empty where there are none."""

    prompts: Prompts
    questions: list[Row]
    references: dict[Any, Row]
    baseline: dict[Any, Row] | None
    answers: dict[Any, Row] | None  # of a file, in place of the model's own


def read_questions(source: str | Path) -> list[Row]:
    """`{question_id, category, turns}` in a file's order. Raises BadRow."""
    rows: dict[Any, Row] = {}
    for where, row in read(files(str(source), "mt_bench.questions")):
        _must(where, row, question_id=(int, str), category=(str,))
        _texts(where, row, "turns")
        if row["question_id"] in rows:
            raise BadRow(f"{where}: question_id {row['question_id']} stands there twice.")
        rows[row["question_id"]] = row
    return list(rows.values())


def read_answers(source: str | Path, key: str = "mt_bench.answers") -> list[Row]:
    """`{question_id, answer_id, model_id, choices: [{index, turns}], tstamp}` in a file's order. Raises BadRow."""
    rows = []
    for where, row in read(files(str(source), key)):
        _must(where, row, question_id=(int, str))
        choices = checked_list(row.get("choices"), where, "choices")
        if not choices or not all(isinstance(choice, dict) for choice in choices):
            raise BadRow(f"{where}: choices must be a list of objects with turns.")
        for choice in choices:
            _texts(f"{where}: choices", choice, "turns")
        rows.append(row)
    return rows


def read_judgments(source: str | Path) -> list[Row]:
    """Of single answers `{question_id, model, judge, user_prompt, judgment, score, turn, tstamp}`, or of pairs
    `{question_id, model_1, model_2, g1_winner, g2_winner, judge, ..., turn, tstamp}`. Raises BadRow."""
    rows = []
    for where, row in read(files(str(source), "mt_bench.judgments")):
        if "g1_winner" in row:
            _must(where, row, question_id=(int, str), **dict.fromkeys(("model_1", "model_2"), (str,)))
            _must(where, row, **dict.fromkeys(("g1_winner", "g2_winner"), (str,)))
        else:
            _must(where, row, question_id=(int, str), model=(str,), score=(int, float))
        rows.append(row)
    return rows


def write_answers(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as FastChat writes them: a file of its own comes out byte for byte as it was read."""
    write(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


write_judgments = write_answers


def scores(judgments: Sequence[Mapping[str, Any]], categories: Mapping[Any, str] = CATEGORIES) -> dict[str, Row]:
    """Of each model in judgments of single answers what `zephyr.evaluation.scoring.scored` says; `categories` are
    those of the questions, by id."""
    models = dict.fromkeys(row["model"] for row in judgments)
    return {model: scored([row for row in judgments if row["model"] == model], categories) for model in models}


def check(settings: Evaluation) -> None:
    """Raise UserError at what is wrong before anything is asked."""
    if settings.mt_bench.judgments is None:
        _inputs(settings)
    else:
        read_judgments(settings.mt_bench.judgments)


async def run(client: Client, settings: Evaluation, folder: Path) -> Row:
    """Answer, judge and count, or what of it files do not hold yet. Raises UserError, BudgetSpent."""
    own = settings.mt_bench
    if own.judgments is not None:
        categories = CATEGORIES if own.questions is None else _categories(read_questions(own.questions))
        return _counted(read_judgments(own.judgments), settings.name, categories)
    judge, (prompts, questions, references, baseline, given) = settings.the_judge(), _inputs(settings)
    _copies(settings, folder, judge.name)
    model = file_name(settings.name)
    failures: list[Failure] = []
    path = folder / "model_answer" / f"{model}.jsonl"
    if own.answers is not None and given is not None:
        write(path, _content(own.answers))
        answers = given
    else:
        answers = await _answers(client, settings.the_model(), questions, path, failures)
    matches = _matches(questions, answers, references, baseline)
    if not matches:
        raise UserError(f"MT-Bench: none of {len(questions)} questions has an answer to judge. {_why(failures)}")
    names = [model] if own.baseline is None or baseline is None else [model, _stem(own.baseline)]
    failures.clear()
    judging = [_judged(client, judge, prompts, match, names, failures) for match in matches]
    rows = await all_of(client, "MT-Bench, judgments", judging)
    if len(failures) == len(rows) * len(names):
        raise UserError(f"MT-Bench: the judge {judge.name!r} has not answered once. {_why(failures)}")
    _write_dated(folder / "model_judgment" / f"{file_name(judge.name)}_{own.mode}.jsonl", rows)
    results = _counted(rows, model, _categories(questions))
    unanswered = len(questions) - sum(row["question_id"] in answers for row in questions)
    prompted = own.judge_prompts and Path(own.judge_prompts).name
    asked = {"judge": judge.name, "prompts": prompted, "questions": len(questions), "unanswered": unanswered}
    return {**results, "model": settings.name, **asked}


def summary(results: Row) -> str:
    """The results in a few lines."""
    unit = "" if results["mode"] == "single" else f" won against {results['baseline']}, ties by half"
    lines = [f"MT-Bench  {results['model']}: {_said(results)}{unit}"]
    for kind, parts in (("turn", results["turns"]), ("", results["categories"])):
        lines += [f"  {f'{kind} {name}'.strip():<12} {_said(part)}" for name, part in parts.items()]
    if results["failed"]:
        unread = results["failed"] - results["no_reply"]
        lines.append(f"  left out: {unread} judgments without a verdict, {results['no_reply']} without a reply")
    if results.get("unanswered"):
        lines.append(f"  left out: {results['unanswered']} questions without an answer; the same command asks again")
    return "\n".join(lines)


def _said(part: Row) -> str:
    if part["score"] is None:
        return "-"
    return f"{part['score']:.3f}  [{part['interval'][0]:.3f}, {part['interval'][1]:.3f}]  n {part['n']}"


def _inputs(settings: Evaluation) -> Inputs:
    own = settings.mt_bench
    if own.questions is None:
        raise UserError("mt_bench.questions is not set: give FastChat's data/mt_bench/question.jsonl.")
    settings.the_judge()
    prompts, questions = Prompts(own.judge_prompts, own.mode), read_questions(own.questions)[: settings.limit]
    references = _by_question(own.references, "mt_bench.references")
    needed = [row for row in questions if row["category"] in NEED_REFERENCE]
    _complete(needed, references, "mt_bench.references", f"the categories {', '.join(NEED_REFERENCE[:3])} need them")
    baseline = _by_question(own.baseline, "mt_bench.baseline") if own.mode == "pair" else None
    if baseline is not None:
        _complete(questions, baseline, "mt_bench.baseline", "mt_bench.mode=pair compares with them")
    if own.answers is None:
        settings.the_model()
        return Inputs(prompts, questions, references, baseline, None)
    answers = _by_question(own.answers, "mt_bench.answers")
    answered = [row for row in questions if row["question_id"] in answers]
    if not answered:
        raise UserError(f"mt_bench.answers: {own.answers} answers none of the {len(questions)} questions.")
    _long_enough(answered, answers, "mt_bench.answers")
    return Inputs(prompts, questions, references, baseline, answers)


async def _answers(
    client: Client, answering: Answering, questions: list[Row], path: Path, failures: list[Failure]
) -> dict[Any, Row]:
    """The model's answers by question, written to `path`. What fails is added to `failures`."""
    asked = await all_of(client, "MT-Bench, answers", [_answer(client, answering, row) for row in questions])
    rows = [row for row in asked if not isinstance(row, Failure)]
    failures += [row for row in asked if isinstance(row, Failure)]
    _write_dated(path, rows)
    return {row["question_id"]: row for row in rows}


async def _answer(client: Client, model: Answering, question: Row) -> Row | Failure:
    """Its turns one after the other, each with the model's own answers before it; how one failed, where one did."""
    prescribed = TEMPERATURES.get(question["category"], 0.7)
    parameters = model.sampling(question.get("required_temperature", prescribed), MAX_TOKENS)
    messages: list[Message] = []
    for turn in question["turns"]:
        messages.append({"role": "user", "content": turn})
        reply = await client.ask(Request(model.backend.name, list(messages), parameters))
        if isinstance(reply, Failure):
            return reply
        messages.append({"role": "assistant", "content": reply.text})
    turns = [message["content"] for message in messages[1::2]]
    name = model.backend.name
    return {
        "question_id": question["question_id"],
        "answer_id": _id(name, question["question_id"], turns),
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
    }


def _matches(
    questions: list[Row], answers: dict[Any, Row], references: dict[Any, Row], baseline: dict[Any, Row] | None
) -> list[Match]:
    """In FastChat's order: first turns, then second ones of questions with two; those with references last."""
    matches = []
    for turn, need in ((1, False), (1, True), (2, False), (2, True)):
        for row in questions:
            answer = answers.get(row["question_id"])
            if answer is None or (row["category"] in NEED_REFERENCE) != need or (turn == 2 and len(row["turns"]) != 2):
                continue
            sides = [answer] if baseline is None else [answer, baseline[row["question_id"]]]
            matches.append(Match(row, sides, references[row["question_id"]] if need else None, turn))
    return matches


async def _judged(
    client: Client, judge: Backend, prompts: Prompts, match: Match, names: list[str], failures: list[Failure]
) -> Row:
    """One judgment, of the model `names` begins with; of two, in both orders. What fails is added to `failures`."""
    orders = [match.answers] if len(names) == 1 else [match.answers, match.answers[::-1]]
    asked = [prompts.ask(case(match.question, order, match.reference, match.turn)) for order in orders]
    requests = [Request(judge.name, prompt.messages, judge.sampling) for prompt in asked]
    replies = await asyncio.gather(*(client.ask(request) for request in requests))
    failures += [reply for reply in replies if isinstance(reply, Failure)]
    said = [reply.text if isinstance(reply, Reply) else NO_REPLY for reply in replies]
    row: Row = {"question_id": match.question["question_id"]}
    by = [judge.name, asked[0].name]
    if len(names) == 1:
        row |= {"model": names[0], "judge": by, "user_prompt": asked[0].text, "judgment": said[0]}
        return row | {"score": score_of(said[0]), "turn": match.turn}
    places = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
    first, second = (place.get(won := winner_of(text), won) for place, text in zip(places, said, strict=True))
    row |= {"model_1": names[0], "model_2": names[1], "g1_winner": first, "g2_winner": second, "judge": by}
    row |= {"g1_user_prompt": asked[0].text, "g1_judgment": said[0]}
    return row | {"g2_user_prompt": asked[1].text, "g2_judgment": said[1], "turn": match.turn}


def _why(failures: list[Failure]) -> str:
    return f"The first failure, {failures[0].cause}: {failures[0].detail}" if failures else ""


def _counted(rows: list[Row], model: str, categories: Mapping[Any, str]) -> Row:
    """The figures of `model`, or of the one model that the judgments speak of."""
    mode, sides = ("pair", ("model_1", "model_2")) if "g1_winner" in rows[0] else ("single", ("model",))
    rows = [row for row in rows if all(side in row for side in sides)]
    if all(model != row[side] for row in rows for side in sides):
        models = list(dict.fromkeys(row[sides[0]] for row in rows))
        if len(models) != 1:
            raise UserError(f"these judgments are of {', '.join(models)}: choose one with answer.name=NAME.")
        model = models[0]
    of_it = [row for row in rows if model in [row[side] for side in sides]]
    head = {"model": model, "mode": mode, "judge": ", ".join(dict.fromkeys(_judge(row) for row in of_it))}
    if mode == "single":
        return head | scored(of_it, categories)
    others = dict.fromkeys(row[side] for row in of_it for side in sides if row[side] != model)
    return head | {"baseline": ", ".join(others)} | compared(of_it, model, categories)


def _judge(row: Row) -> str:
    by = row.get("judge")
    return str(by[0]) if isinstance(by, list) and by else str(by)


def _complete(questions: list[Row], rows: dict[Any, Row], key: str, why: str) -> None:
    missing = [row["question_id"] for row in questions if row["question_id"] not in rows]
    if missing and not rows:
        raise UserError(f"{key} is not set: {why}. Give a file of answers.")
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{key} has no answer to question {missing[0]}{more}: {why}.")
    _long_enough(questions, rows, key)


def _long_enough(questions: list[Row], rows: dict[Any, Row], key: str) -> None:
    for row in questions:
        turns = rows[row["question_id"]]["choices"][0]["turns"]
        if len(turns) < len(row["turns"]):
            raise UserError(f"{key}: question {row['question_id']} has {len(row['turns'])} turns, its answer fewer.")


def _categories(questions: list[Row]) -> dict[Any, str]:
    return {row["question_id"]: row["category"] for row in questions}


def _by_question(source: str | None, key: str) -> dict[Any, Row]:
    return {} if source is None else {row["question_id"]: row for row in read_answers(source, key)}


def _copies(settings: Evaluation, folder: Path, judge: str) -> None:
    """What FastChat's tools look for beside answers and judgments."""
    own = settings.mt_bench
    copied = [(own.questions, "question.jsonl"), (own.references, f"reference_answer/{file_name(judge)}.jsonl")]
    if own.mode == "pair":
        copied.append((own.baseline, f"model_answer/{_stem(own.baseline or '')}.jsonl"))
    for source, name in copied:
        if source is not None:
            write(folder / name, _content(source))


def _content(source: str) -> bytes:
    """A file as it stands, unpacked."""
    path = Path(source).expanduser()
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _write_dated(path: Path, rows: list[Row]) -> None:
    """With the time of writing, which FastChat's rows end with. Of rows that stand there already, equal ones keep
    theirs, and judgments of other models stay, as FastChat has one file for all."""
    there = [row for _, row in read([path])] if path.is_file() and path.stat().st_size else []
    stamps = {json.dumps(_undated(row)): row.get("tstamp") for row in there}
    models = {_model(row) for row in rows}
    now = time.time()
    dated = [{**row, "tstamp": stamps.get(json.dumps(row)) or now} for row in rows]
    write_answers(path, [row for row in there if _model(row) not in models] + dated)


def _undated(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "tstamp"}


def _model(row: Row) -> Any:
    return row.get("model") or row.get("model_1")  # answers have neither: their file is of one model


def _id(*parts: Any) -> str:
    """22 characters, as FastChat's ids have, that depend on nothing but the answer."""
    number = int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16])
    letters = []
    for _ in range(22):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "".join(letters)


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def _must(where: str, row: Row, **kinds: tuple[type, ...]) -> None:
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            raise BadRow(f"{where}: {name} must be {' or '.join(k.__name__ for k in kind)}, got {row.get(name)!r}.")


def _texts(where: str, row: Row, name: str) -> None:
    turns = checked_list(row.get(name), where, name)
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRow(f"{where}: {name} must be a list of texts.")
