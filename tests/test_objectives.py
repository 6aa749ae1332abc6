"""Preference objectives against TRL 1.16's own trainer, against their papers in exact decimals, and by hand."""

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Callable
from decimal import Decimal, getcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import Tensor
from torch.testing import assert_close

from tests import tiny
from zephyr.errors import UserError
from zephyr.objectives import (
    LIKELIHOOD,
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
from zephyr.settings import Objective

pytestmark = [  # TRL's and its libraries'
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

GROUP = Path(__file__).parents[1] / "conf" / "objective"
OWN = {  # the functions' own parameters, at values that tell them apart
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.01},
    "discopop": {"tau": 0.05},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "simpo": {"gamma": 0.7},
}


def plain(name: str, beta: float = 0.1, **changes) -> Objective:
    return dataclasses.replace(
        Objective(name, beta, "reverse_kl", 0.5, None, 1.0, 0.0, dict(OWN.get(name, {}))), **changes
    )


def logps(chosen, rejected, reference_chosen=0.0, reference_rejected=0.0, chosen_tokens=1.0, rejected_tokens=1.0):
    columns = (chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens)
    return Logps(*(torch.as_tensor(column, dtype=torch.float64).expand(len(chosen)) for column in columns))


def random_logps(seed: int, count: int = 8) -> Logps:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(6, count, generator=generator, dtype=torch.float64)
    tokens = 1 + (60 * uniform[4:]).floor()
    policy = -3 * tokens * uniform[:2] - 0.1
    return Logps(*policy, *(policy + 40 * (uniform[2:4] - 0.5)), *tokens)


def extreme_logps() -> Logps:
    """Log-ratios up to 1e4 nats either way, in all combinations."""
    ratios = torch.tensor([*itertools.product([-1e4, -800.0, -30.0, 0.0, 30.0, 800.0, 1e4], repeat=2)]).double().T
    reference = torch.full((49,), -10_100.0, dtype=torch.float64)
    return Logps(
        *(reference + ratios), reference, reference, torch.full_like(reference, 7), torch.full_like(reference, 3)
    )


# --- 1. The papers, in decimals of 60 digits -------------------------------------------------------------------------

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


# --- 2. TRL ----------------------------------------------------------------------------------------------------------

TRL = {  # TRL's name -> ours
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "ipo": "ipo_mean",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
    "sigmoid_norm": "sigmoid_norm",
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's trainer, whose models the tests replace by given log-probabilities."""
    pytest.importorskip("trl", reason="TRL is a development dependency")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    policy, reference = tiny.model(0), tiny.model(0)
    return DPOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=data, processing_class=tiny.tokenizer()
    )


class Tokens(NamedTuple):
    """Log-probabilities of single tokens, [2B, T]: the chosen completions, the rejected ones, nothing behind their ends.

    In sixty-fourths of a nat, so that sums are exact in fp32 too.
    """

    policy: Tensor
    reference: Tensor
    collisions: Tensor  # log sum_v p(v)^2
    mask: Tensor


def spread(pairs: Logps) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.cat(pairs[4:])
    mask = torch.arange(int(lengths.max()) + 2) < lengths[:, None]
    shares = torch.rand(3, *mask.shape, generator=generator, dtype=torch.float64) * mask
    totals = torch.stack([torch.cat(pairs[:2]), torch.cat(pairs[2:4]), -lengths])
    values = (64 * totals[:, :, None] * shares / shares.sum(2, keepdim=True)).round() / 64
    return Tokens(*values, mask)


def parts(tokens: Tokens, objective: Objective) -> list[Tokens]:
    """What one call takes: a pair, or for those that couple the pairs all of them."""
    count = len(tokens.mask) // 2
    if objective.name in STEPWISE:
        return [tokens]
    return [Tokens(*(column[[i, count + i]] for column in tokens)) for i in range(count)]


def by_zephyr(tokens: Tokens, objective: Objective) -> Tensor:
    """The mean loss, from sums written out here: those of the program are tests/test_task.py's."""
    lengths, half = tokens.mask.sum(1), len(tokens.mask) // 2
    tail = torch.arange(tokens.mask.shape[1]) >= torch.minimum(lengths[:half], lengths[half:]).repeat(2)[:, None]
    counted = tokens.mask.double().masked_fill(tail & tokens.mask, objective.ld_alpha)
    policy, reference = ((side.double() * counted).sum(1) for side in (tokens.policy, tokens.reference))
    means = ((tokens.policy - tokens.collisions).double() * tokens.mask).sum(1) / lengths
    weights = wpo_weights(*means.chunk(2)) if objective.weighting else None
    pairs = Logps(*policy.chunk(2), *reference.chunk(2), *lengths.double().chunk(2))
    return preference_loss(pairs, objective, weights).mean()


def by_trl(trainer, name: str, tokens: Tokens, objective: Objective) -> Tensor:
    """TRL's loss of the same log-probabilities, through DPOTrainer.compute_loss."""

    def model(logps: Tensor):
        nothing = torch.zeros_like(logps)
        outputs = SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=tokens.collisions,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing > 0,
        )
        return lambda **inputs: outputs

    trainer.loss_types, trainer.beta = [name], objective.beta
    trainer.label_smoothing = objective.options.get("label_smoothing", 0.0)
    trainer.args.discopop_tau = objective.options.get("tau", 0.05)
    trainer.f_divergence_type = DIVERGENCES[objective.divergence]
    trainer.f_alpha_divergence_coef = objective.divergence_alpha
    trainer.use_weighting = objective.weighting == "wpo"
    trainer.ld_alpha = None if objective.ld_alpha == 1 else objective.ld_alpha
    trainer.ref_model = model(tokens.reference)
    mask = torch.nn.functional.pad(tokens.mask.long(), (1, 0))  # a prompt of one token
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return trainer.compute_loss(model(tokens.policy), inputs)


def assert_equals_trl(trainer, name: str, pairs: Logps, objective: Objective, rtol: float = 1e-10) -> int:
    """Compares loss and gradient, and says of how many calls TRL's were finite. Zephyr's must always be."""
    single = objective.divergence == "alpha"  # which TRL has in fp32 and halves only
    atol = 2e-6 if single else 1e-12
    check(objective)
    finite = 0
    for tokens in parts(spread(pairs), objective):
        theirs_in = Tokens(*((x.float() if single else x) for x in tokens[:3]), tokens.mask)
        leaves = [x.policy.clone().requires_grad_() for x in (tokens, theirs_in)]
        ours = by_zephyr(tokens._replace(policy=leaves[0]), objective)
        theirs = by_trl(trainer, name, theirs_in._replace(policy=leaves[1]), objective)
        (gradient,) = torch.autograd.grad(ours, leaves[0])
        assert ours.isfinite() and gradient.isfinite().all()
        if objective.weighting and name == "hinge":  # TRL multiplies in place what its backward pass needs
            slope = gradient
        else:
            (slope,) = torch.autograd.grad(theirs, leaves[1])
        if theirs.isfinite() and slope.isfinite().all():
            assert_close(ours, theirs.double(), rtol=rtol, atol=atol)
            assert_close(gradient, slope.double() * tokens.mask, rtol=rtol, atol=atol)
            finite += 1
    return finite


def like_trl(name: str, **changes) -> Objective:
    return plain(TRL[name], **changes)


def tolerance(name: str) -> float:
    return 1e-6 if name == "exo_pair" else 1e-10  # TRL takes its label smoothing in fp32


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", TRL)
def test_equals_trl(trainer, name, beta):
    calls = assert_equals_trl(trainer, name, random_logps(1), like_trl(name, beta=beta), tolerance(name))
    assert calls == (1 if TRL[name] in STEPWISE else 8)


@pytest.mark.parametrize("name", TRL)
def test_equals_trl_at_extremes(trainer, name):
    calls = assert_equals_trl(trainer, name, extreme_logps(), like_trl(name), tolerance(name))
    assert calls == (1 if TRL[name] in STEPWISE else 49 if name != "discopop" else calls)
    if name == "discopop":  # TRL multiplies inf by 0 where the policy prefers the rejected completion by far
        assert 25 <= calls < 49


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", [name for name in TRL if TRL[name] in MARGINAL])
def test_divergences_equal_trl(trainer, name, divergence):
    rtol = 1e-4 if divergence == "alpha" else tolerance(name)
    objective = like_trl(name, divergence=divergence)
    assert assert_equals_trl(trainer, name, random_logps(2), objective, rtol) >= (5 if name == "discopop" else 8)
    assert assert_equals_trl(trainer, name, extreme_logps(), objective, rtol) > 10


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", [name for name in TRL if name != "sft"])
def test_length_desensitised_equals_trl(trainer, name, ld_alpha):
    assert assert_equals_trl(trainer, name, random_logps(3), like_trl(name, ld_alpha=ld_alpha), tolerance(name))


@pytest.mark.parametrize("name", [name for name in TRL if TRL[name] not in STEPWISE])
def test_weighted_equals_trl(trainer, name):
    assert assert_equals_trl(trainer, name, random_logps(3), like_trl(name, weighting="wpo"), tolerance(name)) == 8


def test_rewards_equal_trl(trainer):
    for name in ("sigmoid", "sigmoid_norm", "aot"):
        objective, tokens = like_trl(name, beta=0.3, divergence="reverse_kl"), spread(random_logps(5))
        trainer._metrics["train"].clear()
        by_trl(trainer, name, tokens, objective)
        half = len(tokens.mask) // 2
        sums = [side.sum(1) for side in (tokens.policy, tokens.reference)]
        pairs = Logps(*sums[0].chunk(2), *sums[1].chunk(2), *tokens.mask.sum(1).double().split(half))
        for side, reward in zip(("chosen", "rejected"), rewards(pairs, objective), strict=True):
            assert reward.mean().item() == pytest.approx(trainer._metrics["train"][f"rewards/{side}"][-1])


def test_conservative_dpo_equals_trl(trainer):
    """TRL's AOT of a single pair is what its DPO with label smoothing was."""
    objective = plain("cdpo")
    for tokens in parts(spread(random_logps(6)), objective):
        theirs = by_trl(trainer, "aot", tokens, objective)
        assert_close(by_zephyr(tokens, objective), theirs, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")  # TRL says that this part of it is experimental
def test_reference_free_objectives_equal_trl():
    pytest.importorskip("trl", reason="TRL is a development dependency")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    pairs, device = random_logps(8), SimpleNamespace(device="cpu")
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    simpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0, accelerator=device
    )
    losses, *theirs = CPOTrainer.cpo_loss(simpo, *means)
    assert_close(preference_loss(pairs, plain("simpo", 2.0), None), losses, rtol=1e-10, atol=0)
    assert_close(rewards(pairs, plain("simpo", 2.0)), tuple(theirs), rtol=1e-12, atol=0)

    losses, *theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=device), *means)[:3]
    assert_close(preference_loss(pairs, plain("orpo", 0.3), None), pairs.nll - losses, rtol=1e-6, atol=0)
    theirs = tuple(reward.double() for reward in theirs)  # fp32 there
    assert_close(rewards(pairs, plain("orpo", 0.3)), theirs, rtol=1e-6, atol=0)


# --- 3. By hand ------------------------------------------------------------------------------------------------------

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


# --- 4. Configuration ------------------------------------------------------------------------------------------------


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
