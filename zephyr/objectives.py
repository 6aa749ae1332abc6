"""Preference objectives: free functions of tensors, one loss a pair, [B], in nats.

The letters are those of the equations:

    w, l    the chosen and the rejected completion; |w|, |l| their tokens
    c       log pi(w|x) - log pi_ref(w|x), the log-ratio of the chosen completion
    r       log pi(l|x) - log pi_ref(l|x), that of the rejected one
    h       c - r
    sigma   the logistic function, 1 / (1 + exp(-z))

A value or gradient is finite wherever its equation's fits a float64. docs/objectives.md has all of them in one table,
and says where another program computes something else under the same name.
"""

import math
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zephyr.errors import UserError
from zephyr.settings import Must, Objective, nearest

# A divergence's exponential stops growing here, and has no gradient beyond: TRL's bound, where it keeps float32
# finite. It also keeps 0 * inf out of the gradient of a pair that is long since settled.
MAX_EXPONENT = 80.0
CERTAIN = -(2.0**-23)  # nats a token: fp32 logits cannot tell a mean log-probability above it from p = 1

Flipped = Annotated[float, Must("in [0, 0.5), the share of wrong labels", lambda value: 0 <= value < 0.5)]
Doubt = Annotated[float, Must("in (0, 0.5)", lambda value: 0 < value < 0.5)]
Margin = Annotated[float, Must("at least 0", lambda value: value >= 0)]
Temperature = Annotated[float, Must("above 0", lambda value: value > 0)]


class Logps(NamedTuple):
    """Log-probabilities of B pairs, summed over each completion's tokens, in nats; all [B], float64."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor  # zeros where the objective has no reference
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def c(self) -> Tensor:
        """Log-ratio of the chosen completion."""
        return self.chosen - self.reference_chosen

    @property
    def r(self) -> Tensor:
        """Log-ratio of the rejected completion."""
        return self.rejected - self.reference_rejected

    @property
    def h(self) -> Tensor:
        """How much further the policy has moved towards the chosen completion."""
        return self.c - self.r

    @property
    def h_a_token(self) -> Tensor:
        """The same, each log-ratio divided by its completion's tokens."""
        return self.c / self.chosen_tokens - self.r / self.rejected_tokens

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood of the chosen completion's tokens."""
        return -self.chosen / self.chosen_tokens


Function = TypeVar("Function", bound=Callable[..., Tensor])

OBJECTIVES: dict[str, Callable[..., Tensor]] = {}
MARGINAL: set[str] = set()  # see c and r only as a difference, so that another divergence may take their place
STEPWISE: set[str] = set()  # couple the pairs: called once, with all pairs of the optimizer step and of all ranks
REFERENCE_FREE: set[str] = set()  # never look at the reference
LIKELIHOOD: set[str] = set()  # hold the likelihood of the chosen completion themselves


def register(*kinds: set[str]) -> Callable[[Function], Function]:
    """Enter a function of (pairs, beta, own parameters) into OBJECTIVES, and its name into the sets it belongs to."""

    def enter(function: Function) -> Function:
        OBJECTIVES[function.__name__] = function
        for kind in kinds:
            kind.add(function.__name__)
        return function

    return enter


@register(MARGINAL)
def sigmoid(pairs: Logps, beta: float) -> Tensor:
    """DPO: -log sigma(beta h). Rafailov et al. (2023), eq. 7; Tunstall et al. (2023), eq. 1."""
    return -F.logsigmoid(beta * pairs.h)


@register(MARGINAL)
def cdpo(pairs: Logps, beta: float, label_smoothing: Flipped) -> Tensor:
    """Conservative DPO: -(1 - e) log sigma(beta h) - e log sigma(-beta h), e = label_smoothing.

    Mitchell (2023), eq. 3, and the original DPO repository.
    """
    return _smoothed(beta * pairs.h, label_smoothing)


@register(MARGINAL)
def robust(pairs: Logps, beta: float, label_smoothing: Flipped) -> Tensor:
    """Robust DPO: (-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2e), e = label_smoothing.

    Its mean over labels of which a share e is flipped is DPO's over the right ones; not bounded from below.
    Chowdhury et al. (2024), section 3.1.
    """
    e, logits = label_smoothing, beta * pairs.h
    return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)


@register(MARGINAL)
def hinge(pairs: Logps, beta: float) -> Tensor:
    """max(0, 1 - beta h). Zhao et al. (2023), SLiC-HF, with log-ratios as in Liu et al. (2023), RSO."""
    return F.relu(1 - beta * pairs.h)


@register(MARGINAL)
def ipo_sum(pairs: Logps, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, beta being the paper's tau. Azar et al. (2023), eq. 17."""
    return (pairs.h - 1 / (2 * beta)) ** 2


@register(MARGINAL)
def ipo_mean(pairs: Logps, beta: float) -> Tensor:
    """(c / |w| - r / |l| - 1 / (2 beta))^2: IPO of means over tokens, which TRL says its authors meant."""
    return (pairs.h_a_token - 1 / (2 * beta)) ** 2


@register(MARGINAL)
def sigmoid_norm(pairs: Logps, beta: float) -> Tensor:
    """Length-normalised DPO: -log sigma(beta (c / |w| - r / |l|)). Lambert et al. (2024), Tulu 3, section 5.1."""
    return -F.logsigmoid(beta * pairs.h_a_token)


@register(MARGINAL)
def exo_pair(pairs: Logps, beta: float, label_smoothing: Doubt) -> Tensor:
    """EXO: KL(q || p) of q = (sigma(beta h), sigma(-beta h)) from p = (1 - e, e), e = label_smoothing.

    Ji et al. (2024), eq. 16.
    """
    e, logits = label_smoothing, beta * pairs.h
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-e))
    return chosen + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(e))


@register(MARGINAL)
def discopop(pairs: Logps, beta: float, tau: Temperature) -> Tensor:
    """DiscoPOP: (1 - m) (-log sigma(beta h)) + m exp(-beta h), m = sigma(beta h / tau). Lu et al. (2024), eq. 5."""
    logits = beta * pairs.h
    logistic = -F.logsigmoid(logits) * (-logits / tau).sigmoid()
    return logistic + (F.logsigmoid(logits / tau) - logits).exp()  # apart, m is 0 where the exponential is inf


@register()
def nca_pair(pairs: Logps, beta: float) -> Tensor:
    """NCA: -log sigma(beta c) - (log sigma(-beta c) + log sigma(-beta r)) / 2. Chen et al. (2024), section 4."""
    chosen, rejected = beta * pairs.c, beta * pairs.r
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@register()
def bco_pair(pairs: Logps, beta: float) -> Tensor:
    """BCO without its reward shift: -log sigma(beta c) - log sigma(-beta r). Jung et al. (2024), section 4."""
    return -F.logsigmoid(beta * pairs.c) - F.logsigmoid(-beta * pairs.r)


@register()
def sppo_hard(pairs: Logps, beta: float) -> Tensor:
    """SPPO with win probabilities 1 and 0: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. Wu et al. (2024), eq. 4.7."""
    return (pairs.c - 1 / (2 * beta)) ** 2 + (pairs.r + 1 / (2 * beta)) ** 2


@register()
def apo_zero(pairs: Logps, beta: float) -> Tensor:
    """APO-zero: 1 - sigma(beta c) + sigma(beta r). D'Oosterlinck et al. (2024), eq. 7."""
    return (-beta * pairs.c).sigmoid() + (beta * pairs.r).sigmoid()


@register()
def apo_down(pairs: Logps, beta: float) -> Tensor:
    """APO-down: sigma(beta c) + 1 - sigma(beta h). D'Oosterlinck et al. (2024), eq. 8."""
    return (beta * pairs.c).sigmoid() + (-beta * pairs.h).sigmoid()


@register(STEPWISE)
def aot(pairs: Logps, beta: float, label_smoothing: Flipped) -> Tensor:
    """AOT: cDPO of sorted(log pi(w|x) - log pi(l|x)) - sorted(the reference's), so that the step's quantiles compete.

    The losses are those of the sorted differences, not of the pairs in their order. Melnyk et al. (2024), section 3.
    """
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


@register(STEPWISE)
def aot_unpaired(pairs: Logps, beta: float, label_smoothing: Flipped) -> Tensor:
    """AOT of unpaired completions: cDPO of sorted(c) - sorted(r). Melnyk et al. (2024), section 3."""
    return _smoothed(beta * (pairs.c.sort().values - pairs.r.sort().values), label_smoothing)


@register(STEPWISE, REFERENCE_FREE, LIKELIHOOD)
def sft(pairs: Logps, beta: float) -> Tensor:
    """The chosen completions' negative log-likelihood, averaged over the step's tokens; beta has no part in it."""
    return (-pairs.chosen.sum() / pairs.chosen_tokens.sum()).expand_as(pairs.chosen)


@register(REFERENCE_FREE)
def simpo(pairs: Logps, beta: float, gamma: Margin) -> Tensor:
    """SimPO: -log sigma(beta log pi(w|x) / |w| - beta log pi(l|x) / |l| - gamma). Meng et al. (2024), eq. 6."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register(REFERENCE_FREE, LIKELIHOOD)
def orpo(pairs: Logps, beta: float) -> Tensor:
    """ORPO: -log p(w) - beta log sigma(log odds(w) - log odds(l)), odds = p / (1 - p), beta the paper's lambda.

    p is the geometric mean of a completion's token probabilities. Hong et al. (2024), eq. 4, 6 and 7.
    """
    odds = _log_odds(pairs.chosen / pairs.chosen_tokens) - _log_odds(pairs.rejected / pairs.rejected_tokens)
    return pairs.nll - beta * F.logsigmoid(odds)


def preference_loss(pairs: Logps, objective: Objective, weights: Tensor | None) -> Tensor:
    """The loss of each pair, [B]: the objective of the divergence's scores, times WPO's weights, plus the NLL term.

    `weights` are those of wpo_weights, or None without WPO. The NLL term is nll_weight times the mean negative
    log-likelihood of the chosen completion's tokens: Pang et al. (2024), eq. 1, who weigh the other term.
    """
    scores = _scores(pairs, objective.divergence, objective.divergence_alpha)
    losses = OBJECTIVES[objective.name](scores, objective.beta, **objective.options)
    if weights is not None:
        losses = weights * losses
    return losses + objective.nll_weight * pairs.nll if objective.nll_weight else losses


def rewards(pairs: Logps, objective: Objective) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and rejected completions, [B] each, without gradient: what a run logs.

    beta times the log-ratio, whatever the divergence, as TRL does; without a reference beta times the mean
    log-probability of a token: Meng et al. (2024), eq. 4.
    """
    if objective.name in REFERENCE_FREE:
        chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    else:
        chosen, rejected = pairs.c, pairs.r
    return objective.beta * chosen.detach(), objective.beta * rejected.detach()


def wpo_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How likely the policy is to write both completions of a pair, against its own samples, [B], without gradient.

    Takes the means over each completion's tokens, [B], of log p(y_t) - log sum_v p(v)^2, v over the vocabulary.
    Zhou et al. (2024), eq. 2, with sampled alignment.
    """
    return (chosen + rejected).detach().exp()


def parameters(name: str) -> dict[str, Must]:
    """An objective's own parameters and what each must be: the annotations of its signature."""
    hints = typing.get_type_hints(OBJECTIVES[name], include_extras=True)
    return {key: hint.__metadata__[0] for key, hint in hints.items() if key not in ("pairs", "beta", "return")}


def check(objective: Objective) -> None:
    """Raise UserError if there is no such objective, its parameters are not its own, or its modifiers do not fit it."""
    name, options = objective.name, objective.options
    if name not in OBJECTIVES:
        raise UserError(
            f"There is no objective {name!r}: take one of {', '.join(OBJECTIVES)}.{nearest(name, OBJECTIVES)}"
        )
    own = parameters(name)
    for key in options:
        if key not in own:
            common = [field.name for field in fields(Objective)]
            has = f"beside what all have, it has {', '.join(own)}" if own else "it has none of its own"
            raise UserError(f"objective={name} has no parameter {key!r}: {has}.{nearest(key, [*own, *common])}")
    for key, must in own.items():
        if key not in options:
            raise UserError(f"objective.{key} is not set, and objective={name} needs it.")
        if not must.holds(options[key]):
            raise UserError(f"objective.{key} of objective={name} must be {must.be}; got {options[key]}.")
    for clash, why in _clashes(objective):
        if clash:
            raise UserError(f"objective={name} {why}")


def _clashes(objective: Objective) -> list[tuple[bool, str]]:
    name, divergence = objective.name, objective.divergence
    discounts, adds_nll = objective.ld_alpha != 1, objective.nll_weight != 0
    return [
        (
            divergence != "reverse_kl" and name not in MARGINAL,
            f"cannot take objective.divergence={divergence}, which needs a loss of the difference between chosen and "
            f"rejected: set objective.divergence=reverse_kl, or objective to one of {', '.join(sorted(MARGINAL))}.",
        ),
        (
            objective.weighting == "wpo" and name in STEPWISE,
            "cannot be weighed by objective.weighting=wpo: its losses do not belong to single pairs. "
            "Set objective.weighting=null.",
        ),
        (
            discounts and name in LIKELIHOOD,
            f"trains on the likelihood of whole completions, of which objective.ld_alpha={objective.ld_alpha} would "
            "leave out a part: set objective.ld_alpha=1.0.",
        ),
        (
            adds_nll and name in LIKELIHOOD,
            "holds the chosen completion's likelihood already: set objective.nll_weight=0.0.",
        ),
        (
            adds_nll and discounts,
            f"cannot take both objective.nll_weight={objective.nll_weight}, a likelihood of whole completions, and "
            f"objective.ld_alpha={objective.ld_alpha}, which leaves out a part of them: set the first to 0.0 or the "
            "second to 1.0.",
        ),
    ]


def _scores(pairs: Logps, divergence: str, alpha: float) -> Logps:
    """Pairs whose c and r are f'(u) in place of log u, u = pi / pi_ref. Wang et al. (2023), table 1.

    For the alpha divergence f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha = 1 is the reverse KL
    divergence and which at alpha = 0 is the forward one, 1 - 1 / u: TRL's alpha, and 1 - the paper's. For
    Jensen-Shannon's it is log(2u / (1 + u)).
    """
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(divergence, alpha - 1)
    if divergence == "js":
        c, r = (math.log(2) + F.logsigmoid(x) for x in (pairs.c, pairs.r))
    elif abs(power) < 1e-6:  # as TRL
        return pairs
    else:  # not expm1, whose derivative torch takes from its value: nothing is left of it where that is near -1
        c, r = (((power * x).clamp(max=MAX_EXPONENT).exp() - 1) / power for x in (pairs.c, pairs.r))
    nothing = torch.zeros_like(c)
    return pairs._replace(chosen=c, rejected=r, reference_chosen=nothing, reference_rejected=nothing)


def _smoothed(logits: Tensor, flipped: float) -> Tensor:
    return -(1 - flipped) * F.logsigmoid(logits) - flipped * F.logsigmoid(-logits)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp)."""
    logp = logp.clamp(max=CERTAIN)
    return logp - (-logp.expm1()).log()
