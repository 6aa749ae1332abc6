"""Who answers a prompt, and what each of them is asked to heed: draws that depend on the prompt and the seed alone.

A draw is the order of hashes of (seed, prompt, name), not the state of a generator. So it does not depend on the order
of prompts or of the pool, and a model that joins the pool only takes the places that it wins: of the other completions
none changes, and none is asked for again.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from zephyr.data.sources import Message
from zephyr.errors import UserError, reason

PRINCIPLES = Path(__file__).with_name("principles.yaml")
_UNIT = 1 << 64


@dataclass(frozen=True)
class Principles:
    """The wordings of each principle, and for each source the weights of principles; `default` is any other's."""

    wordings: Mapping[str, Sequence[str]]
    mixtures: Mapping[str, Mapping[str, float]]


class Drawn(NamedTuple):
    """One completion to ask for."""

    model: str  # its name in the pool
    principle: str
    system: str  # the wording that was drawn


def load_principles(path: Path | None) -> Principles:
    """Ours, and in their place whatever a file of the user names. Raises UserError where that file cannot be used."""
    parts = _read(PRINCIPLES)
    if path is not None:
        own = _read(path)
        parts = {name: {**parts[name], **own.get(name, {})} for name in parts}
    wordings, mixtures = parts["wordings"], parts["mixtures"]
    where = path or PRINCIPLES
    for principle, texts in wordings.items():
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise UserError(f"{where}: wordings.{principle} must be a list of one text or more.")
    for source, weights in mixtures.items():
        if not isinstance(weights, dict) or not all(map(_is_weight, weights.values())) or not any(weights.values()):
            raise UserError(f"{where}: mixtures.{source} must be weights, 0 or more and one of them above 0.")
        if strangers := weights.keys() - wordings.keys():
            raise UserError(
                f"{where}: mixtures.{source} names {', '.join(sorted(strangers))}, which has no wordings. "
                f"There are {', '.join(sorted(wordings))}; add wordings.{min(strangers)} or correct the name."
            )
    return Principles(wordings, mixtures)


def draw(
    prompt: str, source: str | None, pool: Sequence[str], principles: Principles, seed: int, count: int = 4
) -> list[Drawn]:
    """`count` different models of the pool, in the order drawn, each with a principle by the source's mixture.

    Raises UserError when the pool has fewer models, or one of them twice.
    """
    if len(set(pool)) < len(pool):
        raise UserError(f"The pool names a model twice ({', '.join(sorted(pool))}); a model may have several servers.")
    if len(pool) < count:
        raise UserError(
            f"{count} different models answer each prompt, and the pool has {len(pool)}: {', '.join(pool) or 'none'}. "
            "Name more, or ask for fewer completions a prompt. One model at two temperatures may have two names."
        )
    chosen = sorted(pool, key=lambda model: _hash(seed, prompt, model, "model"))[:count]
    weights = principles.mixtures.get(source or "default") or principles.mixtures["default"]
    return [_principled(prompt, model, weights, principles, seed) for model in chosen]


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The conversation that a model is sent: the principle as system prompt, behind one that the prompt has itself."""
    own, rest = ([messages[0]["content"]], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    return [{"role": "system", "content": "\n\n".join([*own, system])}, *rest]


def _principled(prompt: str, model: str, weights: Mapping[str, float], principles: Principles, seed: int) -> Drawn:
    names = sorted(name for name, weight in weights.items() if weight)
    edges = list(accumulate(weights[name] for name in names))
    place = _hash(seed, prompt, model, "principle") / _UNIT * edges[-1]
    principle = names[min(bisect_right(edges, place), len(names) - 1)]
    texts = principles.wordings[principle]
    return Drawn(model, principle, texts[_hash(seed, prompt, model, "wording") * len(texts) // _UNIT].strip())


def _hash(seed: int, prompt: str, *parts: str) -> int:
    """64 bits, uniform. Lengths are hashed with the parts, so that no two lists of parts are one text."""
    digest = hashlib.sha256(str(seed).encode())
    for part in (prompt, *parts):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f":{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest()[:8])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        parts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not to be read as principles: {reason(error)}") from error
    if (
        not isinstance(parts, dict)
        or not parts.keys() <= {"wordings", "mixtures"}
        or not all(isinstance(part, dict) for part in parts.values())
    ):
        raise UserError(f"{path} must hold mixtures, or wordings, or both, laid out as in {PRINCIPLES}.")
    return parts


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
