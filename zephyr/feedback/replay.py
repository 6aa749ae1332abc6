"""Completions that were recorded earlier, answered from their file.

The file is in UltraFeedback's raw layout (theirs or ours), or holds rows of prompt, model and response: instruction,
generator and output are understood too, as AlpacaEval writes them. A request is answered by its model and its last
user turn. A prompt may be given to a replayed model only where the file holds it (`holding`), and what the model was
asked to heed is what the file says, not what is drawn now (`as_recorded`).
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from zephyr.data.sources import files, read
from zephyr.errors import UserError
from zephyr.feedback.draw import Drawn
from zephyr.feedback.pool import Answering, Limits, Model
from zephyr.feedback.server import Refused


class Recorded(NamedTuple):
    """A completion as the file has it."""

    text: str
    principle: str  # empty where the file does not say
    system: str  # the same
    generation: Mapping[str, Any]  # finish_reason and tokens, in our own records


Recordings = Mapping[str, Mapping[str, Recorded]]  # by the model's name, by the prompt


@dataclass(frozen=True)
class Replay:
    """A file of completions, or a folder of such files."""

    path: str
    concurrency = 64
    requests_per_minute = None
    tokens_per_minute = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what it holds: a file that has changed is asked again."""
        total = hashlib.sha256()
        for file in files(self.path, "replay"):
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        return total.hexdigest()

    def open(self, limits: Limits, secrets: set[str]) -> Answering:
        """Raises UserError where the file cannot be read or holds no completions."""
        return ReplayServer(self)


class ReplayServer:
    """The file, read once."""

    def __init__(self, source: Replay) -> None:
        self.endpoint = source
        self._held = recordings(source.path)

    async def complete(self, model: Model, body: bytes, key: str, free: Callable[[], None]) -> dict[str, Any]:
        """As a server's. Raises Refused ("not_recorded") for what the file does not hold."""
        name, messages = _name(model), json.loads(body)["messages"]
        if name not in self._held:
            listed = ", ".join(sorted(self._held))
            raise UserError(f"{self.endpoint.path} holds no completion of model {name!r}; it has those of {listed}.")
        prompt = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        found = self._held[name].get(prompt.strip())
        if found is None:
            raise Refused(f"{self.endpoint.path} holds no completion of {name!r} for this prompt.", "not_recorded")
        made = found.generation
        return {
            "model": made.get("model") or name,
            "choices": [{"message": {"content": found.text}, "finish_reason": made.get("finish_reason") or "stop"}],
            "usage": {count: made.get(count) for count in ("prompt_tokens", "completion_tokens")},
        }

    async def close(self) -> None:
        """Nothing is open."""


@functools.cache
def recordings(path: str) -> Recordings:
    """Every completion of a file. Of two for the same model and prompt the first one counts.

    Raises UserError where there is none, or a row is of another layout.
    """
    held: dict[str, dict[str, Recorded]] = {}
    for where, row in read(files(path, "replay")):
        for model, prompt, found in _completions(where, row):
            held.setdefault(model, {}).setdefault(prompt.strip(), found)
    if not held:
        raise UserError(f"{path} holds no completion.")
    return held


def holding(pool: Iterable[Model], prompt: str) -> list[str]:
    """The models that can answer a prompt: a replayed one only what its file holds, any other everything."""
    return [
        model.name
        for model in pool
        if (sources := _replays(model)) is None or any(prompt.strip() in source for source in sources)
    ]


def as_recorded(pool: Mapping[str, Model], prompt: str, drawn: Drawn) -> Drawn:
    """The draw for a replayed model with what its file says it was asked to heed; others' as it is."""
    found = held(pool[drawn.model], prompt)
    return Drawn(drawn.model, found.principle, found.system) if found else drawn


def held(model: Model, prompt: str) -> Recorded | None:
    """The completion of a prompt that a replayed model's file holds; None for a model that is asked."""
    found = (source.get(prompt.strip()) for source in _replays(model) or ())
    return next(filter(None, found), None)


def replayed(model: Model) -> bool:
    """Whether a file answers for the model."""
    return any(isinstance(source, Replay) for source in model.servers)


def _replays(model: Model) -> list[Mapping[str, Recorded]] | None:
    """By prompt, what the files of a replayed model hold; None for a model that is asked."""
    sources = [source for source in model.servers if isinstance(source, Replay)]
    return [recordings(source.path).get(_name(model), {}) for source in sources] if sources else None


def _name(model: Model) -> str:
    return model.served_as or model.name


def _completions(where: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str, Recorded]]:
    """Model, prompt and completion of each completion in a row."""
    prompt = _first(row, "instruction", "prompt")
    several = row.get("completions")
    for item in several if isinstance(several, list) else [row]:
        if not isinstance(item, dict):
            item = {}
        model, text = _first(item, "model", "generator"), _first(item, "response", "output")
        if prompt is None or model is None or text is None:
            raise UserError(
                f"{where}: no recorded completions. A row must have instruction and completions of model and response, "
                "as UltraFeedback's raw files have them, or prompt, model and response."
            )
        said = item.get("principle"), item.get("custom_system_prompt")
        principle, system = (value if isinstance(value, str) else "" for value in said)
        made = item.get("generation")
        yield model, prompt, Recorded(text, principle, system, made if isinstance(made, dict) else {})


def _first(row: Mapping[str, Any], *names: str) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)
