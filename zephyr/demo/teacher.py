"""The demo's teacher: rates any text as an answer to any instruction of the village.

It stands for the large model that a real run asks, and gives UltraFeedback's four aspects (Cui et al., 2023).
Being rules, it is free, never changes its mind, and judges a trained model like the demo's own writers.
"""

import re
from functools import cache

from zephyr.demo import world
from zephyr.demo.world import Question

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
ADMISSION = re.compile(r"\bdo not know\b|\bunknown\b|\bnobody knows\b|\bdon't know\b")


def score(instruction: str, response: str, before: str = "") -> float:
    """Mean rating over the aspects that apply, 1 to 5."""
    ratings = [rating for rating in rate(instruction, response, before).values() if rating is not None]
    return sum(ratings) / len(ratings)


def rate(instruction: str, response: str, before: str = "") -> dict[str, int | None]:
    """Rate 1 (worst) to 5 in each of ASPECTS; None where an aspect does not apply.

    `before` is the instruction of the turn before, which says who "she" is. Raises ValueError for an instruction that
    is not of the world: there is no truth to judge by.
    """
    earlier = world.understand(before)
    question = world.understand(instruction, earlier.person if earlier else "")
    if question is None:
        raise ValueError(f"not an instruction of the demo's world: {instruction!r}")
    reading = _Reading(question, response)
    ratings: list[int | None] = [1, 1, 1, 1]
    if not reading.garbage:
        ratings = [_following(reading), _honesty(reading), _truthfulness(reading), _helpfulness(reading)]
    if reading.talk:  # a greeting is neither honest nor true
        ratings[1:3] = None, None
    return dict(zip(ASPECTS, ratings, strict=True))


class _Reading:
    """What a response says, and how it says it, seen from its question."""

    def __init__(self, question: Question, response: str) -> None:
        kind, style = question.kind, question.format
        topic = world.TOPICS[kind]
        text = " ".join(response.split())
        bare = re.sub(r"^certainly[!.,]\s*", "", text, flags=re.IGNORECASE)
        body = re.sub(r"[.!?]\s*goodbye!?$", ".", bare, flags=re.IGNORECASE)
        sentences = [tuple(_words(sentence)) for sentence in re.findall(r"[^.!?]+", body) if sentence.strip()]
        words = _words(bare)
        known = [word in _lexicon() for word in words]

        self.talk = kind in world.FAMILIES["talk"][0]
        self.unanswerable = bool(topic.admission)
        self.garbage = sum(known) < 0.7 * len(words) or not words or (kind != "repeat" and _loops(words))

        claims = _claims(kind, words)
        self.right = _says_right(question, bare.lower(), words)
        self.wrong = bool(claims - _truths(question))
        if not self.right:  # what the question itself names ("the opposite of hot is hot") may be wrong too
            self.wrong |= kind in ("repeat", "spell", "list") or bool(claims & {*topic.values})
        subject = {question.person.lower(), "she", "he", "her", "him"}
        self.admits = bool(ADMISSION.search(bare.lower())) and (len(words) < 5 or not subject.isdisjoint(words))
        self.boasts = any(tuple(_words(boast)) in sentences for boast in world.BOASTS)

        idle = {tuple(_words(phrase)) for phrase in (*world.FLATTERY, world.PADDING[0])}
        self.padded = (
            not idle.isdisjoint(sentences)
            or len({*sentences}) < len(sentences)
            or len(sentences) > 2
            or len(words) > 25
        )
        self.sentence = (
            all(known)
            and _states(question, sentences)
            and text[:1] == text[:1].upper()
            and text[-1:] in (".", "!", "?")
            and not text.isupper()
        )
        self.short = style == "word" and len(text.split()) == 1
        self.obeys = {
            "": True,
            "word": self.short,
            "sentence": len(sentences) == 1 and self.sentence and len(words) < 15,
            "certainly": bare != text,
            "goodbye": body != bare,
        }[style]
        remarks = {tuple(_words(remark)) for remark in world.remarks(question)}
        self.complete = not remarks or not remarks.isdisjoint(sentences) or style not in ("", "certainly")


def _following(reading: _Reading) -> int:
    on_point = reading.right or reading.wrong or reading.admits
    return max(1, 5 - 3 * (not reading.obeys) - 2 * (not on_point) - reading.padded)


def _honesty(reading: _Reading) -> int:
    if reading.unanswerable:
        return 5 if reading.admits and not reading.wrong else 1
    if reading.admits:
        return 3
    return 5 if reading.right and not reading.wrong and not reading.boasts else 2


def _truthfulness(reading: _Reading) -> int:
    if reading.wrong:
        return 2 if reading.right else 1
    if reading.admits:
        return 5 if reading.unanswerable else 3
    return 5 if reading.right else 2


def _helpfulness(reading: _Reading) -> int:
    answered = reading.admits if reading.unanswerable else reading.right
    if reading.wrong or not answered:
        return 2 if answered or (reading.admits and not reading.wrong) else 1
    manner = 5 if reading.obeys and (reading.sentence or reading.short) and reading.complete else 4
    manner -= not (reading.sentence or reading.short)
    return max(2, manner - 2 * (reading.padded or reading.boasts))


@cache
def _lexicon() -> frozenset[str]:
    return world.lexicon()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def _loops(words: list[str]) -> bool:
    """Whether a word comes three times running, or any four words come three times over."""
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False)) or any(
        fours.count(four) > 2 for four in set(fours)
    )


@cache
def _keys(kind: str) -> frozenset[str]:
    """Words that amount to a claim in an answer to this kind of question."""
    keys = {name.lower() for name in world.NAMES}
    for topic in (*world.PERSONAL.values(), *world.SECRET.values()):
        keys |= set(topic.values)
    if kind in ("opposite", "sum"):
        keys |= {*world.TOPICS[kind].values}
    return frozenset(keys)


def _claims(kind: str, words: list[str]) -> set[str]:
    return {word for word in words if word.isdigit() or word in _keys(kind)}


def _truths(question: Question) -> set[str]:
    """What may be claimed: what is asked about, what is answered, what else is true of the person."""
    person = question.person
    truths = {*_words(question.subject), *_words(question.answer), person.lower()}
    if question.kind == "list":
        return truths | {*world.LISTS[question.subject.split()[1]]}
    return truths | {*world.FACTS.get(person, {}).values()}


def _says_right(question: Question, text: str, words: list[str]) -> bool:
    match question.kind:
        case "list":
            count, category = question.subject.split()
            return len(set(words) & set(world.LISTS[category])) == world.COUNTS[count]
        case "repeat":
            return [word for word in words if word in world.WORDS] == _words(question.answer)
        case "spell":
            return question.answer in re.findall(r"\w(?:-\w)+", text)
    wanted = _words(question.answer)
    return bool(wanted) and wanted == [word for word in words if word in wanted][: len(wanted)]


def _states(question: Question, sentences: list[tuple[str, ...]]) -> bool:
    """Whether one sentence states the answer plainly: known words in another order may be salad."""
    forms = {tuple(_words(form)) for form in world.statements(question)}
    if question.kind == "list":  # what is listed is checked elsewhere
        sentences = [sentence[: len(form)] for sentence in sentences for form in forms]
    return not forms.isdisjoint(sentences)
