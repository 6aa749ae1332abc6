"""Preference objectives by hand: their values, what of a pair each of them sees, and what may be set of them."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from tests.preferences import OWN, logps, plain, random_logps
from zephyr.errors import UserError
from zephyr.objectives import (
    MARGINAL,
    OBJECTIVES,
    REFERENCE_FREE,
    STEPWISE,
    Logps,
    check,
    parameters,
    preference_loss,
    rewards,
    wpo_weights,
)

GROUP = Path(__file__).parents[1] / "conf" / "objective"
LN_2 = math.log(2)


@pytest.mark.parametrize(
    ("name", "beta", "value"),
    [
        ("sigmoid", 0.1, LN_2),
        ("cdpo", 0.1, LN_2),
        ("robust", 0.1, LN_2),
        ("hinge", 0.1, 1.0),
        ("ipo_sum", 0.1, 25.0),  # (1 / 0.2)^2
        ("ipo_mean", 0.1, 25.0),
        ("sigmoid_norm", 0.1, LN_2),
        ("exo_pair", 0.1, -LN_2 - 0.5 * math.log(0.99 * 0.01)),
        ("discopop", 0.1, 0.5 * LN_2 + 0.5),
        ("nca_pair", 0.1, 2 * LN_2),
        ("bco_pair", 0.1, 2 * LN_2),
        ("sppo_hard", 0.1, 50.0),
        ("apo_zero", 0.1, 1.0),
        ("apo_down", 0.1, 1.0),
        ("aot", 0.1, LN_2),
        ("aot_unpaired", 0.1, LN_2),
    ],
)
def test_a_policy_that_is_its_reference(name, beta, value):
    pairs = random_logps(0)
    pairs = pairs._replace(reference_chosen=pairs.chosen, reference_rejected=pairs.rejected)
    losses = preference_loss(pairs, plain(name, beta), None)
    assert_close(losses, torch.full_like(losses, value), rtol=1e-14, atol=0)
    assert [reward.abs().max().item() for reward in rewards(pairs, plain(name, beta))] == [0, 0]


def test_worked_by_hand():
    # c = -10 - -12 = 2 over 4 tokens, r = -9 - -8 = -1 over 2 tokens; h = 3, per token 0.5 - -0.5 = 1
    pairs = logps([-10.0], [-9.0], -12.0, -8.0, 4, 2)

    def loss(name, beta, **changes):
        return preference_loss(pairs, plain(name, beta, **changes), None).item()

    assert loss("sigmoid", math.log(3) / 3) == pytest.approx(math.log(4 / 3))  # odds of 3 to 1
    assert loss("cdpo", math.log(3) / 3) == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert loss("robust", math.log(3) / 3) == pytest.approx((0.8 * math.log(4 / 3) - 0.2 * math.log(4)) / 0.6)
    assert loss("hinge", 0.25) == 0.25  # 1 - 3 / 4
    assert loss("ipo_sum", 0.1) == pytest.approx(4.0)  # (3 - 5)^2
    assert loss("ipo_mean", 0.1) == pytest.approx(16.0)  # (1 - 5)^2
    assert loss("sppo_hard", 0.1) == pytest.approx(25.0)  # (2 - 5)^2 + (-1 + 5)^2
    assert loss("sigmoid_norm", math.log(3)) == pytest.approx(math.log(4 / 3))
    assert loss("simpo", 1.0, options={"gamma": 0.0}) == pytest.approx(math.log1p(math.exp(-2.5 + 4.5) ** -1))
    assert loss("sigmoid", math.log(3) / 3, nll_weight=0.4) == pytest.approx(math.log(4 / 3) + 1.0)  # 0.4 * 10 / 4
    forward = (1 - math.exp(-2)) - (1 - math.exp(1))
    assert loss("hinge", 0.25, divergence="forward_kl") == pytest.approx(1 - 0.25 * forward)
    assert [reward.item() for reward in rewards(pairs, plain("sigmoid", 0.5))] == [1.0, -0.5]
    assert [reward.item() for reward in rewards(pairs, plain("simpo", 2.0))] == [-5.0, -9.0]


def test_transport_sorts_over_the_whole_step():
    # Margins of the policy -4 and 2, of the reference 1 and -1: sorted -4, 2 and -1, 1, so -3 and 1.
    pairs = logps([-5.0, -3.0], [-1.0, -5.0], torch.tensor([-2.0, -4.0]), torch.tensor([-3.0, -3.0]))
    losses = preference_loss(pairs, plain("aot", 1.0, options={"label_smoothing": 0.0}), None)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(3)), math.log1p(math.exp(-1))])
    # Log-ratios -3 and 1 of the chosen, 2 and -2 of the rejected: sorted -3, 1 and -2, 2, so -1 and -1.
    losses = preference_loss(pairs, plain("aot_unpaired", 1.0, options={"label_smoothing": 0.0}), None)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(1))] * 2)


def test_likelihood_is_a_mean_over_the_tokens_of_the_step():
    losses = preference_loss(
        logps([-6.0, -1.0], [-9.0, -9.0], chosen_tokens=torch.tensor([2.0, 3.0])), plain("sft"), None
    )
    assert losses.tolist() == [7 / 5, 7 / 5]


def test_weights_have_no_gradient_and_are_a_product_of_two_probabilities():
    chosen, rejected = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-0.5, 0.2))
    weights = wpo_weights(chosen, rejected)
    assert weights.item() == pytest.approx(math.exp(-0.5) * math.exp(0.2)) and not weights.requires_grad


def test_reference_free_objectives_never_look_at_the_reference():
    pairs = random_logps(0)
    moved = pairs._replace(reference_chosen=pairs.chosen * 2, reference_rejected=pairs.rejected / 3)
    blind = {
        n for n in OBJECTIVES if preference_loss(pairs, plain(n), None).equal(preference_loss(moved, plain(n), None))
    }
    assert blind == REFERENCE_FREE == {"simpo", "orpo", "sft"}


def test_only_stepwise_objectives_couple_the_pairs():
    pairs = random_logps(0)
    alone = {
        name
        for name in OBJECTIVES
        if torch.allclose(
            preference_loss(pairs, plain(name), None),
            torch.cat([preference_loss(Logps(*(x[i : i + 1] for x in pairs)), plain(name), None) for i in range(8)]),
        )
    }
    assert set(OBJECTIVES) - alone == STEPWISE == {"aot", "aot_unpaired", "sft"}


def test_marginal_objectives_see_only_differences():
    """What f-divergences need: a shift of both scores, per token where the objective is, changes nothing."""
    pairs = random_logps(0)
    same = dict(chosen_tokens=torch.full((8,), 5.0), rejected_tokens=torch.full((8,), 5.0))
    pairs = pairs._replace(**same)
    shifted = pairs._replace(chosen=pairs.chosen - 3, rejected=pairs.rejected - 3)
    free = {
        name
        for name in set(OBJECTIVES) - STEPWISE - REFERENCE_FREE
        if torch.allclose(preference_loss(pairs, plain(name), None), preference_loss(shifted, plain(name), None))
    }
    assert free == MARGINAL


# Configuration


def test_every_yaml_is_a_functions_signature():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in GROUP.glob("*.yaml")}
    assert set(files) == set(OBJECTIVES)
    for name, values in files.items():
        pairs, beta, *own = inspect.signature(OBJECTIVES[name]).parameters.values()
        assert (pairs.name, beta.name) == ("pairs", "beta")
        assert all(parameter.default is parameter.empty for parameter in (pairs, beta, *own))
        assert list(values) == ["name", "beta", *(parameter.name for parameter in own)]
        assert (values.pop("name"), values.pop("beta")) == (name, "???")
        assert all(type(value) is float for value in values.values())
        check(plain(name, options=values))
        assert (GROUP / f"{name}.yaml").read_text().startswith("# ")
        assert set(parameters(name)) == {parameter.name for parameter in own} == set(OWN.get(name, {}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sigmod", {}, r"no objective 'sigmod': take one of sigmoid, cdpo.*Did you mean 'sigmoid'"),
        ("ipo", {}, r"no objective 'ipo'.*ipo_sum, ipo_mean"),
        (
            "sigmoid",
            {"options": {"label_smoothing": 0.1}},
            r"objective=sigmoid has no parameter 'label_smoothing': it has",
        ),
        ("cdpo", {"options": {"label_smoothing": 0.1, "tau": 1.0}}, r"cdpo has no parameter 'tau'.*label_smoothing"),
        ("sigmoid", {"options": {"ld_alfa": 0.5}}, r"Did you mean 'ld_alpha'"),
        ("simpo", {"options": {}}, r"objective.gamma is not set, and objective=simpo needs it"),
        ("simpo", {"options": {"gamma": -1.0}}, r"objective.gamma of objective=simpo must be at least 0; got -1.0"),
        ("cdpo", {"options": {"label_smoothing": 0.5}}, r"label_smoothing of objective=cdpo must be in \[0, 0.5\)"),
        ("robust", {"options": {"label_smoothing": -0.1}}, r"must be in \[0, 0.5\).*got -0.1"),
        ("aot", {"options": {"label_smoothing": 0.7}}, r"must be in \[0, 0.5\)"),
        ("exo_pair", {"options": {"label_smoothing": 0.0}}, r"must be in \(0, 0.5\); got 0.0"),
        ("discopop", {"options": {"tau": 0.0}}, r"objective.tau of objective=discopop must be above 0"),
        (
            "nca_pair",
            {"divergence": "js"},
            r"nca_pair cannot take objective.divergence=js.*set objective.divergence=reve",
        ),
        ("aot", {"divergence": "alpha"}, r"aot cannot take objective.divergence=alpha"),
        ("simpo", {"divergence": "forward_kl"}, r"simpo cannot take objective.divergence=forward_kl"),
        ("aot", {"weighting": "wpo"}, r"aot cannot be weighed by objective.weighting=wpo"),
        ("sft", {"weighting": "wpo"}, r"sft cannot be weighed"),
        ("sft", {"ld_alpha": 0.5}, r"sft trains on the likelihood of whole completions.*ld_alpha=0.5.*set.*1.0"),
        ("orpo", {"ld_alpha": 0.0}, r"orpo trains on the likelihood of whole completions"),
        (
            "orpo",
            {"nll_weight": 0.1},
            r"orpo holds the chosen completion's likelihood already: set objective.nll_weight",
        ),
        ("sigmoid", {"nll_weight": 0.1, "ld_alpha": 0.5}, r"cannot take both objective.nll_weight=0.1.*ld_alpha=0.5"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    with pytest.raises(UserError) as caught:
        check(plain(name, **changes))
    assert re.search(message, str(caught.value)), caught.value


def test_what_fits_is_accepted():
    for name in OBJECTIVES:
        check(plain(name))
    check(plain("sigmoid", divergence="js", weighting="wpo", nll_weight=0.2))
    check(plain("sigmoid_norm", divergence="alpha", weighting="wpo", ld_alpha=0.5))
    check(plain("simpo", weighting="wpo", nll_weight=0.2))
