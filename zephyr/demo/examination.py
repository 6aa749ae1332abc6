"""What the demo's models are examined with, in the layouts of the benchmarks, and asked for feedback on.

Questions are held out: no training file has them. Prompts for feedback are those that training files may have.
"""

import random
from collections.abc import Iterator
from typing import Any

from zephyr.demo import world
from zephyr.demo.world import Question
from zephyr.demo.writers import write

CATEGORIES = ("people", "who", "secret", "opposite", "words", "sum")  # families with held-out questions
BASELINE = "plain"


def two_turns(seed: int, of_each: int) -> Iterator[dict[str, Any]]:
    """Rows of an MT-Bench question file. Second turns speak of the same villager, as she or he, where there is one;
    `reference` stands where one answer is right in both turns."""
    rng = random.Random(f"two turns {seed}")
    for category in CATEGORIES:
        asked = _held_out(category)
        for number, first in enumerate(rng.sample(asked, of_each)):
            second = rng.choice(world.follow_ups(first) or [q for q in asked if q != first])
            row = {
                "question_id": 100 * CATEGORIES.index(category) + 101 + number,
                "category": category,
                "turns": [first.instruction, second.instruction],
            }
            if first.answer and second.answer:
                row["reference"] = [world.statements(turn)[0] for turn in (first, second)]
            yield row


def against_baseline(seed: int, count: int) -> list[dict[str, str]]:
    """An AlpacaEval file: instructions, and what the plain writer says to them."""
    rng = random.Random(f"against baseline {seed}")
    asked = [(category, question) for category in CATEGORIES for question in _held_out(category)]
    return [
        {
            "dataset": category,
            "instruction": question.instruction,
            "output": write(BASELINE, question, rng),
            "generator": BASELINE,
        }
        for category, question in rng.sample(asked, count)
    ]


def prompts(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Different questions to collect feedback on."""
    rng = random.Random(f"prompts {seed}")
    seen = set[str]()
    while len(seen) < count:
        question = world.ask(rng, held_out=False, talk=False)
        if question.instruction not in seen:
            seen.add(question.instruction)
            yield {"prompt": question.instruction, "source": "zephyr-demo"}


def _held_out(category: str) -> list[Question]:
    kinds, _ = world.FAMILIES[category]
    return [question for question in world.bank().values() if question.kind in kinds and question.held_out]
