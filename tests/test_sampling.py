"""Tokens drawn as often as their probabilities say, for each row by its own rules."""

import pytest
import torch

from tests import tiny
from tests.test_generate import CHATS, ends_after, sharp
from zephyr.generation.generate import respond
from zephyr.generation.sampling import Choice, Sampling

CPU = torch.device("cpu")
GRID = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # a thousand draws, spread evenly over [0, 1)


def shares(scores: list[float], sampling: Sampling) -> list[int]:
    """How often of 1,000 evenly spread draws each token is chosen."""
    choice = Choice([sampling] * 1000, CPU)
    return choice(torch.tensor([scores]).repeat(1000, 1), GRID[:, None])[:, 0].bincount(minlength=len(scores)).tolist()


def prompts(tokenizer):
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in CHATS
    ]


def write(model, tokenizer, prompts, samplings):
    """What is written behind each prompt, all of them at once."""
    rows = iter([list(zip(prompts, samplings, strict=True))])
    found = respond(model, tokenizer, len(prompts), lambda places: next(rows, []), lambda: False)
    return [(tokens, ended) for _, tokens, ended in sorted(found)]


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
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).repeat(2, 1)
    for row in (Sampling(1, 1.0), Sampling(1, 1.0, 0.9)):
        assert Choice([row] * 2, CPU)(logits, torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)).tolist() == [
            [1],
            [2],
        ]


def test_each_row_keeps_its_own_rules():
    tokenizer = tiny.tokenizer()
    model = ends_after(tokenizer("yes").input_ids)
    yes = tokenizer("yes").input_ids
    rows = [Sampling(20), Sampling(2), Sampling(3)]
    assert write(model, tokenizer, prompts(tokenizer), rows) == [(yes, True), (yes[:2], False), (yes, False)]


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


def test_who_comes_later_takes_the_place_of_who_has_ended():
    model, tokenizer = sharp(), tiny.tokenizer()
    texts = prompts(tokenizer)
    samplings = [Sampling(3), Sampling(40), Sampling(6)]
    alone = [write(model, tokenizer, [text], [row])[0] for text, row in zip(texts, samplings, strict=True)]
    given, asked = [[(texts[0], samplings[0]), (texts[1], samplings[1])], [], [(texts[2], samplings[2])]], []

    def more(places):
        asked.append(places)
        return given.pop(0) if given else []

    found = list(respond(model, tokenizer, 2, more, lambda: False))
    assert [number for number, *_ in found] == [0, 2, 1]
    assert [(tokens, ended) for _, tokens, ended in sorted(found)] == alone
    assert asked[:3] == [2, 1, 1]


def test_nothing_is_written_that_nobody_wants():
    model, tokenizer = sharp(), tiny.tokenizer()
    steps: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: steps.append(1))
    rows = iter([[(text, Sampling(400)) for text in prompts(tokenizer)]])
    assert list(respond(model, tokenizer, 3, lambda places: next(rows, []), lambda: len(steps) > 4)) == []
    assert len(steps) <= 12 and model.training
