"""Preference objectives and their gradients against the papers, in decimals of 60 digits, up to extreme log-ratios."""

import dataclasses
import itertools
from collections.abc import Callable
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.preferences import extreme_logps, logps, plain, random_logps
from zephyr.objectives import LIKELIHOOD, MARGINAL, OBJECTIVES, REFERENCE_FREE, STEPWISE, Logps, check, preference_loss
from zephyr.settings import Objective

getcontext().prec = 60
ONE, HALF = Decimal(1), Decimal("0.5")


def logistic(z: Decimal) -> Decimal:
    return ONE / (ONE + (-z).exp())


def bradley_terry(strengths: tuple[Decimal, Decimal]) -> tuple[Decimal, Decimal]:
    """ln of the probabilities that either side wins."""
    return tuple((strength / sum(strengths)).ln() for strength in strengths)


def ratios(pair) -> tuple[Decimal, Decimal]:
    """pi / pi_ref of both completions."""
    return (pair[0] - pair[2]).exp(), (pair[1] - pair[3]).exp()


def wins(pair, beta):
    """DPO's model: strengths (pi / pi_ref)^beta."""
    return bradley_terry(tuple((beta * ratio.ln()).exp() for ratio in ratios(pair)))


def mean_wins(pair, beta):
    c, r = (ratio.ln() for ratio in ratios(pair))
    return bradley_terry(((beta * c / pair[4]).exp(), (beta * r / pair[5]).exp()))


def margin(pair):
    return ratios(pair)[0].ln() - ratios(pair)[1].ln()


def exo(pair, beta, label_smoothing):
    truth = (ONE - label_smoothing, label_smoothing)
    return sum(q.exp() * (q - p.ln()) for q, p in zip(wins(pair, beta), truth, strict=True))


def discovered(pair, beta, tau):
    rho = beta * margin(pair)
    share = logistic(rho / tau)
    return (1 - share) * (ONE + (-rho).exp()).ln() + share * (-rho).exp()


def odds_ratio(pair, beta):
    p, q = (pair[0] / pair[4]).exp(), (pair[1] / pair[5]).exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -p.ln() - beta * (ratio / (1 + ratio)).ln()


def nca(pair, beta):
    c, r = (beta * ratio.ln() for ratio in ratios(pair))
    return -logistic(c).ln() - HALF * logistic(-c).ln() - HALF * logistic(-r).ln()


def smoothed(z: Decimal, e: Decimal) -> Decimal:
    return -(1 - e) * logistic(z).ln() - e * logistic(-z).ln()


def transport(policy: list[Decimal], reference: list[Decimal], beta, e) -> list[Decimal]:
    return [smoothed(beta * (p - q), e) for p, q in zip(sorted(policy), sorted(reference), strict=True)]


PAIRWISE = {
    "sigmoid": lambda pair, beta: -wins(pair, beta)[0],
    "cdpo": lambda pair, beta, label_smoothing: (
        -(1 - label_smoothing) * wins(pair, beta)[0] - label_smoothing * wins(pair, beta)[1]
    ),
    "robust": lambda pair, beta, label_smoothing: (
        ((1 - label_smoothing) * -wins(pair, beta)[0] - label_smoothing * -wins(pair, beta)[1])
        / (1 - 2 * label_smoothing)
    ),
    "hinge": lambda pair, beta: max(Decimal(0), 1 - beta * margin(pair)),
    "ipo_sum": lambda pair, beta: (margin(pair) - ONE / beta / 2) ** 2,
    "ipo_mean": lambda pair, beta: (
        (ratios(pair)[0].ln() / pair[4] - ratios(pair)[1].ln() / pair[5] - ONE / beta / 2) ** 2
    ),
    "sigmoid_norm": lambda pair, beta: -mean_wins(pair, beta)[0],
    "exo_pair": exo,
    "discopop": discovered,
    "nca_pair": nca,
    "bco_pair": lambda pair, beta: (
        -logistic(beta * ratios(pair)[0].ln()).ln() - logistic(-beta * ratios(pair)[1].ln()).ln()
    ),
    "sppo_hard": lambda pair, beta: (  # eta = 1 / beta; win probabilities 1 and 0
        (ratios(pair)[0].ln() - (1 - HALF) / beta) ** 2 + (ratios(pair)[1].ln() - (0 - HALF) / beta) ** 2
    ),
    "apo_zero": lambda pair, beta: 1 - logistic(beta * ratios(pair)[0].ln()) + logistic(beta * ratios(pair)[1].ln()),
    "apo_down": lambda pair, beta: logistic(beta * ratios(pair)[0].ln()) + 1 - logistic(beta * margin(pair)),
    "simpo": lambda pair, beta, gamma: (
        -bradley_terry(((beta * pair[0] / pair[4] - gamma).exp(), (beta * pair[1] / pair[5]).exp()))[0]
    ),
    "orpo": odds_ratio,
}
OF_A_STEP = {
    "aot": lambda step, beta, label_smoothing: transport(
        [p[0] - p[1] for p in step], [p[2] - p[3] for p in step], beta, label_smoothing
    ),
    "aot_unpaired": lambda step, beta, label_smoothing: transport(
        [p[0] - p[2] for p in step], [p[1] - p[3] for p in step], beta, label_smoothing
    ),
    "sft": lambda step, beta: [-sum(p[0] for p in step) / sum(p[4] for p in step)] * len(step),
}
DERIVATIVE = {  # f'(u)
    "reverse_kl": lambda u, alpha: u.ln(),
    "forward_kl": lambda u, alpha: 1 - 1 / u,
    "js": lambda u, alpha: (2 * u / (1 + u)).ln(),
    "alpha": lambda u, alpha: (((alpha - 1) * u.ln()).exp() - 1) / (alpha - 1),
}


def rows(pairs: Logps) -> list[list[Decimal]]:
    return [[Decimal(value) for value in row] for row in torch.stack(pairs).T.tolist()]


def oracle(step: list[list[Decimal]], objective: Objective) -> list[Decimal]:
    beta, options = Decimal(objective.beta), {key: Decimal(value) for key, value in objective.options.items()}
    scored = []
    for pair in step:
        scores = [DERIVATIVE[objective.divergence](u, Decimal(objective.divergence_alpha)) for u in ratios(pair)]
        diverges = objective.divergence != "reverse_kl"
        scored.append([*scores, Decimal(0), Decimal(0), *pair[4:]] if diverges else pair)
    if objective.name in OF_A_STEP:
        losses = OF_A_STEP[objective.name](scored, beta, **options)
    else:
        losses = [PAIRWISE[objective.name](pair, beta, **options) for pair in scored]
    return [loss - Decimal(objective.nll_weight) * pair[0] / pair[4] for loss, pair in zip(losses, step, strict=True)]


def oracle_gradients(step: list[list[Decimal]], objective: Objective) -> list[list[Decimal]]:
    """Derivatives of the step's summed loss by each pair's two log-probabilities: central differences, good to 30 digits."""
    width = Decimal("1e-20")

    def moved(i: int, side: int, by: Decimal) -> Decimal:
        pair = [value + by if place == side else value for place, value in enumerate(step[i])]
        if objective.name in OF_A_STEP:
            return sum(oracle([*step[:i], pair, *step[i + 1 :]], objective))
        return oracle([pair], objective)[0]

    return [
        [(moved(i, side, width) - moved(i, side, -width)) / (2 * width) for side in (0, 1)] for i in range(len(step))
    ]


def differentiated(pairs: Logps, loss: Callable[[Logps], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses, [B], and the derivatives of their sum, [B, 2]."""
    sides = [side.clone().requires_grad_() for side in pairs[:2]]
    losses = loss(pairs._replace(chosen=sides[0], rejected=sides[1]))
    gradients = torch.autograd.grad(losses.sum(), sides, allow_unused=True)
    return losses.detach(), torch.stack([torch.zeros_like(losses) if g is None else g for g in gradients], 1)


def assert_equals_the_oracle(pairs: Logps, objective: Objective) -> None:
    check(objective)
    values, gradients = differentiated(pairs, lambda pairs: preference_loss(pairs, objective, None))
    step = rows(pairs)
    truth = torch.tensor([float(loss) for loss in oracle(step, objective)], dtype=torch.float64)
    slopes = torch.tensor([[float(s) for s in pair] for pair in oracle_gradients(step, objective)], dtype=torch.float64)
    assert truth.isfinite().all() and slopes.isfinite().all()
    assert_close(values, truth, rtol=1e-10, atol=1e-14)
    assert_close(gradients, slopes, rtol=1e-9, atol=1e-14)


def test_every_objective_has_an_oracle():
    assert len(OBJECTIVES) >= 19
    assert set(OBJECTIVES) == set(PAIRWISE) | set(OF_A_STEP)
    assert set(OF_A_STEP) == STEPWISE


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_and_gradient_equal_the_paper(name, beta):
    for seed in range(3):
        assert_equals_the_oracle(random_logps(seed), plain(name, beta))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_ratios(name):
    pairs = extreme_logps()
    if name in STEPWISE:  # fewer, for each derivative takes all of them, and no ties, where a sort has none
        pairs = Logps(*(column[::5] for column in pairs))
        apart = torch.linspace(0, 1, 10)
        pairs = pairs._replace(chosen=pairs.chosen + apart, rejected=pairs.rejected - 2 * apart)
    assert_equals_the_oracle(pairs, plain(name))


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_extreme_token_probabilities(name):
    """A mean log-probability from certain (as far as fp32 tells) to impossible."""
    ends = [*itertools.product([-1e4, -200.0, -0.5, -1e-3, -1e-6], repeat=2)]
    assert_equals_the_oracle(logps(*zip(*ends, strict=True)), plain(name))


def test_certain_tokens_have_finite_odds():
    values, gradients = differentiated(
        logps([0.0, 0.0, -1.0], [0.0, -1.0, 0.0]), lambda pairs: preference_loss(pairs, plain("orpo"), None)
    )
    assert values.isfinite().all() and gradients.isfinite().all()
    assert values[1] < 1e-6 < values[0] < values[2]


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", sorted(MARGINAL))
def test_divergences_equal_the_paper(name, divergence):
    ends = torch.tensor([*itertools.product([-12.0, -2.0, 0.25, 3.0, 12.0], repeat=2)]).double().T
    pairs = logps(*(ends - 50), -50, -50, 7, 3)
    for alpha in (0.3, 1.2) if divergence == "alpha" else (0.5,):
        assert_equals_the_oracle(pairs, plain(name, divergence=divergence, divergence_alpha=alpha))


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", sorted(MARGINAL))
def test_divergences_stay_finite(name, divergence):
    objective = plain(name, divergence=divergence)
    values, gradients = differentiated(extreme_logps(), lambda pairs: preference_loss(pairs, objective, None))
    assert values.isfinite().all() and gradients.isfinite().all()
    if name == "sigmoid" and divergence != "js":
        settled = (extreme_logps().c >= 0) & (extreme_logps().r <= -800)
        assert settled.sum() == 8 and values[settled].max() == 0 and gradients[settled].abs().max() == 0


def test_alpha_divergence_at_its_ends():
    pairs = random_logps(0)._replace(
        reference_chosen=torch.full((8,), -20.0), reference_rejected=torch.full((8,), -20.0)
    )

    def loss(divergence, alpha=0.5):
        return preference_loss(pairs, plain("sigmoid", divergence=divergence, divergence_alpha=alpha), None)

    assert_close(loss("alpha", 1.0), loss("reverse_kl"), rtol=0, atol=0)
    assert_close(loss("alpha", 1.0 + 1e-5), loss("reverse_kl"), rtol=1e-2, atol=0)
    assert_close(loss("alpha", 1e-12), loss("forward_kl"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - LIKELIHOOD))
def test_nll_term_and_weights(name):
    objective = plain(name, nll_weight=0.7)
    assert_equals_the_oracle(random_logps(4), objective)
    if name in MARGINAL:
        assert_equals_the_oracle(random_logps(4), dataclasses.replace(objective, divergence="js"))
    if name in STEPWISE:
        return
    pairs, factors = random_logps(4), torch.linspace(0.1, 2.0, 8, dtype=torch.float64)
    without = preference_loss(pairs, plain(name), None)
    expected = factors * without - 0.7 * pairs.chosen / pairs.chosen_tokens
    assert_close(preference_loss(pairs, objective, factors), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"hinge"}))  # the hinge has a kink
def test_gradcheck(name):
    pairs = random_logps(7, count=4)
    sides = [side.clone().requires_grad_() for side in pairs[:2]]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(pairs._replace(chosen=chosen, rejected=rejected), plain(name), None).clone()

    assert torch.autograd.gradcheck(loss, sides)
