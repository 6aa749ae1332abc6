"""Answers from a model: for many conversations at once, or for one as it is written.

Both leave the model as they found it, so that they may run in the middle of training.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from zephyr.data.render import Message
from zephyr.sampling import Choice, Ends, Sampling

ROWS = 32  # conversations answered at once
_PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


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
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p=1.0)
    prompts = _prompts(model, tokenizer, conversations, settings)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [Answer("", prompt, [], None) for prompt in prompts]
    with _ready(model) as core, torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            inputs = _pad([prompts[i] for i in rows], settings.pad_token_id, core.device)
            outputs = core.generate(**inputs, generation_config=settings)
            for i, ids in zip(rows, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(ids) if token in settings.eos_token_id), len(ids))
                text = str(tokenizer.decode(ids[:end], **_PLAIN))
                answers[i] = Answer(text, prompts[i], ids[:end], ids[end] if end < len(ids) else None)
    return answers


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    stopped: Callable[[], bool] = lambda: False,
) -> list[tuple[list[int], bool]]:
    """The tokens written behind each prompt, and whether an end-of-turn token (not among them) ended them.

    One batch. Each row depends on its own prompt and sampling alone. When `stopped` says so, rows end where they are.
    """
    settings = _settings(model, tokenizer, 1, 0.0, 1.0)
    settings.max_new_tokens = max(row.max_new_tokens for row in samplings)
    with _ready(model) as core:
        inputs = _pad(list(prompts), settings.pad_token_id, core.device)
        width = inputs["input_ids"].shape[1]
        outputs = core.generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([Choice(samplings, width, core.device)]),
            stopping_criteria=StoppingCriteriaList([Ends(samplings, width, core.device, stopped)]),
        )
    rows = []
    for row, ids in zip(samplings, outputs[:, width:].tolist(), strict=True):
        ids = ids[: row.max_new_tokens]
        end = next((n for n, token in enumerate(ids) if token in settings.eos_token_id), len(ids))
        rows.append((ids[:end], end < len(ids)))
    return rows


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[Message],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Iterator[str]:
    """The answer to one conversation, a few words at a time; closing the iterator stops the model.

    Sampling uses the global random state. What goes wrong while generating is raised here.
    """
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    prompts = _prompts(model, tokenizer, [conversation], settings)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, **_PLAIN)
    stopped, failures = threading.Event(), list[BaseException]()

    def stop(ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), stopped.is_set(), device=ids.device)

    def work() -> None:
        try:
            core.generate(
                **inputs,
                generation_config=settings,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        except BaseException as failure:
            failures.append(failure)
        finally:
            streamer.text_queue.put(streamer.stop_signal)  # else the reader would wait for ever

    with _ready(model) as core:
        inputs = _pad(prompts, settings.pad_token_id, core.device)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            thread.join()
    if failures:
        raise failures[0]


@contextmanager
def _ready(model: Any) -> Iterator[Any]:
    """The transformers model itself, ready to generate; every trace of that is gone afterwards."""
    core = _core(model)
    attention, defaults = core.config._attn_implementation, core.generation_config
    try:
        core.set_attn_implementation("sdpa")  # the trainer's own attention knows packed rows only
        core.generation_config = GenerationConfig()  # else its values would fill the gaps in ours
        with evaluating(model):
            yield core
    finally:
        core.set_attn_implementation(attention)
        core.generation_config = defaults


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


def _settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    ends = _core(model).generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    window = _window(model)
    return GenerationConfig(
        max_new_tokens=max_new_tokens if window is None else min(max_new_tokens, window // 2),
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


def _window(model: Any) -> int | None:
    return getattr(_core(model).config.get_text_config(), "max_position_embeddings", None)


def _prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    settings: GenerationConfig,
) -> list[list[int]]:
    if not conversations:
        return []
    rows: Any = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    window = _window(model)
    room = 0 if window is None else window - settings.max_new_tokens  # [-0:] is everything
    return [ids[-room:] for ids in rows["input_ids"]]


def _pad(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Pad on the left, so that every answer starts in the same column."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    columns = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(rows, device=device) for name, rows in columns.items()}
