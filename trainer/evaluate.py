"""Validation in bits per byte, a figure that doesn't depend on the tokenizer.

Owns the sums over an evaluation set and the ratio they make. Must not know where batches come from
or how many ranks share them: sums of ranks add up.

Invariant: adding the sums of any split of the rows gives the sums of the whole, up to fp64
rounding. Definition: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvaluationSums:
    """Nats over the targets whose token has bytes, and those bytes."""

    nats: float
    bytes: int

    def __add__(self, other: Self) -> EvaluationSums:
        return EvaluationSums(self.nats + other.nats, self.bytes + other.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Raises ValueError when no target has bytes, rather than give an infinite figure."""
        return bits_per_byte(self.nats, self.bytes)


def bits_per_byte(nats: float, total_bytes: int) -> float:
    """Nats per byte in bits. Raises ValueError for no bytes at all."""
    if total_bytes <= 0:
        raise ValueError("the evaluation set has no target with bytes: evaluate more tokens")
    return nats / (math.log(2) * total_bytes)


@torch.no_grad()
def evaluate(
    token_losses: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes_V: Tensor,
) -> EvaluationSums:
    """Sum nats and bytes over all batches.

    Args:
        token_losses: from ids and targets [B, T] to nats [B, T], such as GPT.token_losses.
        batches: pairs of ids and targets [B, T] on the model's device; targets of -1 don't count.
        token_bytes_V: UTF-8 bytes of every token, 0 for special ones (which don't count), on the
            same device.
    """
    # Sums stay on the device, in fp64, and are read once: no wait for the device in between.
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes_V.device)
    total = torch.zeros((), dtype=torch.int64, device=token_bytes_V.device)
    for x_BT, y_BT in batches:
        bytes_BT = torch.where(y_BT >= 0, token_bytes_V[y_BT.clamp(min=0).long()], 0)
        losses_BT = token_losses(x_BT, y_BT)
        nats += torch.where(bytes_BT > 0, losses_BT, 0.0).sum(dtype=torch.float64)
        total += bytes_BT.sum(dtype=torch.int64)
    return EvaluationSums(float(nats), int(total))
