"""Cross entropy of soft-capped logits, without ever holding all logits of a batch.

Owns the way from final activations and the lm_head matrix to losses and their gradients, a chunk of
positions at a time. Must not know the network below or the optimizer.

Invariant: values and gradients are those of mean(cross_entropy(15 tanh(x W^T / 15))) in fp32 after
the matmul; at most one chunk's fp32 logits exist at once. Targets of -1 are ignored.

Shape legend: N positions (of all rows), C width, V vocabulary, P padded vocabulary, R positions of
a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.arithmetic import linear, operand
from trainer.contract.memory import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES

SOFT_CAP = 15.0  # nanochat at commit 92d63d4
# One chunk's fp32 logits. Smaller chunks save memory and suit a CPU's caches, but each adds a pass
# over lm_head's gradient and needs rows enough to keep a GPU busy (assumption: never run on one).


def soft_cap(logits: Tensor) -> Tensor:
    """Squash fp32 logits smoothly into (-15, 15)."""
    return SOFT_CAP * torch.tanh(logits / SOFT_CAP)


def soft_capped_logits(x: Tensor, weight_PC: Tensor, vocab_size: int) -> Tensor:
    """Soft-capped fp32 logits [..., V] of final activations [..., C]."""
    return soft_cap(linear(x, weight_PC)[..., :vocab_size].float())


def chunk_rows(positions: int, padded_vocab_size: int, chunk_bytes: int) -> int:
    """Positions a chunk: as equal as can be, each chunk's fp32 logits within chunk_bytes."""
    most = max(chunk_bytes // (4 * padded_vocab_size), 1)
    chunks = max(-(-positions // most), 1)
    return -(-positions // chunks)


def token_losses(x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
    """Nats of each target, fp32 [N]; 0 where the target is ignored. For use without gradients."""
    rows = chunk_rows(x_NC.size(0), weight_PC.size(0), _chunk_bytes(x_NC.device))
    losses = [
        _nats(soft_capped_logits(x_RC, weight_PC, vocab_size), targets_R)
        for x_RC, targets_R in _chunks(x_NC, targets_N, rows)
    ]
    return torch.cat(losses)


def mean_loss(
    x_NC: Tensor,
    weight_PC: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    chunk_bytes: int | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Mean nats over the targets that count, an fp32 scalar; 0 when none does.

    Differentiable in x and weight, once. The gradients are computed along with the value, so call
    it under torch.no_grad (or use token_losses) where only the value is wanted.
    """
    if not torch.is_grad_enabled():
        total = token_losses(x_NC, weight_PC, targets_N, vocab_size).sum()
        return total / _count(targets_N)
    chunk_bytes = chunk_bytes or _chunk_bytes(x_NC.device)
    asked = (vocab_size, chunk_bytes, kernels or Kernels())
    loss: Tensor = _ChunkedLoss.apply(x_NC, weight_PC, targets_N, *asked)  # type: ignore[no-untyped-call]
    return loss


def _chunks(x_NC: Tensor, targets_N: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, x_NC.size(0), rows):
        yield x_NC[start : start + rows], targets_N[start : start + rows]


def _chunk_bytes(device: torch.device) -> int:
    return CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def _count(targets_N: Tensor) -> Tensor:
    return (targets_N >= 0).sum().clamp(min=1)


def _nats(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    # No maximum is subtracted: the soft cap bounds exp to e^15, far from overflow.
    target_R1 = targets_R.clamp(min=0).long()[:, None]
    nats_R = logits_RV.exp().sum(-1).log() - logits_RV.gather(-1, target_R1)[:, 0]
    return torch.where(targets_R >= 0, nats_R, 0.0)


class _ChunkedLoss(torch.autograd.Function):
    """The value, and the gradients that were worked out along with it.

    Not for use in compiled code, which would keep lm_head's gradient and a scaled copy: here it is
    added up and scaled where it lies, and becomes the weight's grad or is added to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_PC: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        chunk_bytes: int,
        kernels: Kernels,
    ) -> Tensor:
        dtype, cast_PC = x_NC.dtype, operand(weight_PC.to(x_NC.dtype))
        weigh = 1.0 / _count(targets_N).float()
        rows = chunk_rows(x_NC.size(0), weight_PC.size(0), chunk_bytes)
        total = torch.zeros((), device=x_NC.device)
        grad_NC, grad_PC = torch.empty_like(x_NC), torch.zeros_like(weight_PC)
        grads_RC = torch.split(grad_NC, rows)
        chunks = _chunks(x_NC, targets_N, rows)
        for (x_RC, targets_R), grad_RC in zip(chunks, grads_RC, strict=True):
            wide_RC = operand(x_RC)
            logits_RP = (wide_RC @ cast_PC.mT).to(dtype)
            nats, sum_R1 = kernels.nats(logits_RP, targets_R, vocab_size)
            kernels.slope(logits_RP, sum_R1, targets_R, weigh, vocab_size)
            total += nats
            wide_RP = operand(logits_RP)
            grad_RC.copy_(wide_RP @ cast_PC)
            if wide_RP.dtype is grad_PC.dtype:
                grad_PC.addmm_(wide_RP.mT, wide_RC)
            else:
                grad_PC.add_(wide_RP.mT @ wide_RC)
            del logits_RP, wide_RP  # before the next chunk's are there
        ctx.grad_NC, ctx.grad_PC = grad_NC, grad_PC
        return total * weigh

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_NC, grad_PC = ctx.grad_NC, ctx.grad_PC
        ctx.grad_NC = ctx.grad_PC = None  # nobody else holds them: autograd need not copy
        return grad_NC.mul_(scale.to(grad_NC.dtype)), grad_PC.mul_(scale), None, None, None, None


def chunk_nats(logits_RP: Tensor, targets_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's nats, and the softmax's denominators [R, 1]."""
    exp_RP = soft_cap(logits_RP.float()).exp()
    sum_R1 = _without_padding(exp_RP, vocab_size).sum(-1, keepdim=True)
    hit_R1 = soft_cap(logits_RP.gather(-1, targets_R.clamp(min=0).long()[:, None]).float())
    return torch.where((targets_R >= 0)[:, None], sum_R1.log() - hit_R1, 0.0).sum(), sum_R1


def slope_in_place(
    logits_RP: Tensor, sum_R1: Tensor, targets_R: Tensor, weigh: Tensor, vocab_size: int
) -> None:
    """Turn a chunk's logits into the loss's gradient of them.

    With z = 15 tanh(l / 15) and p = softmax(z): d loss / d l = (p - onehot) (1 - tanh^2) weigh.
    """
    tanh_RP = torch.tanh(logits_RP.float() / SOFT_CAP)
    column_P = torch.arange(logits_RP.size(1), device=logits_RP.device)
    onehot_RP = (column_P == targets_R.long()[:, None]).float()
    slope_RP = ((SOFT_CAP * tanh_RP).exp() / sum_R1 - onehot_RP) * (1.0 - tanh_RP * tanh_RP)
    slope_RP = slope_RP * torch.where((targets_R >= 0)[:, None], weigh, 0.0)
    logits_RP.copy_(_without_padding(slope_RP, vocab_size))


def _without_padding(values_RP: Tensor, vocab_size: int) -> Tensor:
    """Zeros in the columns of no token, at the full width: so compiled code works in place."""
    if values_RP.size(1) == vocab_size:
        return values_RP
    column_P = torch.arange(values_RP.size(1), device=values_RP.device)
    return torch.where(column_P < vocab_size, values_RP, 0.0)


class Kernels(NamedTuple):
    """What a chunk runs between its products; two, so that neither compiled one needs a copy."""

    nats: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = chunk_nats
    slope: Callable[[Tensor, Tensor, Tensor, Tensor, int], None] = slope_in_place

    def compiled(self) -> Kernels:
        """The same through torch.compile."""
        nats = torch.compile(self.nats, fullgraph=True, dynamic=False)
        return Kernels(nats, torch.compile(self.slope, fullgraph=True, dynamic=False))
