"""Supervised fine-tuning (Tunstall et al., 2023, section 3): raise the likelihood of the scored tokens."""

from torch import Tensor

from zephyr.data.batch import Batch
from zephyr.models.logps import token_logps
from zephyr.training.task import Sums, Task


class SFT(Task):
    """Minimises the mean negative log-likelihood of the step's scored tokens, in nats a token."""

    def units(self, batch: Batch) -> int:
        return len(batch.targets)

    def loss(self, batch: Batch) -> tuple[Tensor, Sums]:
        return -token_logps(self.policy, batch).double().sum(), {}
