"""What a dialogue may be rejected for: refusals, personas, odd openings, broken or cut turns, order, length, language.

Every rule is a pure function of the messages, can be switched off, and says which text it met. They follow section 4.1
of Tunstall et al. (2023), "Zephyr: Direct Distillation of LM Alignment", whose own filters were never published.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from zephyr.data.messages import Message
from zephyr.errors import UserError

# In the order in which they are asked: what costs little first, and structure before what is said.
RULES = ("alternation", "empty", "length", "broken", "cut", "refusal", "persona", "opening", "language")

_EVIDENCE = 80  # characters
_CONTRACTIONS = {
    "i am": ("i'm",),
    "i have": ("i've",),
    "do not": ("don't",),
    "does not": ("doesn't",),
    "did not": ("didn't",),
    "have not": ("haven't",),
    "is not": ("isn't",),
    "cannot": ("can not", "can't"),
    "could not": ("couldn't",),
    "will not": ("won't",),
}
_LONG = re.compile(rf"(?<!\w)({'|'.join(_CONTRACTIONS)})(?!\w)")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd\ufffe\uffff]")
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u00ad\u200b\u200c\u200d\u2060\ufeff"
# Marks of punctuation, without those that are also operators: "*" can be the whole of a good answer.
_PUNCTUATION_ONLY = re.compile(r"[\s.,:;!?'\"()\[\]{}_\u00a1\u00ab\u00bb\u00bf\u2010-\u2027\u3001\u3002-]+")
_LOOP_REPEATS, _LOOP_CHARACTERS = 10, 200
# Words that no sentence ends in; a, in, to, for and with can ("vitamin A", "log in", "what is it for").
_UNFINISHED = re.compile(r"\b(?:the|an|and|or|of|your|my|our|their|because|than|into)\Z")
_OPENING_FENCE = re.compile(r"(?<!\S)```[\w+#.-]+[^\S\n]*(?:\n|\Z)")  # with the name of a language
_CLAUSE_WORDS = 5  # of a line that ends in a comma; a letter's "Yours sincerely," is complete

_PROSE, _START = 1000, 200  # characters of a side that its language is told by, and of its start
_SCANNED = 4000  # characters of a message among which prose is looked for
_MIN_BYTES = 60  # of letters, in UTF-8: a dozen English words, twenty Chinese characters
_SURE = 0.95  # probability above which a text counts as foreign
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|https?://\S+", re.DOTALL)
_CODE_LINE = re.compile(r"^.*(?:[{}<>=;\\|$#@_~^]|\w\().*$", re.MULTILINE)
_WORDS = re.compile(r"[^\W\d_]+")
_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        "the and that this these with what how why when which who were you your can could would should please about "
        "from has not but they their there using write make explain tell",
    )
)
# Words of English that are words of its neighbours too: they add to its share, and prove nothing.
_ALSO_ENGLISH = frozenset(re.findall(r"\w+", "a are as by do for give have i in is it its my of on to was will"))
_ENGLISH_SHARE = 0.2  # of the words of a text: 96 % of English chats have 0.25 or more, their neighbours up to 0.14


@dataclass(frozen=True)
class Filters:
    """Which dialogues to keep. Called with a dialogue, names the first rule of `RULES` that rejects it.

    Phrases are plain text. They meet any case, straight and curly apostrophes, any white space between words, and
    contractions ("do not" also means "don't"), only as whole words, and not inside quotation marks or code.
    Raises UserError at a language that is not known, and at a phrase without a word.
    """

    refusals: Sequence[str]  # phrases anywhere in an assistant's turn; empty: off
    personas: Sequence[str]  # likewise: a wider list, under a name of its own
    openings: Sequence[str]  # phrases that an assistant's turn begins with
    alternation: bool  # a system turn first if at all, then user and assistant in turn, at least one of each
    empty: bool  # a turn without a visible character
    broken: bool  # an assistant's turn with undecodable characters, of punctuation only, or caught in a loop
    cut: bool  # an assistant's turn that stops inside a code block or a sentence
    languages: Sequence[str]  # ISO 639 codes to keep; empty: all
    min_messages: int | None  # of user and assistant
    max_messages: int | None
    min_message_characters: int | None  # of each message of user and assistant
    max_message_characters: int | None
    min_dialogue_characters: int | None  # of all messages together
    max_dialogue_characters: int | None

    def __post_init__(self) -> None:
        for name in ("refusals", "personas", "openings"):
            for phrase in getattr(self, name):
                if not _WORDS.search(phrase):
                    raise UserError(f"{name}: {phrase!r} is no phrase: it holds no word. Take it out; [] turns it off.")
        unknown = [code for code in self.languages if code != "en" and code not in _identifier().labels]
        if unknown:
            known = ", ".join(sorted({*_identifier().labels} - {"zxx"}))
            raise UserError(f"languages: {', '.join(unknown)} cannot be told from others. Known are {known}.")

    def __call__(self, messages: list[Message]) -> tuple[str, str] | None:
        """The first rule that rejects a dialogue, and the text that met it (at most 80 characters); None to keep it."""
        for rule in RULES:
            evidence = getattr(self, f"_{rule}")(messages)
            if evidence is not None:
                return rule, evidence
        return None

    def _alternation(self, messages: list[Message]) -> str | None:
        if not self.alternation:
            return None
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        due = ["user", "assistant"] * (len(turns) // 2 + 1)
        if len(turns) >= 2 and turns == due[: len(turns)]:
            return None
        return ", ".join(roles)[:_EVIDENCE] or "no message"

    def _empty(self, messages: list[Message]) -> str | None:
        if not self.empty:
            return None
        for number, message in enumerate(messages):
            # An empty system turn is what many programs put where there is none; Zephyr's own data has it.
            if message["role"] != "system" and not message["content"].strip(_BLANK):
                return f"message {number} ({message['role']})"[:_EVIDENCE]
        return None

    def _length(self, messages: list[Message]) -> str | None:
        spoken = [len(message["content"]) for message in messages if message["role"] != "system"]
        total = sum(len(message["content"]) for message in messages)
        return (
            _outside("messages", len(spoken), self.min_messages, self.max_messages)
            or _outside("characters in a message", min(spoken, default=0), self.min_message_characters, None)
            or _outside("characters in a message", max(spoken, default=0), None, self.max_message_characters)
            or _outside("characters", total, self.min_dialogue_characters, self.max_dialogue_characters)
        )

    def _broken(self, messages: list[Message]) -> str | None:
        return _first(_broken, _answers(messages)) if self.broken else None

    def _cut(self, messages: list[Message]) -> str | None:
        return _first(_cut, _answers(messages)) if self.cut else None

    def _refusal(self, messages: list[Message]) -> str | None:
        return _first(self._refusal_phrases.anywhere, _answers(messages)) if self.refusals else None

    def _persona(self, messages: list[Message]) -> str | None:
        return _first(self._persona_phrases.anywhere, _answers(messages)) if self.personas else None

    def _opening(self, messages: list[Message]) -> str | None:
        return _first(self._opening_phrases.at_start, _answers(messages)) if self.openings else None

    def _language(self, messages: list[Message]) -> str | None:
        """Rejected where a side is surely foreign and the other is not surely kept: a translation exercise stays."""
        if not self.languages:
            return None
        foreign = None
        for role in ("user", "assistant"):
            prose = _prose(messages, role)
            code = _told(prose, "en" in self.languages)
            if code in self.languages:
                return None
            if code and foreign is None:
                foreign = f"{code}: {_line(prose)}"[:_EVIDENCE]
        return foreign

    @cached_property
    def _refusal_phrases(self) -> "_Phrases":
        return _Phrases(self.refusals)

    @cached_property
    def _persona_phrases(self) -> "_Phrases":
        return _Phrases(self.personas)

    @cached_property
    def _opening_phrases(self) -> "_Phrases":
        return _Phrases(self.openings)


class _Phrases:
    """Some phrases as one pattern, asked only of texts that hold a piece of one: a third of the time."""

    def __init__(self, phrases: Sequence[str]) -> None:
        plain = [_long_form(phrase) for phrase in phrases]
        one_of = "|".join(map(_pattern, plain))
        self.pattern = re.compile(rf"(?<!\w)(?:{one_of})(?!\w)", re.IGNORECASE)
        self.start = re.compile(rf"\W{{0,20}}(?:{one_of})(?!\w)", re.IGNORECASE)
        self.pieces = tuple(dict.fromkeys(map(_piece, plain)))

    def anywhere(self, text: str) -> str | None:
        flat = " ".join(text.lower().split())
        if any(piece in flat for piece in self.pieces):
            for match in self.pattern.finditer(text):
                if not _quoted(text, match.start()):
                    return _around(text, *match.span())
        return None

    def at_start(self, text: str) -> str | None:
        match = self.start.match(text)
        return _line(text[: match.end() + _EVIDENCE])[:_EVIDENCE] if match else None


def _long_form(phrase: str) -> str:
    plain = " ".join(phrase.lower().replace("\u2019", "'").split())
    for long, contracted in _CONTRACTIONS.items():
        for short in contracted:
            plain = re.sub(rf"(?<!\w){short}(?!\w)", long, plain)
    return plain


def _pattern(plain: str) -> str:
    pieces = _LONG.split(plain)  # every other one is a long form
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = [f"(?:{'|'.join(map(re.escape, (long, *_CONTRACTIONS[long])))})" for long in pieces[1::2]]
    return "".join(pieces).replace(r"\ ", r"\s+").replace("'", "['\u2019\u02bc]")


def _piece(plain: str) -> str:
    """What every form of the phrase holds: its longest part without contraction or apostrophe; "" if there is none."""
    parts = (part for run in _LONG.split(plain)[::2] for part in re.split(r"\S*'\S*", run))
    return max((part.strip() for part in parts), key=len, default="")


def _quoted(text: str, place: int) -> bool:
    """Whether somebody else is quoted there: inside quotation marks of the same line, or in a block of code."""
    before = text[text.rfind("\n", 0, place) + 1 : place]
    if before.count('"') % 2 or before.count("\u201c") > before.count("\u201d"):
        return True
    return text.count("```", 0, place) % 2 == 1


def _broken(text: str) -> str | None:
    bad = _CONTROL.search(text)
    if bad:
        return _around(text, *bad.span())
    if _PUNCTUATION_ONLY.fullmatch(text):
        return _line(text)[:_EVIDENCE]
    return _loop(text.rstrip())


def _loop(text: str) -> str | None:
    """The unit that a text repeats until its end, if it does so often, and the unit holds a letter.

    A model caught in a loop stays in it until it is stopped, so its text ends periodically, wherever it was cut.
    """
    period = len(text) - 16 - text.rfind(text[-16:], 0, -1) if len(text) >= _LOOP_CHARACTERS else 0
    repeated = max(_LOOP_CHARACTERS, _LOOP_REPEATS * period)
    if not 0 < period <= repeated <= len(text):
        return None
    unit = text[-period:]
    if not any(map(str.isalpha, unit)) or text[-repeated:-period] != text[-repeated + period :]:
        return None
    return _line(unit * _LOOP_REPEATS)[:_EVIDENCE]


def _cut(text: str) -> str | None:
    end = text[-4 * _EVIDENCE :].rstrip()
    clause = end.endswith(",") and len(end[end.rfind("\n") + 1 :].split()) >= _CLAUSE_WORDS
    return _line(end)[-_EVIDENCE:] if clause or _UNFINISHED.search(end) or _in_code(text) else None


def _in_code(text: str) -> bool:
    """Whether the last fence opens a block of code. An odd number of fences proves nothing: answers forget some."""
    fence = text.rfind("```")
    return fence >= 0 and _OPENING_FENCE.match(text, fence) is not None


def _outside(unit: str, value: int, least: int | None, most: int | None) -> str | None:
    within = (least is None or value >= least) and (most is None or value <= most)
    return None if within else f"{value} {unit}"


def _prose(messages: list[Message], role: str) -> str:
    parts: list[str] = []
    size = 0
    for message in messages:
        if message["role"] == role and size < _PROSE:
            parts.append(_CODE.sub(" ", message["content"][:_SCANNED]))
            size += len(parts[-1])
    return " ".join(parts)[:_PROSE]


def _told(prose: str, english: bool) -> str | None:
    """The language of a text, None where that would be a guess. An English start is enough: "Translate this: ..."."""
    if english and (_reads_english(prose) or _reads_english(prose[:_START])):
        return "en"
    lines = _CODE_LINE.sub("", prose)
    if len("".join(_WORDS.findall(lines)).encode(errors="replace")) < _MIN_BYTES:
        return None
    code, probability = _identifier().classify(lines.encode(errors="replace"))
    return str(code) if probability >= _SURE and code != "zxx" else None


def _reads_english(prose: str) -> bool:
    tokens = _WORDS.findall(prose.lower())
    proof = sum(token in _ENGLISH for token in tokens)
    return proof > 0 and proof + sum(token in _ALSO_ENGLISH for token in tokens) >= _ENGLISH_SHARE * len(tokens)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # 0.8 s, which English texts need not take

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _answers(messages: list[Message]) -> Iterable[str]:
    return (message["content"] for message in messages if message["role"] == "assistant")


def _first(rule: Any, texts: Iterable[str]) -> str | None:
    return next((evidence for evidence in map(rule, texts) if evidence is not None), None)


def _around(text: str, start: int, end: int) -> str:
    """What met a rule, with what stands before and behind it, in one line."""
    spare = max(0, _EVIDENCE - (end - start))
    return _line(text[max(0, start - spare // 3) : end + spare])[:_EVIDENCE]


def _line(text: str) -> str:
    return " ".join(text.split())
