"""The reference: the model that the policy starts as, as three ways to have its log-probabilities.

    copy          a second, frozen set of weights
    adapter       the policy with its new adapter off; or, if it has to follow the policy, a frozen second adapter
    precomputed   log-probabilities of every pair, made once before the first step and kept on disk

All three give the same numbers, and none of them trains. A reference that follows the policy (TR-DPO, Gorbatovski et
al., 2024) does so by `follow`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zephyr.data.batch import Batch
from zephyr.models import adapters, decoder

SequenceLogps = Callable[
    [Any, Batch], Tensor
]  # (model, batch) -> [2B] in nats: the chosen ones, then the rejected ones
_CODE = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")


class Copy(nn.Module):
    """A frozen model of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def logps(self, policy: Any, batch: Batch, of: SequenceLogps) -> Tensor:
        """The reference's log-probabilities, [2B]."""
        return of(self.model, batch)

    @torch.no_grad()
    def follow(self, policy: Any, share: float) -> None:
        """Move towards the policy: share x policy + (1 - share) x reference, weight by weight."""
        for own, other in zip(self.model.parameters(), policy.parameters(), strict=True):
            if other.requires_grad:
                own.lerp_(other.to(own.dtype), share)


class AdapterOff(nn.Module):
    """The policy without the adapter that it trains: its base, with the adapter that it started from if any."""

    def __init__(self, follows: bool) -> None:
        super().__init__()
        self.follows = follows  # then the policy was loaded with a second adapter for it

    def beside(self, policy: Any) -> bool:
        """Whether the policy's own forward pass can have the reference's log-probabilities as well."""
        return decoder.rewritten(policy.get_base_model()) and not any(c.use_dora for c in policy.peft_config.values())

    def logps(self, policy: Any, batch: Batch, of: SequenceLogps) -> Tensor:
        """The reference's log-probabilities, [2B]."""
        with adapters.reference_on(policy) if self.follows else adapters.default_off(policy):
            return of(policy, batch)

    def follow(self, policy: Any, share: float) -> None:
        """Move the second adapter towards the first: share x default + (1 - share) x reference, factor by factor."""
        adapters.sync(policy, share)


class Precomputed(nn.Module):
    """Log-probabilities that came with the batch."""

    def logps(self, policy: Any, batch: Batch, of: SequenceLogps) -> Tensor:
        """The reference's log-probabilities, [2B]."""
        if batch.reference is None:
            assert batch.examples == 0  # idle: nothing was precomputed for it
            return torch.zeros(0, dtype=torch.float64, device=batch.ids.device)
        return batch.reference


Reference = Copy | AdapterOff | Precomputed


@torch.no_grad()
def measured(
    policy: Any,
    batches: Iterable[tuple[list[int], Batch]],
    examples: int,
    of: SequenceLogps,
    autocast: torch.dtype | None,
) -> np.ndarray:
    """Log-probabilities [examples, 2] of (chosen, rejected) under a model, NaN for pairs that no batch holds.

    `batches` come each with the indices of its pairs.
    """
    device = next(policy.parameters()).device
    found = np.full((examples, 2), np.nan)
    for members, batch in batches:
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logps = of(policy, batch.to(device))
        found[members] = logps.reshape(2, -1).T.cpu().numpy()
    return found


def precompute(
    policy: Any,
    batches: Iterable[tuple[list[int], Batch]],
    examples: int,
    of: SequenceLogps,
    file: Path,
    known: bool,
    autocast: torch.dtype | None,
) -> np.ndarray:
    """Log-probabilities [examples, 2] of (chosen, rejected) under the policy as it is.

    They are read from `file` if it is `known`, and else written to it. `batches` is this
    process's share, each with the indices of its pairs. All processes call this.
    """
    if known:
        return np.load(file, allow_pickle=False)
    found = measured(policy, batches, examples, of, autocast)
    if dist.is_initialized():
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, found)
        found = np.nanmax(np.stack(shares), 0) if len(shares) > 1 else found
    if not np.isfinite(found).all():
        raise FloatingPointError(f"the reference gives {int((~np.isfinite(found)).sum())} log-probabilities not finite")
    if not dist.is_initialized() or dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{uuid4().hex[:8]}.npy")
        np.save(partial, found, allow_pickle=False)
        partial.replace(file)
    return found


def precomputed_file(cache: Path, **content: str | float | bool | None) -> Path:
    """Where these log-probabilities are kept: the name is a hash of all that decides them, and of the code."""
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
    for path in _CODE:
        digest.update(path.read_bytes())
    return cache / "reference" / f"{digest.hexdigest()}.npy"
