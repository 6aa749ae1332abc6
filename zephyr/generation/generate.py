"""Answers from a model: for many conversations at once, or for one as it is written.

Both leave the model as they found it, so that they may run in the middle of training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from zephyr.data.render import Message
from zephyr.generation.decoding import decode
from zephyr.generation.sampling import Sampling

ROWS = 32  # conversations answered at once


class Answer(NamedTuple):
    """What a model was given, and what it wrote."""

    text: str
    prompt: list[int]  # tokens, without those it lost
    tokens: list[int]  # without the end-of-turn token
    end: int | None  # the end-of-turn token; None where it wrote on until it was stopped


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One answer a conversation, in order: greedy at temperature 0, else sampled, `seed` deciding.

    An answer ends at the end-of-turn token, or at `max_new_tokens` (half the model's window at most). A
    prompt too long to leave that much room loses its beginning. Sharded models need the same call on every
    rank.
    """
    return [found.text for found in answer(model, tokenizer, conversations, max_new_tokens, temperature, seed)]


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:
    """The same, with the tokens."""
    window = _window(model)
    most = max_new_tokens if window is None else min(max_new_tokens, window // 2)
    prompts = _prompts(tokenizer, conversations, 0 if window is None else window - most)
    samplings = [Sampling(most, temperature, 1.0, seed + (i << 32)) for i in range(len(prompts))]
    answers = []
    for prompt, (tokens, end) in zip(prompts, _written(model, tokenizer, prompts, samplings, ROWS), strict=True):
        answers.append(Answer(_text(tokenizer, tokens), prompt, tokens, end))
    return answers


def respond(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    more: Callable[[int], Sequence[tuple[list[int], Sampling]]],
    stopped: Callable[[], bool],
) -> Iterator[tuple[int, list[int], bool]]:
    """Answers to the prompts that `more` gives when asked for so many, each when it has ended, `rows` at once.

    An answer is the prompt's number, in the order of giving, its tokens, and whether an end-of-turn token (not among
    them) ended it. Each depends on its own prompt and sampling alone. It ends when `more` gives nothing and all have
    ended, or when `stopped` says so.
    """
    numbers = count()
    most: dict[int, int] = {}  # tokens, of those under way
    answers: dict[int, list[int]] = {}

    def counted(places: int) -> Sequence[tuple[list[int], Sampling]]:
        given = more(places)
        for _, sampling in given:
            most[next(numbers)] = sampling.max_new_tokens
        return given

    with _ready(model) as core:
        for row, tokens, end in decode(core, [], [], _ends(model, tokenizer), rows, stopped, more=counted):
            answers[row] = answers.get(row, []) + tokens
            if end is not None or len(answers[row]) == most[row]:
                del most[row]
                yield row, answers.pop(row), end is not None


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[Message],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Iterator[str]:
    """The answer to one conversation, a few letters at a time; closing the iterator stops the model.

    Sampling uses the global random state. What goes wrong while generating is raised here.
    """
    window = _window(model)
    most = max_new_tokens if window is None else min(max_new_tokens, window // 2)
    prompts = _prompts(tokenizer, [conversation], 0 if window is None else window - most)
    sampling = Sampling(most, temperature, top_p, int(torch.randint(2**62, ())))
    tokens: list[int] = []
    said = text = ""
    with _ready(model) as core:
        for written in decode(core, prompts, [sampling], _ends(model, tokenizer), 1, every=1):
            tokens += written.tokens
            text = _text(tokenizer, tokens)
            if len(text) > len(said) and not text.endswith("\ufffd"):  # half a letter
                yield text[len(said) :]
                said = text
        if len(text) > len(said):
            yield text[len(said) :]


def _written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    rows: int,
) -> list[tuple[list[int], int | None]]:
    """The tokens written behind each prompt, and the end-of-turn token that ended them."""
    answers: list[list[int]] = [[] for _ in prompts]
    ends: list[int | None] = [None] * len(prompts)
    with _ready(model) as core:
        for row, tokens, end in decode(core, prompts, samplings, _ends(model, tokenizer), rows):
            answers[row] += tokens
            ends[row] = end
    return list(zip(answers, ends, strict=True))


@contextmanager
def _ready(model: Any) -> Iterator[Any]:
    """The transformers model itself, ready to generate; every trace of that is gone afterwards."""
    core = _core(model)
    attention = core.config._attn_implementation
    try:
        if attention != "eager":  # which some models need
            core.set_attn_implementation("sdpa")  # the trainer's own knows packed rows only
        with evaluating(model):
            yield core
    finally:
        core.set_attn_implementation(attention)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode; then each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _core(model: Any) -> Any:
    """The transformers model; under a PEFT wrapper its base, whose layers hold the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end-of-turn tokens."""
    ends = _core(model).generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _window(model: Any) -> int | None:
    return getattr(_core(model).config.get_text_config(), "max_position_embeddings", None)


def _prompts(tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], room: int) -> list[list[int]]:
    """Of each conversation so many tokens, from its end; 0: all."""
    if not conversations:
        return []
    rows: Any = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    return [ids[-room:] for ids in rows["input_ids"]]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
