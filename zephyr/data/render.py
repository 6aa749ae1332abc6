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

from zephyr.data.batch import Conversation, Pair
from zephyr.errors import UserError, reason

Message = dict[str, str]  # role (system, user or assistant) and content

ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
_QUIET = {"verbose": False}  # no warning at a long conversation: what is too long is cut, and counted
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


def with_system(messages: list[Message], text: str | None) -> list[Message]:
    """The conversation with a system turn of this text in front, unless it has one or the text is None."""
    if text is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], all_tokens: bool = False
) -> list[Conversation]:
    """Tokenise conversations; labelled are the assistant's turns, or with `all_tokens` every token."""
    if not conversations:
        return []
    rows: Any = tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_QUIET
    )
    return [
        Conversation(ids, [True] * len(ids) if all_tokens else [bool(spoken) for spoken in mask])
        for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    ]


def render_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[Message], list[Message]]]
) -> list[Pair | None]:
    """Tokenise (chosen, rejected) conversations that differ in their last turn, and split them at that turn.

    A completion is the last turn's text and its end-of-turn token; the line break behind it is left out. None stands
    for a pair whose prompt is not a token prefix of both sides (a tokenizer that merges across the turn's start).
    """
    if not pairs:
        return []
    openings: Any = tokenizer.apply_chat_template(
        [chosen[:-1] for chosen, _ in pairs], add_generation_prompt=True, return_dict=True, tokenizer_kwargs=_QUIET
    )
    prompts: list[list[int]] = openings["input_ids"]
    sides = [render(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1)]
    return [
        None if chosen is None or rejected is None else Pair(prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(
            prompts,
            (_completion(prompt, whole) for prompt, whole in zip(prompts, sides[0], strict=True)),
            (_completion(prompt, whole) for prompt, whole in zip(prompts, sides[1], strict=True)),
            strict=True,
        )
    ]


def truncate(conversation: Conversation, max_length: int) -> Conversation:
    """Keep the first `max_length` tokens. Nothing is appended: a turn that was cut does not end."""
    return Conversation(conversation.ids[:max_length], conversation.labels[:max_length])


def truncate_pair(pair: Pair, max_length: int, max_prompt_length: int) -> Pair:
    """Shorten a pair whose longer side exceeds `max_length` tokens, the same way for both sides.

    First the prompt keeps its last `max_prompt_length` tokens, then both completions keep their first tokens, as many
    as fit. The order is that of the original recipe; unlike it, a short prompt leaves its room to the completions.
    """
    prompt, chosen, rejected = pair
    if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return pair
    prompt = prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    return Pair(prompt, chosen[:room], rejected[:room])


def _completion(prompt: list[int], whole: Conversation) -> list[int] | None:
    end = max((i + 1 for i, label in enumerate(whole.labels) if label), default=0)
    if whole.ids[: len(prompt)] != prompt or end <= len(prompt):
        return None
    return whole.ids[len(prompt) : end]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a").input_ids
