"""Direct preference optimisation (Rafailov et al., 2023; Tunstall et al., 2023, section 3)."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zephyr.data.batch import Batch
from zephyr.models.logps import sequence_sums, token_logps
from zephyr.objectives import OBJECTIVES
from zephyr.settings import Objective
from zephyr.task import Task


class DPO(Task):
    """Fits the policy to preference pairs while `beta` ties it to the reference, a frozen copy of its start.

    Implicit rewards are beta (log pi(y|x) - log pi_ref(y|x)), in nats.
    """

    def __init__(self, policy: PreTrainedModel, *args: Any, objective: Objective) -> None:
        super().__init__(_without_dropout(policy), *args)
        self.beta, self.objective = objective.beta, partial(OBJECTIVES[objective.name], beta=objective.beta)
        self.reference = deepcopy(policy).eval().requires_grad_(False)

    def units(self, batch: Batch) -> int:
        return batch.examples

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = sequence_logps(self.policy, batch)
        with torch.no_grad():
            reference = sequence_logps(self.reference, batch)
        chosen, rejected = (policy - reference).chunk(2)
        losses = self.objective(chosen, rejected)

        rewards = {"chosen": self.beta * chosen.detach(), "rejected": self.beta * rejected.detach()}
        margins = rewards["chosen"] - rewards["rejected"]
        accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()  # a tie is a coin toss
        watched = {f"rewards/{side}": reward.sum() for side, reward in rewards.items()}
        watched |= {"rewards/margins": margins.sum(), "rewards/accuracies": accuracies.sum()}
        watched |= {f"logps/{side}": logps.sum() for side, logps in zip(rewards, policy.detach().chunk(2), strict=True)}
        return losses.sum(), watched


def sequence_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability of each completion given its prompt, [2B] in nats: the chosen ones, then the rejected ones."""
    return sequence_sums(token_logps(model, batch), batch, 2 * batch.examples)


def _without_dropout(policy: PreTrainedModel) -> PreTrainedModel:
    """Dropout in the policy's pass alone would read as a difference from the reference: step 0 would not be ln 2."""
    module: Any
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return policy
