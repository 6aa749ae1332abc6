"""A prompt's completions and what the judge said of them, as a record in UltraFeedback's raw layout.

Theirs (Cui et al., 2023): source, instruction, models, correct_answers, incorrect_answers, and of each completion
model, principle, custom_system_prompt, response, annotations, critique, overall_score, fine-grained_score. Ratings are
texts ("4", "N/A"). What is missing is absent (an aspect) or None (a score), never a number. No aspect has a `Type`, as
this judge is not asked for kinds of errors. A critique ends with its "Overall Score: N": that tells a true ten from
UltraFeedback's ones that became tens.

Ours: prompt_id, judges, judgements (all replies of the judge as they came), cost, and of each completion generation.
The cost of a record is that of its replies, each counted once: two texts that are the same share one critique.
Nothing here depends on the clock or on how often a request was sent.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zephyr.feedback.draw import Drawn
from zephyr.feedback.judge import ASPECTS, CRITIQUE, Ask, Rubric
from zephyr.feedback.request import Failure, Reply
from zephyr.feedback.verdict import Critique, Rated, Unreadable, read_critique, read_ratings

_TWO_PART = ("truthfulness", "helpfulness")  # aspects whose rationale has two keys in UltraFeedback


class Made(NamedTuple):
    """A completion that was asked for, and what came."""

    drawn: Drawn
    reply: Reply | Failure


class Recorded(NamedTuple):
    """What became of a prompt."""

    row: dict[str, Any] | None  # None where fewer than two models answered
    failures: list[dict[str, Any]]  # prompt_id, model, stage, aspect, judgement, cause, detail


Told = tuple[Ask, Reply | Failure]
_Readings = dict[tuple[str, int], list[Rated]]


def usable(made: Sequence[Made]) -> dict[int, str]:
    """The completions that have a text, by number: what the judge is shown and the record holds."""
    return {number: one.reply.text.strip() for number, one in enumerate(made) if _fault(one.reply) is None}  # type: ignore[union-attr]


def record(
    prompt: str, source: str, made: Sequence[Made], told: Iterable[Told], rubrics: Mapping[str, Rubric]
) -> Recorded:
    """The record of a prompt. `told` are the judge's requests for `usable(made)` with what came of each, in any order.

    Of two judgements an aspect's rating is the mean of those that are numbers; N/A where none is and one says so.
    """
    prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
    texts = usable(made)
    failures: list[dict[str, Any]] = []

    def failed(model: str | None, stage: str, ask: Ask | None, cause: str, detail: str) -> None:
        aspect, judgement = (ask.aspect, ask.judgement) if ask else (None, None)
        row = {"prompt_id": prompt_id, "model": model, "stage": stage, "aspect": aspect, "judgement": judgement}
        failures.append({**row, "cause": cause, "detail": detail})

    for one in made:
        if fault := _fault(one.reply):
            failed(one.drawn.model, "generate", None, *fault)
    if len(texts) < 2:
        failed(None, "generate", None, "too_few_completions", f"{len(texts)} of {len(made)} have a text")
        return Recorded(None, failures)
    places = {number: place for place, number in enumerate(texts)}  # of a completion in the record
    ratings: _Readings = {}
    critiques: dict[int, Critique] = {}
    judgements: list[dict[str, Any]] = []
    costs = {one.drawn.model: one.reply.cost for one in made if isinstance(one.reply, Reply)}  # each in USD
    for ask, reply in sorted(told, key=_by_kind):
        model = made[ask.order[0]].drawn.model if ask.aspect == CRITIQUE else None
        if isinstance(reply, Failure):
            failed(model, "judge", ask, reply.cause, reply.detail)
            continue
        costs[ask.request.key] = reply.cost
        read = _read(ask, reply, rubrics[ask.aspect])
        judgements.append(
            {
                "aspect": ask.aspect,
                "judgement": ask.judgement,
                "order": [places[number] for number in ask.order],
                "ratings": [_written(verdict) for verdict in read],
                "judge": reply.model,
                "reply": reply.text,
                **_usage(reply),
            }
        )
        unread = [verdict for verdict in read if isinstance(verdict, Unreadable)]
        if len(unread) == len(read) > 1 and len({verdict.cause for verdict in unread}) == 1:
            failed(None, "judge", ask, *unread[0])  # the reply as a whole
            unread = []
        for number, verdict in zip(ask.order, read, strict=True):
            if isinstance(verdict, Unreadable):
                if unread:
                    failed(made[number].drawn.model, "judge", ask, *verdict)
            elif isinstance(verdict, Critique):
                critiques[number] = verdict
            else:
                ratings.setdefault((ask.aspect, number), []).append(verdict)
    completions = [
        _completion(made[number], text, {a: ratings.get((a, number), []) for a in ASPECTS}, critiques.get(number))
        for number, text in texts.items()
    ]
    row = {
        "source": source,
        "instruction": prompt,
        "models": [completion["model"] for completion in completions],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "prompt_id": prompt_id,
        "judges": sorted({judgement["judge"] for judgement in judgements}),
        "judgements": judgements,
        "cost": _sum(costs.values()),
    }
    return Recorded(row, failures)


def judged_twice(row: Mapping[str, Any]) -> Iterator[tuple[str, list[float | None], list[float | None]]]:
    """Of each aspect that a record has two judgements of, the ratings of both, in the order of the completions."""
    found: dict[str, dict[int, list[float | None]]] = {aspect: {} for aspect in ASPECTS}
    for item in row["judgements"]:
        if item["aspect"] in found:
            known = dict(zip(item["order"], item["ratings"], strict=True))
            numbers = [known.get(place) for place in range(len(row["completions"]))]
            found[item["aspect"]][item["judgement"]] = [
                None if number in (None, "N/A") else float(number) for number in numbers
            ]
    for aspect, judged in found.items():
        if judged.keys() >= {0, 1}:
            yield aspect, judged[0], judged[1]


def _fault(reply: Reply | Failure) -> tuple[str, str] | None:
    """Why a completion cannot be used: cause and detail."""
    if isinstance(reply, Failure):
        return reply.cause, reply.detail
    if not reply.text.strip():
        return "empty_response", f"finish_reason {reply.finish_reason}"
    return None


def _read(ask: Ask, reply: Reply, rubric: Rubric) -> Sequence[Rated | Critique | Unreadable]:
    finished = reply.finish_reason != "length"
    if ask.aspect == CRITIQUE:
        return [read_critique(reply.text, rubric.top, finished=finished)]
    return read_ratings(reply.text, len(ask.order), rubric.top, rubric.not_applicable, mark=ask.mark, finished=finished)


def _completion(made: Made, text: str, read: Mapping[str, list[Rated]], critique: Critique | None) -> dict[str, Any]:
    values = {aspect: _mean([one.rating for one in verdicts]) for aspect, verdicts in read.items()}
    annotations = {}
    for aspect, verdicts in read.items():
        if verdicts:
            rationale = next((one.rationale for one in verdicts if one.rating is not None), verdicts[0].rationale)
            annotations[aspect] = {"Rating": _text(values[aspect]), "Rationale": rationale}
            if aspect in _TWO_PART:
                annotations[aspect]["Rationale For Rating"] = rationale
    reply = made.reply
    assert isinstance(reply, Reply)
    return {
        "model": made.drawn.model,
        "principle": made.drawn.principle,
        "custom_system_prompt": made.drawn.system,
        "response": text,
        "annotations": annotations,
        "critique": f"{critique.feedback}\nOverall Score: {critique.score:g}" if critique else None,
        "overall_score": critique.score if critique else None,
        "fine-grained_score": _mean(list(values.values())),
        "generation": {"model": reply.model, **_usage(reply)},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _written(verdict: Rated | Critique | Unreadable) -> str | None:
    if isinstance(verdict, Unreadable):
        return None
    return _text(verdict.score if isinstance(verdict, Critique) else verdict.rating)


def _text(value: float | None) -> str:
    return "N/A" if value is None else f"{value:g}"


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cached_tokens": reply.cached_tokens,
        "cost": reply.cost,
    }


def _sum(costs: Collection[float | None]) -> float | None:
    """None where one is not known."""
    known = [cost for cost in costs if cost is not None]
    return math.fsum(known) if len(known) == len(costs) else None


def _by_kind(told: Told) -> tuple[int, int, tuple[int, ...]]:
    return told[0].judgement, [*ASPECTS, CRITIQUE].index(told[0].aspect), told[0].order
