"""Cross entropy of soft-capped logits, without ever holding all logits of a batch.

Owns the way from final activations and the lm_head matrix to losses and their gradients, a chunk of
positions at a time. Must not know the network below or the optimizer.

Invariant: values and gradients are those of mean(cross_entropy(15 tanh(x W^T / 15))) in fp32 after
the matmul; at most one chunk's fp32 logits exist at once. Targets of -1 are ignored.

Shape legend: N positions (of all rows), C width, V vocabulary, P padded vocabulary, R positions of
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
) -> Tensor:
    """Mean nats over the targets that count, an fp32 scalar; 0 when none does.

    Differentiable in x and weight. The gradients are computed along with the value, so call it
    under torch.no_grad (or use token_losses) where only the value is wanted.
    """
    if not torch.is_grad_enabled():
        total = token_losses(x_NC, weight_PC, targets_N, vocab_size).sum()
        return total / _count(targets_N)
    chunk_bytes = chunk_bytes or _chunk_bytes(x_NC.device)
    loss: Tensor = _ChunkedLoss.apply(x_NC, weight_PC, targets_N, vocab_size, chunk_bytes)  # type: ignore[no-untyped-call]
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


@torch.library.custom_op("everstep::add_product", mutates_args=("sum_OI",))
def add_product(sum_OI: Tensor, left_ON: Tensor, right_NI: Tensor) -> None:
    """Add a matrix product to sum_OI where it lies, in sum_OI's dtype.

    An operation of its own because torch.compile turns every other way to say this into a product
    or a sum beside the one that is there: another whole gradient of lm_head for each chunk.
    """
    if left_ON.dtype is sum_OI.dtype:
        sum_OI.addmm_(left_ON, right_NI)
    else:
        sum_OI.add_(left_ON @ right_NI)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of one chunk after another, so that logits need not be kept.

    With z = 15 tanh(l / 15) and p = softmax(z): d loss / d l = (p - onehot) (1 - tanh^2) / count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_PC: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        chunk_bytes: int,
    ) -> Tensor:
        dtype, cast_PC = x_NC.dtype, operand(weight_PC.to(x_NC.dtype))
        weigh = 1.0 / _count(targets_N).float()
        column_V = torch.arange(vocab_size, device=x_NC.device)
        rows = chunk_rows(x_NC.size(0), weight_PC.size(0), chunk_bytes)
        total: Tensor | None = None
        grad_PC = torch.zeros_like(weight_PC)
        grads_RC = []
        for x_RC, targets_R in _chunks(x_NC, targets_N, rows):
            target_R1, counts_R1 = targets_R.long()[:, None], (targets_R >= 0)[:, None]
            wide_RC = operand(x_RC)
            logits_RP = (wide_RC @ cast_PC.mT).to(dtype)
            tanh_RV = torch.tanh(logits_RP[:, :vocab_size].float() / SOFT_CAP)
            exp_RV = (SOFT_CAP * tanh_RV).exp()
            sum_R1 = exp_RV.sum(-1, keepdim=True)
            hit_R1 = SOFT_CAP * tanh_RV.gather(-1, target_R1.clamp(min=0))
            part = torch.where(counts_R1, sum_R1.log() - hit_R1, 0.0).sum()
            onehot_RV = column_V == target_R1
            slope_RV = (exp_RV / sum_R1 - onehot_RV.float()) * (1.0 - tanh_RV * tanh_RV)
            slope_RV = (slope_RV * torch.where(counts_R1, weigh, 0.0)).to(dtype)
            if vocab_size != weight_PC.size(0):
                slope_RV = F.pad(slope_RV, (0, weight_PC.size(0) - vocab_size))
            slope_RV = operand(slope_RV)
            grads_RC.append((slope_RV @ cast_PC).to(dtype))
            add_product(grad_PC, slope_RV.mT, wide_RC)
            total = part if total is None else total + part
        assert total is not None, "split gives at least one chunk"
        grad_NC = grads_RC[0] if len(grads_RC) == 1 else torch.cat(grads_RC)
        ctx.save_for_backward(grad_NC, grad_PC)
        return total * weigh

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (scale,) = grad_outputs
        grad_NC, grad_PC = ctx.saved_tensors
        return grad_NC * scale.to(grad_NC.dtype), grad_PC * scale, None, None, None
