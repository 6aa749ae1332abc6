"""Rows that come and go in a batch against plain transformers, one prompt at a time; draws against their chances."""

import random

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests import tiny
from zephyr.generation import decoding
from zephyr.generation.decoding import decode
from zephyr.generation.sampling import Choice, Sampling

SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def linear_attention():
    """A state in place of keys: rows can neither leave nor come in."""
    sizes = {f"linear_{part}": size for part in ("key_head_dim", "value_head_dim") for size in (16,)}
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 0, "head_dim": 16}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **sizes, **heads, **kinds))


MODELS = {
    "mistral": lambda: tiny.model(),
    "sliding": lambda: tiny.model(sliding_window=16),
    "every second layer slides": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=12, max_window_layers=1)
    ),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4, n_positions=70)
    ),
    "linear attention": linear_attention,
}


def work(rows: int = 20):
    """Prompts, how to go on, and so many end tokens that rows end anywhere."""
    chance = random.Random(0)
    prompts = [[chance.randrange(258) for _ in range(chance.randrange(3, 40))] for _ in range(rows)]
    return prompts, [Sampling(chance.choice([1, 5, 12, 30])) for _ in prompts], set(chance.sample(range(258), 20))


def collected(model, prompts, samplings, ends, rows, **options):
    answers, last = [[] for _ in prompts], [None] * len(prompts)
    for row, tokens, end in decode(model, prompts, samplings, ends, rows, **options):
        assert last[row] is None
        answers[row] += tokens
        last[row] = end
    return list(zip(answers, last, strict=True))


def looking_rarely(monkeypatch: pytest.MonkeyPatch, model):
    """As on a GPU: the tokens are looked at every few steps."""

    class Device:
        type = "cuda"

    batch = decoding._Batch
    monkeypatch.setattr(decoding, "_Batch", lambda core: batch(model))
    return type("Elsewhere", (), {"device": Device})


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_equal_transformers_generate(monkeypatch, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)  # so that rounding cannot change the best token
    prompts, samplings, ends = work()
    expected = []
    for prompt, row in zip(prompts, samplings, strict=True):
        config = GenerationConfig(
            max_new_tokens=row.max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=257
        )
        inputs = torch.tensor([prompt])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        ids = output[0, len(prompt) :].tolist()
        end = ids.pop() if ids[-1] in ends else None
        expected.append((ids, end))
    assert 3 < sum(end is not None for _, end in expected) < 18
    for rows in (1, 6, 20):
        assert collected(model, prompts, samplings, ends, rows) == expected
    elsewhere = looking_rarely(monkeypatch, model)
    assert collected(elsewhere, prompts, samplings, ends, 6, every=5) == expected


def test_a_row_that_has_ended_makes_room_for_the_next():
    """Ten answers of one token and two of forty, four at a time, take 39 steps, not twice as many."""
    model = tiny.model().eval()
    model.set_attn_implementation("sdpa")
    samplings = [Sampling(40 if n in (0, 6) else 1) for n in range(12)]
    prompts = [[n + 1, n + 2, n + 3] for n in range(12)]
    shapes: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    written = collected(model, prompts, samplings, set(), 4)
    assert [len(tokens) for tokens, _ in written] == [40, *[1] * 5, 40, *[1] * 5]
    steps = [rows for rows, width in shapes if width == 1]
    assert len(steps) == 39
    assert sum(rows for rows, width in shapes if width == 3) == 12
    assert steps[-1] == 2  # nobody computes for those that have ended


def test_nothing_is_written_any_more_when_nobody_wants_it():
    model = tiny.model().eval()
    model.set_attn_implementation("sdpa")
    asked = iter([False, False, False, True])
    written = collected(model, [[1, 2], [3]], [Sampling(50)] * 2, set(), 1, stopped=lambda: next(asked))
    assert [len(tokens) for tokens, _ in written] == [3, 0]


def test_a_sampled_answer_depends_on_its_own_seed_alone():
    model = tiny.model().eval()
    model.set_attn_implementation("sdpa")
    prompts, _, ends = work(6)
    samplings = [Sampling(10, 1.0, 0.9 if n % 2 else 1.0, seed=n) for n in range(6)]
    together = collected(model, prompts, samplings, ends, 6)
    assert together == collected(model, prompts, samplings, ends, 2)
    alone = [collected(model, [p], [s], ends, 1)[0] for p, s in zip(prompts, samplings, strict=True)]
    assert together == alone
    others = [row._replace(seed=row.seed + 100) for row in samplings]
    assert sum(a != b for a, b in zip(together, collected(model, prompts, others, ends, 6), strict=True)) >= 5


def test_two_tokens_come_as_often_as_their_chances_say():
    """Chi-square with one degree of freedom: 10.83 is exceeded once in a thousand."""
    logits = torch.log(torch.tensor([[0.3, 0.7]]))
    for temperature, chance in ((1.0, 0.3), (2.0, 0.3956)):  # sqrt(.3) / (sqrt(.3) + sqrt(.7))
        count = 4000
        rows = [Sampling(1, temperature, seed=n) for n in range(count)]
        draws = torch.tensor([[random.Random(row.seed).random()] for row in rows], dtype=torch.float64)
        found = Choice(rows, torch.device("cpu"))(logits.expand(count, 2), draws)
        first = int((found == 0).sum())
        square = (first - count * chance) ** 2 / (count * chance * (1 - chance))
        assert square < 10.83
        assert (first - count * 0.35) ** 2 / (count * 0.35 * 0.65) > 10.83  # and another chance would be noticed


def test_rows_choose_apart():
    """Greedy, the whole distribution and a nucleus side by side, at draws worked out by hand."""
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(5, 3)
    rows = [Sampling(1), Sampling(1, 1.0), Sampling(1, 1.0), Sampling(1, 1.0, 0.6), Sampling(1, 1.0, 0.4)]
    draws = torch.tensor([[0.99], [0.19], [0.99], [0.99], [0.99]], dtype=torch.float64)
    # in the order of the vocabulary 0.2 | 0.5 | 0.3; a nucleus in that of the chances: 0.5 | 0.3, then 0.5 alone
    with_nucleus = Choice(rows, torch.device("cpu"))(logits, draws)
    assert with_nucleus.flatten().tolist()[0] == 1
    assert with_nucleus.flatten().tolist()[3:] == [2, 1]
    plain = Choice(rows[:3], torch.device("cpu"))(logits[:3], draws[:3])
    assert plain.flatten().tolist() == [1, 0, 2]
