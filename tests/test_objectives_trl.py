"""Preference objectives, their gradients and rewards against TRL 1.16's own trainer."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import tiny
from tests.preferences import extreme_logps, plain, random_logps
from zephyr.objectives import MARGINAL, STEPWISE, Logps, check, preference_loss, rewards, wpo_weights
from zephyr.settings import Objective

pytestmark = [  # TRL's and its libraries'
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

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
