"""Preference losses: free functions of tensors, one loss a pair, [B].

`chosen` and `rejected` are the implicit rewards without beta: the log-ratios log pi(y|x) - log pi_ref(y|x) in nats,
summed over the completion's tokens, [B].
"""

import torch.nn.functional as F
from torch import Tensor


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO: -log sigma(beta (chosen - rejected)). Rafailov et al. (2023), eq. 7; Tunstall et al. (2023), eq. 1."""
    return -F.logsigmoid(beta * (chosen - rejected))


OBJECTIVES = {"sigmoid": sigmoid}
