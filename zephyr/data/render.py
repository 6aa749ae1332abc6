"""From messages to token ids: the one module that knows what a Zephyr conversation looks like.

The contract:

- A conversation is rendered once, by the tokenizer's own chat template, and tokenised as a whole.
- There is no BOS: the template has none and the tokenizer adds none, in training, evaluation, chat and export alike.
- A token is labelled by its position (an assistant's text and the end-of-turn behind it), never by its id, so the
  padding token may be the end-of-turn token.
- A message cannot forge a turn: wherever its text contains a role marker or a special token, a space goes in behind
  the first character. The template itself does this, so every program that uses the exported one is as safe.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zephyr.data import encode
from zephyr.data.batch import Conversation, Pair
from zephyr.data.encode import Encoder, Format
from zephyr.data.encode import with_system as with_system
from zephyr.data.sources import Message
from zephyr.errors import UserError, reason

ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = Path(__file__).with_name("chat.jinja")


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, set to Zephyr's template, without BOS.

    Raises UserError when it cannot be loaded, is not a fast one, or has no end-of-sequence token.
    """
    tokenizer: Any
    try:
        # legacy=False is pinned because transformers does not save the flag: a legacy tokenizer would come back from
        # an export as another one. The legacy spelling differs by a lone space piece behind every </s>.
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, legacy=False)
    except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
        raise UserError(
            f"Cannot load a tokenizer from {path!r} (model.path, or else model.base): {reason(error)} "
            "Copy the tokenizer's files beside the weights."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of {path!r} has no fast version (tokenizer.json), which labelling needs.")
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {path!r} has no eos_token: a turn could never end.")
    if _adds_bos(tokenizer):
        tokenizer.add_bos_token = False  # also rewrites the post-processor, which the saved tokenizer keeps
    if _adds_bos(tokenizer):
        raise UserError(f"The tokenizer of {path!r} adds a BOS that cannot be turned off; Zephyr's format has none.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template(control_tokens(tokenizer))
    return tokenizer


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The strings that a message must not be able to write: role markers and every special token."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in dict.fromkeys([*ROLE_MARKERS, *tokenizer.all_special_tokens, *added]) if len(token) > 1]


def template(forbidden: Sequence[str]) -> str:
    """Zephyr's chat template (Tunstall et al., 2023), which escapes the forbidden strings inside messages."""
    return _TEMPLATE.read_text().replace("CONTROL_TOKENS", json.dumps(list(forbidden)))


def chat_format(tokenizer: PreTrainedTokenizerBase) -> Format:
    """All that another process needs to encode as this tokenizer does."""
    core: Any = tokenizer
    return Format(
        core.backend_tokenizer.to_str(),
        core.split_special_tokens,
        str(core.eos_token),
        tuple(control_tokens(tokenizer)),
    )


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    core: Any = tokenizer
    return Encoder(core.backend_tokenizer, core.split_special_tokens, str(core.eos_token), control_tokens(tokenizer))


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], all_tokens: bool = False
) -> list[Conversation]:
    """Tokenise conversations; labelled are the assistant's turns, or with `all_tokens` every token."""
    encoder = _encoder(tokenizer)
    rendered = [encoder.text(messages) for messages in conversations]
    encodings = encoder.encode([text for text, _ in rendered])
    return [
        Conversation(row.ids, [True] * len(row) if all_tokens else encode.spoken(row, spans).astype(bool).tolist())
        for row, (_, spans) in zip(encodings, rendered, strict=True)
    ]


def render_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[Message], list[Message]]]
) -> list[Pair | None]:
    """Tokenise (chosen, rejected) conversations that differ in their last turn, and split them at that turn.

    A completion is the last turn's text and its end-of-turn token; the line break behind it is left out. None stands
    for a pair whose prompt is not a token prefix of both sides (a tokenizer that merges across the turn's start).
    """
    split = encode.split_pairs(_encoder(tokenizer), pairs)
    return [None if parts is None else Pair(*parts) for parts in split]


def truncate(conversation: Conversation, max_length: int) -> Conversation:
    """Keep the first `max_length` tokens. Nothing is appended: a turn that was cut does not end."""
    return Conversation(conversation.ids[:max_length], conversation.labels[:max_length])


def truncate_pair(pair: Pair, max_length: int, max_prompt_length: int) -> Pair:
    """Shorten a pair whose longer side exceeds `max_length` tokens; see zephyr.data.encode.shortened."""
    cut = Pair(*encode.shortened(*pair, max_length, max_prompt_length))
    return pair if cut == pair else cut


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a").input_ids
