"""Tokens drawn as often as their probabilities say, for each row by its own rules."""

import pytest
import torch

from tests import tiny
from tests.test_generate import CHATS, ends_after, sharp
from zephyr.generate import write
from zephyr.sampling import Choice, Sampling

CPU = torch.device("cpu")
GRID = (torch.arange(1000) + 0.5) / 1000  # a thousand draws, spread evenly over [0, 1)


def shares(scores: list[float], sampling: Sampling) -> list[int]:
    """How often of 1,000 evenly spread draws each token is chosen."""
    choice = Choice([sampling] * 1000, 7, CPU)
    choice._draws = GRID[:, None]
    left = choice(torch.zeros(1000, 7, dtype=torch.long), torch.tensor([scores]).repeat(1000, 1))
    assert torch.equal(left.isfinite().sum(-1), torch.ones(1000))
    return left.argmax(-1).bincount(minlength=len(scores)).tolist()


def prompts(tokenizer):
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in CHATS
    ]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1, 1.0), [150, 500, 50, 300]),
        (Sampling(1, 1.0, 0.75), [0, 625, 0, 375]),  # 0.5 is not enough, 0.5 + 0.3 is: 5 of 8
        (Sampling(1, 1.0, 0.85), [158, 526, 0, 316]),  # of 0.95
        (Sampling(1, 1.0, 0.4), [0, 1000, 0, 0]),  # the likeliest is always there
        (Sampling(1, 0.5), [62, 685, 7, 246]),  # squares: 0.0225, 0.25, 0.0025, 0.09 of 0.365
        (Sampling(1, 0.0), [0, 1000, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_temperature_and_nucleus(sampling, expected):
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    found = shares(scores, sampling)
    assert all(abs(one - other) <= 1 for one, other in zip(found, expected, strict=True)), found


def test_no_draw_falls_on_what_cannot_be():
    choice = Choice([Sampling(1, 1.0)] * 2, 3, CPU)
    choice._draws = torch.tensor([[0.0], [1.0 - 2**-24]])
    scores = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).repeat(2, 1)
    assert choice(torch.zeros(2, 3, dtype=torch.long), scores).argmax(-1).tolist() == [1, 2]


def test_each_row_keeps_its_own_rules():
    tokenizer = tiny.tokenizer()
    model = ends_after(tokenizer("yes").input_ids)
    yes = tokenizer("yes").input_ids
    rows = [Sampling(20), Sampling(2), Sampling(3)]
    assert write(model, tokenizer, prompts(tokenizer), rows) == [(yes, True), (yes[:2], False), (yes, False)]
    assert write(model, tokenizer, prompts(tokenizer), rows, lambda: True) == [(yes[:1], False)] * 3


def test_a_row_does_not_depend_on_its_neighbours():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [Sampling(12, 1.0, 0.9, seed=3), Sampling(5, 0.0), Sampling(9, 2.0, 1.0, seed=4)]
    together = write(model, tokenizer, prompts(tokenizer), rows)
    alone = [write(model, tokenizer, [prompt], [row])[0] for prompt, row in zip(prompts(tokenizer), rows, strict=True)]
    assert together == alone
    other = [rows[0]._replace(seed=5), *rows[1:]]
    changed = write(model, tokenizer, prompts(tokenizer), other)
    assert changed[0] != together[0] and changed[1:] == together[1:]


def test_rows_of_one_seed_share_their_draws_and_nothing_else_is_touched():
    model, tokenizer = sharp(), tiny.tokenizer()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, other, *_ = write(model, tokenizer, prompts(tokenizer)[:1] * 2, [Sampling(10, 5.0, seed=1)] * 2)
    assert one == other
    assert torch.equal(torch.get_rng_state(), before) and model.training
