"""Random models and random examples of stated shapes and lengths: what both sides of a comparison are given."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MistralConfig, MistralForCausalLM

from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.data.modules import Examples

EOS = 2
_FIRST = 4  # token ids below are special


class Shape(NamedTuple):
    """A Mistral's size."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def config(self) -> MistralConfig:
        """transformers' configuration of it; sequences stay below the window, which therefore changes nothing."""
        return MistralConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4096,
            sliding_window=4096,
            use_cache=False,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )


BODY = Shape(512, 8, 1792, 8, 2, 2048)  # the head takes 4 % of the arithmetic; of a 7B model it takes 2 %
MIXED = Shape(256, 4, 896, 8, 2, 4096)
VOCABULARY = MIXED._replace(vocabulary=32000)
TINY = Shape(64, 2, 128, 4, 2, 512)
MISTRAL_7B = Shape(4096, 32, 14336, 32, 8, 32000)

Lengths = Callable[[random.Random], tuple[int, int, int]]  # draws tokens of (prompt, chosen, rejected)


def uniform(prompt: tuple[int, int], completion: tuple[int, int]) -> Lengths:
    """Each length drawn evenly between its two bounds."""
    return lambda draw: (draw.randint(*prompt), draw.randint(*completion), draw.randint(*completion))


def ultrafeedback(draw: random.Random) -> tuple[int, int, int]:
    """Lengths like UltraFeedback's under Mistral's tokenizer.

    Lognormal: means of 175, 320 and 290 tokens before they are cut to 512 of prompt and 1024 in all. The means are
    inferred from the sizes of the data set's files, the law is assumed.
    """

    def one(mean: float, median: float) -> int:
        return max(8, int(median * math.exp(math.sqrt(2 * math.log(mean / median)) * draw.gauss(0, 1))))

    prompt = min(one(175, 90), 512)
    return prompt, min(one(320, 240), 1024 - prompt), min(one(290, 215), 1024 - prompt)


SHORT = uniform((30, 60), (20, 40))


def random_pairs(count: int, lengths: Lengths, vocabulary: int, seed: int) -> list[Pair]:
    """Pairs of random tokens; each completion ends with the end-of-turn token."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(_FIRST, vocabulary) for _ in range(length)]

    sizes = [lengths(draw) for _ in range(count)]
    return [Pair(text(p), [*text(c - 1), EOS], [*text(r - 1), EOS]) for p, c, r in sizes]


def random_conversations(count: int, tokens: tuple[int, int], vocabulary: int, seed: int) -> list[Conversation]:
    """Sequences of random tokens, evenly long between the two bounds, of which every token is scored."""
    draw = random.Random(seed)
    sizes = [draw.randint(*tokens) for _ in range(count)]
    return [Conversation([draw.randrange(_FIRST, vocabulary) for _ in range(n)], [True] * n) for n in sizes]


def real_tokens(example: Pair | Conversation) -> int:
    """Tokens of an example as a trainer without any trick sees them: a prompt counts with each of its completions."""
    if isinstance(example, Pair):
        return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)
    return len(example.ids)


class InMemory(Examples):
    """Examples as the trainer's own loader takes them, without files."""

    unit = "examples"

    def __init__(self, examples: Sequence[Any], reference: torch.Tensor | None = None) -> None:
        self.given = examples
        self.lengths = [len(e.ids) if isinstance(e, Conversation) else sum(map(len, e)) for e in examples]
        self.reference = reference  # [examples, 2] log-probabilities of (chosen, rejected)

    def pack(self, examples: list[int]) -> Batch:
        """One packed row of these examples."""
        chosen = [self.given[i] for i in examples]
        if isinstance(chosen[0], Conversation):
            return pack_conversations(chosen)
        batch = pack_pairs(chosen)
        return batch if self.reference is None else batch._replace(reference=self.reference[examples].T.reshape(-1))


def in_order_of(steps_seed: int, examples: Sequence[Any]) -> list[Any]:
    """The examples placed so that zephyr.data.modules.Steps, with that seed, visits them in the order given."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(steps_seed)).tolist()
    placed: list[Any] = [None] * len(examples)
    for example, index in zip(examples, order, strict=True):
        placed[index] = example
    return placed


def save_models(shape: Shape, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A random reference and a policy a little off it, so that the loss is not ln 2: their two folders."""
    torch.manual_seed(seed)
    model = MistralForCausalLM(shape.config())
    model.save_pretrained(folder / "reference")
    perturb(model)
    model.save_pretrained(folder / "policy")
    return folder / "reference", folder / "policy"


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 1, share: float = 0.02) -> None:
    """Move all weights by so much of their usual size, at least of 0.05."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * share * parameter.abs().mean().clamp(min=0.05))


@torch.no_grad()
def perturb_adapter(model: torch.nn.Module, seed: int = 1, size: float = 0.04) -> None:
    """Give an adapter, whatever its values are, values that depend on the seed and its factors' names alone."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(trained):
        noise = torch.randn(trained[name].shape, generator=generator) * size
        trained[name].copy_(noise)
