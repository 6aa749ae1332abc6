"""Direct preference optimisation (Rafailov et al., 2023; Tunstall et al., 2023, section 3) and its relatives."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from zephyr.data.batch import Batch
from zephyr.models import adapters
from zephyr.models.logps import Scores, sequence_sums, token_scores
from zephyr.models.reference import AdapterOff, Precomputed, Reference
from zephyr.objectives import REFERENCE_FREE, STEPWISE, Logps, preference_loss, rewards, wpo_weights
from zephyr.settings import Objective
from zephyr.settings import Reference as ReferenceSettings
from zephyr.training.task import Sums, Task


class DPO(Task):
    """Fits the policy to preference pairs while `beta` ties it to the reference, the model that it starts as.

    Implicit rewards are beta (log pi(y|x) - log pi_ref(y|x)), in nats, where the objective does not say otherwise.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *args: Any,
        objective: Objective,
        reference: Reference | None,
        sync: ReferenceSettings | None = None,
    ) -> None:
        super().__init__(_without_dropout(policy), *args)
        self.objective, self.sync = objective, sync
        assert (reference is None) == (objective.name in REFERENCE_FREE)
        self.reference = reference

    def units(self, batch: Batch) -> int:
        return batch.examples

    def loss(self, batch: Batch) -> tuple[Tensor, Sums]:
        pairs, weights = self.pairs(batch)
        losses = preference_loss(pairs, self.objective, weights)
        return losses.sum(), self._watched(pairs)

    def losses(self, batches: list[Batch]) -> Iterator[tuple[Tensor, Sums]]:
        """Of an objective that couples the pairs of a step, the micro-batches' shares of the step's one loss.

        The loss is a function of the step's log-probabilities alone. They are computed first, without gradient; then
        each micro-batch contributes its log-probabilities times the loss's derivative with respect to them. So the
        gradient is that of the whole step at once, at the price of one more forward pass.
        """
        if self.objective.name not in STEPWISE:
            yield from super().losses(batches)
            return
        with torch.no_grad():
            own = [self.pairs(batch)[0] for batch in batches]
        with torch.enable_grad():
            losses, derivatives = _coupled(own, self.objective)
        for batch, share, (by_chosen, by_rejected) in zip(batches, losses, derivatives, strict=True):
            pairs, _ = self.pairs(batch)
            surrogate = (by_chosen * pairs.chosen + by_rejected * pairs.rejected).sum()
            yield surrogate - surrogate.detach() + share, self._watched(pairs)

    def pairs(self, batch: Batch) -> tuple[Logps, Tensor | None]:
        """Log-probabilities of a micro-batch's pairs under policy and reference, and WPO's weights if it is on."""
        weighted = self.objective.weighting == "wpo"
        together = isinstance(self.reference, AdapterOff) and self.reference.beside(self.policy)
        scores = token_scores(self.policy, batch, collisions=weighted, reference=together)
        chosen, rejected = self._sums(scores.logps, batch).chunk(2)
        with torch.no_grad():
            reference = torch.zeros(2 * batch.examples, dtype=torch.float64, device=chosen.device)
            if scores.reference is not None:
                reference = self._sums(scores.reference, batch)
            elif self.reference is not None:
                reference = self.reference.logps(self.policy, batch, self.sequence_logps)
        counts = sequence_sums(torch.ones_like(scores.logps.detach()), batch, 2 * batch.examples)
        pairs = Logps(chosen, rejected, *reference.chunk(2), *counts.chunk(2))
        return pairs, _wpo(scores, batch, counts) if weighted else None

    def sequence_logps(self, model: Any, batch: Batch) -> Tensor:
        """Log-probability of each completion given its prompt, [2B] in nats: all chosen, then all rejected ones."""
        return self._sums(token_scores(model, batch).logps, batch)

    def on_train_batch_end(self, outputs: Any, batch: list[Batch], batch_idx: int) -> None:
        if self.sync is None or self.sync.sync_every_n_steps is None or self.reference is None:
            return
        if self.trainer.global_step % self.sync.sync_every_n_steps == 0:
            assert not isinstance(self.reference, Precomputed)
            self.reference.follow(self.policy, self.sync.sync_share)

    def changing(self) -> set[str]:
        names = super().changing()
        if self.sync is None or self.sync.sync_every_n_steps is None:
            return names
        if isinstance(self.reference, AdapterOff):
            return names | {f"policy.{name}" for name, _ in adapters.reference_parameters(self.policy)}
        return names | {name for name, _ in self.named_parameters() if name.startswith("reference.")}

    def _sums(self, logps: Tensor, batch: Batch) -> Tensor:
        """Sums over the completions, [2B]; with LD-DPO the tokens by which one is longer count `ld_alpha`."""
        alpha = self.objective.ld_alpha
        if alpha < 1:
            logps = logps * _length_weights(batch, alpha)
        return sequence_sums(logps, batch, 2 * batch.examples)

    def _watched(self, pairs: Logps) -> Sums:
        chosen, rejected = (reward.detach() for reward in rewards(pairs, self.objective))
        margins = chosen - rejected
        accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()  # a tie is a coin toss
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": accuracies.sum(),
            "logps/chosen": pairs.chosen.detach().sum(),
            "logps/rejected": pairs.rejected.detach().sum(),
        }


def _coupled(own: list[Logps], objective: Objective) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """What of the step's loss falls to each micro-batch of this process, and the derivatives by (chosen, rejected).

    The pairs of all processes are put together, each process computes the whole step's loss, and takes its part.
    """
    columns = torch.stack([torch.cat(column) for column in zip(*own, strict=True)])  # [6, own pairs]
    first, step = 0, columns
    if dist.is_initialized():
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, columns.cpu())
        first = sum(share.shape[1] for share in shares[: dist.get_rank()])
        step = torch.cat(shares, 1).to(columns.device)
    pairs = Logps(*step)
    variables = [side.clone().requires_grad_() for side in (pairs.chosen, pairs.rejected)]
    losses = preference_loss(pairs._replace(chosen=variables[0], rejected=variables[1]), objective, None)
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), variables, materialize_grads=True)
    sizes = [len(micro.chosen) for micro in own]

    def parts(values: Tensor) -> tuple[Tensor, ...]:
        return values.detach()[first : first + sum(sizes)].split(sizes)

    return [part.sum() for part in parts(losses)], list(zip(parts(by_chosen), parts(by_rejected), strict=True))


def _length_weights(batch: Batch, alpha: float) -> Tensor:
    """1 for the tokens of a completion up to the length of the shorter one of its pair, `alpha` for the rest, [N]."""
    sizes = torch.bincount(batch.sequences, minlength=2 * batch.examples)
    shorter = torch.minimum(*sizes.chunk(2)).repeat(2)
    places = torch.arange(len(batch.sequences), device=sizes.device)  # a completion's tokens follow one another
    first = places.new_full((len(sizes),), len(places)).scatter_reduce(0, batch.sequences, places, "amin")
    within = places - first[batch.sequences]
    return torch.where(within < shorter[batch.sequences], 1.0, alpha)


def _wpo(scores: Scores, batch: Batch, counts: Tensor) -> Tensor:
    assert scores.collisions is not None
    surprise = sequence_sums((scores.logps - scores.collisions).detach(), batch, 2 * batch.examples)
    return wpo_weights(*(surprise / counts).chunk(2))


def _without_dropout(policy: PreTrainedModel) -> PreTrainedModel:
    """Dropout in the policy's pass alone would read as a difference from the reference: step 0 would not be ln 2."""
    module: Any
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return policy
