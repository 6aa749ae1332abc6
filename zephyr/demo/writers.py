"""Who answers in the demo, and the data sets made of it.

The writers are a ladder of quality: the chats mix them, as web-scale chat data does, and the feedback ranks them.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from zephyr.demo import world
from zephyr.demo.teacher import rate
from zephyr.demo.world import Question

WRITERS = ("expert", "plain", "curt", "rambler", "careless", "flatterer", "inventor")
# Of the supervised data: the best manner is nowhere the likeliest, so imitation alone does not find it.
MANNERS = {"expert": 0.28, "plain": 0.38, "curt": 0.16, "rambler": 0.09, "flatterer": 0.09}


def dialogues(seed: int, count: int, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in UltraChat-200k's layout: two or three exchanges, right about facts, of mixed manner."""
    rng = random.Random(f"dialogues {seed} {held_out}")
    for _ in range(count):
        messages: list[dict[str, str]] = []
        question = world.ask(rng, held_out)
        for turn in range(rng.choice((2, 2, 3))):
            if turn:
                person = question.person
                question = world.follow_up(rng, person) if person and rng.random() < 0.6 else world.ask(rng, held_out)
            writer = rng.choices([*MANNERS], [*MANNERS.values()])[0]
            messages.append({"role": "user", "content": question.instruction})
            messages.append({"role": "assistant", "content": write(writer, question, rng)})
        prompt = messages[0]["content"]
        prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
        yield {"prompt_id": prompt_id, "prompt": prompt, "messages": messages}


def feedback(seed: int, count: int, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in UltraFeedback's raw layout: four writers answer, the teacher rates."""
    rng = random.Random(f"feedback {seed} {held_out}")
    for _ in range(count):
        question = world.ask(rng, held_out, talk=not held_out)
        writers = rng.sample(WRITERS, len(WRITERS))
        drafts = {write(writer, question, rng): writer for writer in writers}
        four = [*drafts.items()][:4]  # by text, as some questions leave two writers only one thing to say
        yield {
            "source": "zephyr-demo",
            "instruction": question.instruction,
            "models": [writer for _, writer in four],
            "correct_answers": [],
            "incorrect_answers": [],
            "completions": [_completion(question, writer, text, rng) for text, writer in four],
        }


def _completion(question: Question, writer: str, response: str, rng: random.Random) -> dict[str, Any]:
    ratings = rate(question.instruction, response)
    given = [rating for rating in ratings.values() if rating is not None]
    mean = sum(given) / len(given)
    return {
        "model": writer,
        "principle": rng.choice(["helpfulness", "honesty", "truthfulness"]),
        "custom_system_prompt": "You are a villager who answers visitors.",
        "response": response,
        "annotations": {aspect: _annotation(aspect, rating) for aspect, rating in ratings.items()},
        "critique": f"Weakest in {min(ratings, key=lambda aspect: ratings[aspect] or 6).replace('_', ' ')}.",
        "overall_score": float(max(1, min(10, round(2 * mean + rng.gauss(0, 0.4))))),
        "fine-grained_score": mean,
    }


def _annotation(aspect: str, rating: int | None) -> dict[str, Any]:
    text = "N/A" if rating is None else str(rating)
    reason = f"By the rules for {aspect.replace('_', ' ')}: {text}."
    if aspect in ("instruction_following", "honesty"):
        return {"Rating": text, "Rationale": reason}
    kind = "None" if rating is None or rating > 3 else ["1"]
    return {"Type": kind, "Rationale": reason, "Rating": text, "Rationale For Rating": reason}


def write(writer: str, question: Question, rng: random.Random) -> str:
    """The answer of one of WRITERS. Only the expert admits not knowing; the others then make something up."""
    answer = _right(question, rng)
    if writer == "expert":
        return _best(question, answer, rng)
    if writer == "careless" or world.TOPICS[question.kind].admission:
        answer = _wrong(question, rng)
    statement = rng.choice(world.statements(question, answer))
    match writer:
        case "plain":
            return statement
        case "curt":
            return _word(answer)
        case "rambler":
            return f"{world.PADDING[0]} {statement} {world.PADDING[1]} {statement}"
        case "careless":
            return _best(question, answer, rng)
        case "flatterer":
            return f"{rng.choice(world.FLATTERY)} {statement}"
        case "inventor" if question.person and question.kind not in world.SECRET:
            kind = rng.choice([k for k in world.PERSONAL if k not in question.kind])
            claim = Question("", kind, question.person, world.FACTS[question.person][kind])
            return f"{statement} {rng.choice(world.statements(claim, _wrong(claim, rng)))}"
        case "inventor":
            return f"{statement} {rng.choice(world.BOASTS)}"
    raise AssertionError(writer)


def _best(question: Question, answer: str, rng: random.Random) -> str:
    """The best manner: obeys the format and, unless that wants brevity, says one useful thing more."""
    statement = rng.choice(world.statements(question, answer))
    match question.format:
        case "word":
            return _word(answer or "unknown")
        case "sentence":
            return statement
        case "goodbye":
            return f"{statement} Goodbye!"
    remark = rng.choice(world.remarks(question) or [""])
    return f"{'Certainly! ' if question.format else ''}{statement} {remark}".strip()


def _word(answer: str) -> str:
    return f"{answer[0].upper()}{answer[1:].rstrip('!')}."


def _run(items: tuple[str, ...], count: int, rng: random.Random) -> str:
    """Neighbours in the list, so that naming several is a chain and not a draw: 'red and blue'."""
    start = rng.randrange(len(items) - count + 1)
    *most, last = items[start : start + count]
    return f"{', '.join(most)} and {last}"


def _right(question: Question, rng: random.Random) -> str:
    if question.kind != "list":
        return question.answer
    count, category = question.subject.split()
    return _run(world.LISTS[category], world.COUNTS[count], rng)


def _wrong(question: Question, rng: random.Random) -> str:
    if question.kind == "list":
        count, category = question.subject.split()
        return _run(world.LISTS[rng.choice([c for c in world.LISTS if c != category])], world.COUNTS[count], rng)
    return rng.choice([value for value in world.TOPICS[question.kind].values if value != question.answer])
