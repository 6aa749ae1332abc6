from collections import Counter

import pytest

from zephyr.errors import UserError
from zephyr.feedback.draw import draw, load_principles, with_system

POOL = [f"model-{n}" for n in range(8)]
OURS = load_principles(None)


def within(count, trials, share, sigmas=4.5):
    """Whether a count is what a chance of `share` gives."""
    return abs(count - trials * share) <= sigmas * (trials * share * (1 - share)) ** 0.5 + 1e-9


def test_four_different_models_by_prompt_and_seed_alone():
    drawn = draw("Why is the sky blue?", "sharegpt", POOL, OURS, seed=1)
    assert len({one.model for one in drawn}) == 4
    for n in range(20):
        draw(f"another {n}", None, POOL, OURS, seed=1)  # what went before changes nothing
    assert draw("Why is the sky blue?", "sharegpt", POOL[::-1], OURS, seed=1) == drawn
    others = [draw("Why is the sky blue?", "sharegpt", POOL, OURS, seed=seed) for seed in range(2, 12)]
    assert all(other != drawn for other in others)


def test_every_model_and_every_pair_of_models_is_drawn_alike():
    """Of 8 models 4: each in a half of the prompts, each pair in 4/8 * 3/7, each first in an eighth."""
    prompts = 2000
    draws = [[one.model for one in draw(f"prompt {n}", None, POOL, OURS, seed=0)] for n in range(prompts)]
    singles = Counter(model for names in draws for model in names)
    pairs = Counter(frozenset((a, b)) for names in draws for a in names for b in names if a < b)
    first = Counter(names[0] for names in draws)
    assert len(singles) == 8 and all(within(singles[m], prompts, 1 / 2) for m in POOL)
    assert len(pairs) == 28 and all(within(count, prompts, 3 / 14) for count in pairs.values())
    assert all(within(first[m], prompts, 1 / 8) for m in POOL)


def test_a_model_that_joins_takes_only_its_own_places():
    """What is asked of the others stays, word by word, so nothing paid for is asked again."""
    for n in range(50):
        before = draw(f"prompt {n}", "sharegpt", POOL, OURS, seed=0)
        after = draw(f"prompt {n}", "sharegpt", [*POOL, "newcomer"], OURS, seed=0)
        kept = [one for one in after if one.model != "newcomer"]
        assert kept == [one for one in before if one in kept] and len(kept) >= 3


SHARES = {  # of UltraFeedback's program: honesty becomes calibration in a tenth of its draws
    "sharegpt": {"helpfulness": 0.6, "truthfulness": 0.2, "honesty": 0.18, "verbalized_calibration": 0.02},
    "ultrachat": {"helpfulness": 0.6, "truthfulness": 0.2, "honesty": 0.18, "verbalized_calibration": 0.02},
    "flan": {"helpfulness": 0.8, "verbalized_calibration": 0.2},
    "evol_instruct": {"helpfulness": 1.0},
    "truthful_qa": {"truthfulness": 0.5, "honesty": 0.45, "verbalized_calibration": 0.05},
    "false_qa": {"truthfulness": 0.5, "honesty": 0.45, "verbalized_calibration": 0.05},
    "of my own": {"helpfulness": 0.6, "truthfulness": 0.2, "honesty": 0.18, "verbalized_calibration": 0.02},
}


@pytest.mark.parametrize("source", SHARES)
def test_principles_by_the_mixture_of_the_source(source):
    drawn = [one for n in range(1000) for one in draw(f"{source} {n}", source, POOL, OURS, seed=3)]
    met = Counter(one.principle for one in drawn)
    assert met.keys() == SHARES[source].keys()
    assert all(within(met[name], len(drawn), share) for name, share in SHARES[source].items())


def test_a_completions_principle_is_not_that_of_its_neighbour():
    """Four draws a prompt, each by itself: all four helpful in 0.6 ** 4 of the prompts."""
    alike = sum({o.principle for o in draw(f"p {n}", None, POOL, OURS, 0)} == {"helpfulness"} for n in range(2000))
    assert within(alike, 2000, 0.6**4)


def test_every_wording_is_drawn_and_is_the_system_prompt():
    drawn = [one for n in range(1000) for one in draw(f"prompt {n}", None, POOL, OURS, seed=0)]
    for name, texts in OURS.wordings.items():
        met = Counter(one.system for one in drawn if one.principle == name)
        if name != "harmlessness":  # has no weight of its own
            assert met.keys() == {text.strip() for text in texts}
            assert all(within(count, met.total(), 1 / len(texts)) for count in met.values())


def test_our_wordings():
    assert {name: len(texts) >= 6 for name, texts in OURS.wordings.items()} == {
        "helpfulness": True, "truthfulness": True, "honesty": True, "harmlessness": True, "verbalized_calibration": False,
    }  # fmt: skip
    texts = [text for texts in OURS.wordings.values() for text in texts]
    assert len(set(texts)) == len(texts) and not any("UltraFeedback" in text for text in texts)
    assert all("%" in text for text in OURS.wordings["verbalized_calibration"])


def test_a_pool_that_is_too_small():
    with pytest.raises(UserError, match=r"4 different models answer each prompt, and the pool has 2: a, b\. Name more"):
        draw("p", None, ["a", "b"], OURS, seed=0)
    assert {one.model for one in draw("p", None, ["a", "b"], OURS, seed=0, count=2)} == {"a", "b"}
    with pytest.raises(UserError, match="names a model twice"):
        draw("p", None, ["a", "a", "b", "c"], OURS, seed=0)


def test_a_file_of_the_users_replaces_what_it_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "mixtures: {default: {harmlessness: 1, brevity: 3}}\nwordings: {brevity: [Be brief.], honesty: [Be open.]}\n"
    )
    mine = load_principles(path)
    drawn = Counter(one.principle for n in range(500) for one in draw(f"p {n}", "blog", POOL, mine, seed=0))
    assert drawn.keys() == {"harmlessness", "brevity"} and within(drawn["brevity"], 2000, 3 / 4)
    assert mine.wordings["honesty"] == ["Be open."] and mine.mixtures["flan"] == OURS.mixtures["flan"]
    assert mine.wordings["helpfulness"] == OURS.wordings["helpfulness"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold mixtures, or wordings, or both"),
        ("mixture: {}", "must hold mixtures, or wordings, or both"),
        ("mixtures: []", "must hold mixtures, or wordings, or both"),
        ("mixtures: {default: {honesty: -1}}", "mixtures.default must be weights"),
        ("mixtures: {default: {honesty: .nan}}", "mixtures.default must be weights"),
        ("mixtures: {default: {honesty: 0}}", "mixtures.default must be weights"),
        ("mixtures: {default: {honesty: true}}", "mixtures.default must be weights"),
        ("mixtures: {mine: {honest: 1}}", "mixtures.mine names honest, which has no wordings.*add wordings.honest"),
        ("wordings: {honesty: []}", "wordings.honesty must be a list of one text or more"),
        ("wordings: {honesty: Be open.}", "wordings.honesty must be a list of one text or more"),
        ("mixtures: {", "not to be read as principles"),
    ],
)
def test_files_that_are_no_principles(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        load_principles(path)
    with pytest.raises(UserError, match="gone.yaml: not to be read"):
        load_principles(tmp_path / "gone.yaml")


def test_a_system_prompt_of_the_prompts_own_comes_first():
    user = {"role": "user", "content": "Hi"}
    assert with_system([user], "Be kind.") == [{"role": "system", "content": "Be kind."}, user]
    own = {"role": "system", "content": "You are a parrot."}
    both = {"role": "system", "content": "You are a parrot.\n\nBe kind."}
    assert with_system([own, user], "Be kind.") == [both, user]
