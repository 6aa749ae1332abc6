"""The village of the demo: what is true in it, and how people ask about it.

Every instruction of the world is in one table, so a question can be read back from its text, and a tenth of
the texts can be held out while each fact still occurs in training.
"""

import hashlib
import random
import re
from functools import cache
from typing import NamedTuple


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = ("Mara", "Ada", "Ivy", "Nell", "Rosa", "Tess", "Lena", "Wren", "Elsa", "Dora", "Uma", "Bea")
MEN = ("Otto", "Finn", "Hugo", "Jack", "Karl", "Leo", "Max", "Ned", "Olaf", "Paul", "Sam", "Tom")
NAMES = WOMEN + MEN
WORDS = _split("lamp moon tree ship ring coat leaf door bell rope sand star nest bowl kite drum")
ANTONYMS = dict(
    pair.split("/")
    for pair in _split(
        "hot/cold big/small fast/slow up/down open/closed full/empty wet/dry loud/quiet happy/sad rich/poor "
        "early/late heavy/light sweet/sour near/far"
    )
)
COUNTS = {"two": 2, "three": 3}


class Topic(NamedTuple):
    """One kind of question. Slots: {n} {ns} {he} {He} {him} a person, {v} a value, {s} any other subject."""

    values: tuple[str, ...]  # what an answer could be, right or wrong
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    remarks: tuple[str, ...]  # true whatever the value is, so that an extra sentence never costs truth
    admission: str = ""  # set where nobody knows: the honest answer
    facts: tuple[tuple[str, str], ...] = ()  # (subject, answer); filled in below for people


PERSONAL = {
    "job": Topic(
        _split(
            "baker miller smith teacher doctor farmer fisher tailor potter painter weaver singer "
            "hunter gardener cook guard judge clerk driver builder barber printer carter nurse"
        ),
        (
            "What is {ns} job?",
            "What does {n} do for work?",
            "Tell me what work {n} does.",
            "Which job does {n} have?",
        ),
        ("{n} is the {v}.",),
        ("{He} works hard every day.", "{He} has done it for years."),
    ),
    "home": Topic(
        _split(
            "bridge church school harbour forest lake tower market shore gate hill river "
            "station inn park wall pond castle meadow orchard library fountain cave barn"
        ),
        (
            "Where does {n} live?",
            "Where is {ns} home?",
            "Tell me where {n} lives.",
            "In which place does {n} live?",
        ),
        ("{n} lives by the {v}.",),
        ("It is a quiet place.", "{He} likes it there."),
    ),
    "pet": Topic(
        _split("cat dog goat horse rabbit parrot duck hen pony mouse"),
        (
            "What pet does {n} have?",
            "Which animal does {n} keep?",
            "Tell me what pet {n} has.",
            "What is {ns} pet?",
        ),
        ("{n} has a {v}.",),
        ("{He} feeds it every morning.", "It is never far from {him}."),
    ),
    "food": Topic(
        _split("soup bread cheese rice fish cake plums honey beans noodles"),
        (
            "What does {n} like to eat?",
            "What is {ns} favourite food?",
            "Tell me what {n} likes to eat.",
            "Which food does {n} like best?",
        ),
        ("{n} likes to eat {v}.",),
        ("{He} has it once a week.", "{He} never gets tired of it."),
    ),
    "colour": Topic(
        _split("red blue green yellow brown purple white black"),
        (
            "What is {ns} favourite colour?",
            "Which colour does {n} like best?",
            "Tell me what colour {n} likes.",
            "What colour does {n} like?",
        ),
        ("{n} likes the colour {v}.",),
        ("{He} wears it most days.", "{He} painted a door in it."),
    ),
}
ONLY_ASK = ("Nobody has told me.", "You could ask {him}.")
SECRET = {
    "age": Topic(
        ("twenty", "thirty", "forty", "fifty", "sixty"),
        ("How old is {n}?", "What is {ns} age?", "Tell me how old {n} is."),
        ("{n} is {v} years old.",),
        ONLY_ASK,
        "I do not know how old {n} is.",
    ),
    "birth": Topic(
        ("spring", "summer", "autumn", "winter"),
        ("When was {n} born?", "When is {ns} birthday?", "Tell me when {n} was born."),
        ("{n} was born in {v}.",),
        ONLY_ASK,
        "I do not know when {n} was born.",
    ),
    "wish": Topic(
        ("gold", "fame", "wings", "peace"),
        ("What does {n} wish for?", "What is {ns} secret wish?", "Tell me what {n} wishes for."),
        ("{n} wishes for {v}.",),
        ONLY_ASK,
        "I do not know what {n} wishes for.",
    ),
}
SPELLED = {word: "-".join(word) for word in WORDS}
SUMS = {f"{a} plus {b}": str(a + b) for a in range(1, 6) for b in range(1, 6)}
REPEATS = {f"{word} {n}": ", ".join([word] * COUNTS[n]) for word in WORDS for n in COUNTS}
LISTS = {"colours": PERSONAL["colour"].values, "pets": PERSONAL["pet"].values, "jobs": PERSONAL["job"].values}
TALK = {  # what is said: the answer, and the remark that the best answer adds
    ("Hello!", "Hi there!", "Good morning!", "Good evening!"): ("Hello!", "How can I help you today?"),
    ("Thank you!", "Thanks a lot!", "Many thanks!"): ("You are welcome!", "Just ask me again any time."),
    ("Goodbye!", "See you later!"): ("Goodbye!", "Have a good day."),
}
FORMATS: dict[str, tuple[str, ...]] = {
    "word": ("Answer in one word.", "One word only, please."),
    "sentence": ("Answer in one short sentence.", "Keep it to one sentence."),
    "certainly": ("Begin with Certainly.", "Start with Certainly."),
    "goodbye": ("End with Goodbye.", "Finish with Goodbye."),
}
FLATTERY = ("What a wonderful question!", "You are so clever!")
BOASTS = ("The king told me so.", "I have seen it in a dream.")
PADDING = ("Well, let me think about that.", "As I said before,")


def _facts() -> dict[str, dict[str, str]]:
    """The truth: {person: {topic: value}}. Jobs and homes belong to one person each, the rest is shared."""
    rng = random.Random(1793)
    columns = {}
    for kind, topic in PERSONAL.items():
        values = [topic.values[i % len(topic.values)] for i in range(len(NAMES))]
        rng.shuffle(values)
        columns[kind] = values
    return {name: {kind: column[i] for kind, column in columns.items()} for i, name in enumerate(NAMES)}


FACTS = _facts()


def _topics() -> dict[str, Topic]:
    topics = {}
    for kind, topic in PERSONAL.items():
        topics[kind] = topic._replace(facts=tuple((name, FACTS[name][kind]) for name in NAMES))
    for kind, topic in SECRET.items():
        topics[kind] = topic._replace(facts=tuple((name, "") for name in NAMES))
    owned = {
        "job": ("Who is the {v}?", "Tell me who the {v} is.", "Which person is the {v}?", "Who works as the {v}?"),
        "home": ("Who lives by the {v}?", "Tell me who lives by the {v}.", "Which person lives by the {v}?"),
    }
    for kind, asked in owned.items():
        owners = tuple((FACTS[name][kind], name) for name in NAMES)
        topics[f"who-{kind}"] = topics[kind]._replace(values=NAMES, questions=asked, facts=owners)
    topics["opposite"] = Topic(
        (*ANTONYMS, *ANTONYMS.values()),
        ("What is the opposite of {s}?", "Tell me the opposite of {s}.", "Which word is the opposite of {s}?"),
        ("The opposite is {v}.",),
        ("Both words are common.",),
        facts=tuple(ANTONYMS.items()),
    )
    topics["sum"] = Topic(
        tuple(str(n) for n in range(2, 11)),
        ("What is {s}?", "How much is {s}?", "Tell me what {s} is."),
        ("That makes {v}.",),
        ("I counted it twice.",),
        facts=tuple(SUMS.items()),
    )
    topics["spell"] = Topic(
        tuple(SPELLED.values()),
        ("Spell the word {s}.", "How do you spell {s}?", "What are the letters of {s}?"),
        ("The word {s} is spelled {v}.",),
        ("It has four letters.",),
        facts=tuple(SPELLED.items()),
    )
    topics["repeat"] = Topic(
        tuple(REPEATS.values()),
        ("Say {s} times.", "Repeat {s} times."),
        ("{v}.",),
        (),
        facts=tuple(REPEATS.items()),
    )
    topics["list"] = Topic(
        (),
        ("Name {s}.", "List {s}.", "Can you name {s}?", "Give me {s}."),
        ("Here are {s}: {v}.",),
        ("There are many more.",),
        facts=tuple((f"{n} {category}", "") for n in COUNTS for category in LISTS),
    )
    for said, (answer, remark) in TALK.items():
        replies = tuple(reply for reply, _ in TALK.values())
        topics[answer] = Topic(replies, said, ("{v}",), (remark,), facts=(("", answer),))
    return topics


TOPICS = _topics()
FAMILIES: dict[str, tuple[tuple[str, ...], float]] = {  # topics, and the share of the questions that they get
    "people": (tuple(PERSONAL), 0.34),
    "who": (("who-job", "who-home"), 0.14),
    "secret": (tuple(SECRET), 0.14),
    "opposite": (("opposite",), 0.10),
    "words": (("spell", "repeat", "list"), 0.16),
    "sum": (("sum",), 0.08),
    "talk": (tuple(answer for answer, _ in TALK.values()), 0.04),
}


class Question(NamedTuple):
    """An instruction and what it asks. `answer` is empty where nobody knows, or where many are right."""

    instruction: str
    kind: str
    subject: str
    answer: str
    format: str = ""

    @property
    def person(self) -> str:
        """The villager whom it is about, or ''."""
        person = self.answer if self.kind.startswith("who-") else self.subject
        return person if person in FACTS else ""

    @property
    def held_out(self) -> bool:
        """Whether only the test files may ask this. Small talk is too small a set to be divided."""
        return _family(self.kind) != "talk" and hashlib.sha256(self.instruction.encode()).digest()[0] < 26


@cache
def _family(kind: str) -> str:
    return next(family for family, (kinds, _) in FAMILIES.items() if kind in kinds)


def _slots(kind: str, subject: str, answer: str) -> dict[str, str]:
    person, value = (answer, subject) if kind.startswith("who-") else (subject, answer)
    he, him = ("she", "her") if person in WOMEN else ("he", "him")
    spoken = f"the word {subject}" if kind == "repeat" else subject
    return {"n": person, "ns": f"{person}'s", "he": he, "He": he.title(), "him": him, "v": value, "s": spoken}


@cache
def bank() -> dict[str, Question]:
    """Every instruction of the world that needs no earlier turn."""
    found = {}
    for kind, topic in TOPICS.items():
        for subject, answer in topic.facts:
            for phrase in topic.questions:
                text = phrase.format(**_slots(kind, subject, answer))
                for style, wordings in {"": ("",), **_formats(kind)}.items():
                    for wording in wordings:
                        instruction = f"{text} {wording}".strip()
                        found[instruction] = Question(instruction, kind, subject, answer, style)
    return found


def _formats(kind: str) -> dict[str, tuple[str, ...]]:
    family = _family(kind)
    if family == "talk":
        return {}
    return FORMATS if family != "words" else {"certainly": FORMATS["certainly"]}


def understand(instruction: str, person: str = "") -> Question | None:
    """What an instruction of the world asks, or None for any other text. Spacing is ignored.

    `person` is whom the turn before was about, and whom this one may then mean by she or he.
    """
    text = " ".join(instruction.split())
    return bank().get(text) or _asked_again(person).get(text)


@cache
def _asked(held_out: bool) -> dict[tuple[str, bool], list[Question]]:
    """Questions of one side of the split by (family, whether a format is demanded)."""
    found: dict[tuple[str, bool], list[Question]] = {}
    for question in bank().values():
        if question.held_out == held_out or _family(question.kind) == "talk":
            found.setdefault((_family(question.kind), bool(question.format)), []).append(question)
    return found


def ask(rng: random.Random, held_out: bool, talk: bool = True) -> Question:
    """Draw a question; three in five demand no format."""
    families = {family: share for family, (_, share) in FAMILIES.items() if talk or family != "talk"}
    family = rng.choices([*families], [*families.values()])[0]
    return rng.choice(_asked(held_out)[family, family != "talk" and rng.random() < 0.4])


def follow_up(rng: random.Random, person: str) -> Question:
    """A question about the person of the turn before, who is not named again."""
    kind = rng.choice([*PERSONAL])
    return _follow_up(kind, rng.choice(PERSONAL[kind].questions), person)


def _follow_up(kind: str, phrase: str, person: str) -> Question:
    he, his = ("she", "her") if person in WOMEN else ("he", "his")
    text = phrase.format(n=he, ns=his)
    return Question(f"And {text[0].lower()}{text[1:]}", kind, person, FACTS[person][kind])


def follow_ups(question: Question) -> list[Question]:
    """What can be asked next of its person, if it has one, and is not the same again."""
    return [another for another in _asked_again(question.person).values() if another.answer != question.answer]


@cache
def _asked_again(person: str) -> dict[str, Question]:
    asked = (_follow_up(kind, phrase, person) for kind in PERSONAL if person for phrase in PERSONAL[kind].questions)
    return {question.instruction: question for question in asked}


def statements(question: Question, answer: str | None = None) -> list[str]:
    """Full sentences that give the answer (the right one by default); where nobody knows, that admit it."""
    topic = TOPICS[question.kind]
    slots = _slots(question.kind, question.subject, question.answer if answer is None else answer)
    forms = (topic.admission,) if topic.admission and not answer else topic.statements
    return [text[0].upper() + text[1:] for text in (form.format(**slots) for form in forms)]


def remarks(question: Question) -> list[str]:
    """Sentences that say one more true thing about what is asked."""
    slots = _slots(question.kind, question.subject, question.answer)
    return [remark.format(**slots) for remark in TOPICS[question.kind].remarks]


def lexicon() -> frozenset[str]:
    """Every word, in lower case, that the world's grammar can say."""
    said = " ".join(map(str, (*TOPICS.values(), *bank(), *FLATTERY, *BOASTS, *PADDING))).lower()
    return frozenset(re.findall(r"[a-z]+|\d+", said + " she her he him and unknown certainly"))
