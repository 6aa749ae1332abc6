"""What MT-Bench's judge is asked and what its reply says: with FastChat's prompts where they are given, else ours.

Ours set the texts between lines with a mark, as zephyr/feedback/judge.py does, so that no answer can pose as the end
of itself or as a verdict. FastChat's are filled in as they stand: scores then compare with published ones.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.data.sources import Message, files, read
from zephyr.errors import UserError
from zephyr.feedback.judge import fenced, mark_of

PROMPTS = Path(__file__).with_name("prompts")
NEED_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")  # categories

_SCORES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_NAMES = {  # of FastChat's prompts, by mode and by whether there is a reference answer
    ("single", False): "single-v1",
    ("single", True): "single-math-v1",
    ("pair", False): "pair-v2",
    ("pair", True): "pair-math-v1",
}
_FORMATS = {"single": "[[rating]]", "pair": "[[A]]"}


class Case(NamedTuple):
    """What is judged: the turns up to the one in question, of one answer or of two."""

    questions: Sequence[str]
    answers: Sequence[Sequence[str]]  # of each assistant, by turn
    references: Sequence[str]  # by turn; empty where none are needed


class Asked(NamedTuple):
    """A prompt of the judge."""

    name: str  # in the judgments
    messages: list[Message]

    @property
    def text(self) -> str:
        """What the judgment files keep of it."""
        return self.messages[-1]["content"]


class Prompts:
    """Those of FastChat's judge_prompts.jsonl, or ours where `source` is None. Raises UserError for a useless file."""

    def __init__(self, source: str | None, mode: str) -> None:
        self.mode, self.source = mode, source
        self._given = {} if source is None else _given(source, mode)

    def ask(self, case: Case) -> Asked:
        """The prompt that fits a case."""
        second = len(case.questions) > 1
        if self.source is None:
            return _ours(self.mode, case, second)
        name = _NAMES[self.mode, bool(case.references)] + ("-multi-turn" if second else "")
        prompt = self._given[name]
        try:
            text = prompt["prompt_template"].format(**_fields(case))
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{self.source}: the prompt_template of {name} cannot be filled in: {error!r}.") from error
        system = [{"role": "system", "content": prompt["system_prompt"]}] if prompt["system_prompt"] else []
        return Asked(name, [*system, {"role": "user", "content": text}])


def parse_score(text: str) -> float | None:
    """The score that a judge gave, by FastChat's rule: the first `[[7]]`, else the first `[7]`; None without either."""
    written = _written(text)
    return None if written is None else float(written)


def score_of(text: str) -> int | float:
    """The same as FastChat's files have it: 7 and 7.0 as they were written, -1 for no score."""
    written = _written(text)
    if written is None:
        return -1
    return float(written) if "." in written else int(written)


def winner_of(text: str) -> str:
    """Who won, by FastChat's rule: A, B, tie, or error where the judge did not say."""
    return next((said for verdict, said in (("A", "A"), ("B", "B"), ("C", "tie")) if f"[[{verdict}]]" in text), "error")


def _written(text: str) -> str | None:
    found = next((match for pattern in _SCORES if (match := pattern.search(text))), None)
    return found[1] if found and math.isfinite(float(found[1])) else None  # a judge in a loop writes digits for ever


def _given(source: str, mode: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for where, row in read(files(source, "mt_bench.judge_prompts")):
        if not all(isinstance(row.get(key), str) for key in ("name", "prompt_template", "system_prompt")):
            raise UserError(f"{where}: a judge's prompt has the texts name, system_prompt and prompt_template.")
        found[row["name"]] = row
    for kind, reference in _NAMES:
        for name in (_NAMES[kind, reference], f"{_NAMES[kind, reference]}-multi-turn") if kind == mode else ():
            if name not in found:
                raise UserError(f"{source} has no prompt {name!r}. It has: {', '.join(found)}.")
            if (form := found[name].get("output_format")) != _FORMATS[mode]:
                raise UserError(f"{source}: {name} has the output_format {form!r}; {_FORMATS[mode]} is what is read.")
    return found


def _fields(case: Case) -> dict[str, str]:
    """What FastChat's templates may name."""
    fields = {f"ref_answer_{turn}": text for turn, text in enumerate(case.references, 1)}
    labels = ("",) if len(case.answers) == 1 else ("_a", "_b")
    if len(case.questions) == 1:
        fields |= {"question": case.questions[0]}
        return fields | {f"answer{label}": answer[0] for label, answer in zip(labels, case.answers, strict=True)}
    fields |= {f"question_{turn}": text for turn, text in enumerate(case.questions, 1)}
    for label, answer in zip(labels, case.answers, strict=True):
        fields |= {f"answer{label}_{turn}": text for turn, text in enumerate(answer, 1)}
    return fields


def _ours(mode: str, case: Case, second: bool) -> Asked:
    names = ["Answer"] if mode == "single" else ["Answer of A", "Answer of B"]
    parts: list[tuple[str, str]] = []
    for turn, question in enumerate(case.questions):
        place = f" {turn + 1}" if second else ""
        parts.append((f"Question{place}", question))
        parts += [(f"Reference answer{place}", case.references[turn])] if case.references else []
        parts += [(f"{name}{place}", answer[turn]) for name, answer in zip(names, case.answers, strict=True)]
    mark = mark_of("", dict(enumerate(text for _, text in parts)))
    wanted = [mode, *["reference"] * bool(case.references), *["second_turn"] * second]
    last = f"That was all of it: the material ended at the last line marked [{mark}]. Explain, then give the verdict."
    content = [_prompt(name) for name in wanted]
    content += [f"The mark of this request is [{mark}].", *(fenced(name, text, mark) for name, text in parts), last]
    return Asked(
        "-".join(["zephyr", *wanted]),
        [{"role": "system", "content": _prompt("system")}, {"role": "user", "content": "\n\n".join(content)}],
    )


def _prompt(name: str) -> str:
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8").strip()


def case(
    question: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | None,
    turn: int,
) -> Case:
    """What is judged of answers in FastChat's form to the turns 1 to `turn` of a question."""
    said = [answer["choices"][0]["turns"][:turn] for answer in answers]
    return Case(question["turns"][:turn], said, reference["choices"][0]["turns"][:turn] if reference else ())
