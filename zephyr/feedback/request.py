"""What is asked of a model, and what comes of it: a reply or a failure."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zephyr.data.sources import Message

_UNBOUNDED = 4096  # tokens assumed of a completion that has no limit, where a worst case is wanted


@dataclass(frozen=True)
class Request:
    """One chat completion to ask for. `key` is all that decides the answer, so no server's address is in it.

    Whoever changes what stands behind a model's name must change the name, or starts a new ledger.
    """

    model: str  # its name in the pool
    messages: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, max_tokens, seed...
    schema: Mapping[str, Any] | None = None  # JSON schema of the reply
    sample: int = 0  # tells apart requests that are asked more than once

    @cached_property
    def key(self) -> str:
        """SHA-256 of the request as canonical JSON, in hexadecimal. Numbers that are equal are written alike."""
        parameters = {name: _plain(value) for name, value in self.parameters.items()}
        parts = [self.model, list(self.messages), parameters, self.schema, self.sample]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def most_completion_tokens(self) -> int:
        """How many tokens the completion may have."""
        limit = self.parameters.get("max_completion_tokens") or self.parameters.get("max_tokens")
        return int(limit) if limit else _UNBOUNDED

    @cached_property
    def prompt_bytes(self) -> int:
        """Bytes of the prompt as UTF-8: no tokenizer of bytes makes more tokens of it; a fourth is usual."""
        text = sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in self.messages)
        return text + (len(json.dumps(self.schema)) if self.schema else 0)


def _plain(value: Any) -> Any:
    """1.0 as 1: both ask for the same, whether they come from YAML, a command line or Python."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Reply:
    """A completed answer. Where the server counts no tokens they are None, and so is the cost of what has a price."""

    text: str
    model: str  # as the server returned it
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt's
    cost: float | None = None  # USD
    seconds: float = 0.0  # from sending to the last byte, of the attempt that succeeded
    attempts: int = 1  # requests sent for it, those of earlier failures included
    waste: float = 0.0  # USD, at most, that attempts without an answer may have cost
    extra: str | None = None  # JSON: log-probabilities as the server gave them, where they were asked for


@dataclass(frozen=True)
class Failure:
    """Why there is no answer. Final for this run; the next one asks again.

    Causes: timed_out, connection, rate_limited, server_error (408, 409, 425, 5xx), bad_reply (cut off or not what
    an OpenAI-compatible server says), too_large, wrong_model, refused (another 4xx; a prompt that a model in this
    process cannot take), not_recorded (in a file of completions), interrupted (the run was left meanwhile).
    """

    cause: str
    detail: str
    attempts: int = 1
    waste: float = 0.0  # USD, at most, that the attempts may have cost


def whole(text: str) -> str:
    """With U+FFFD in place of half characters, which no file, ledger or request can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
