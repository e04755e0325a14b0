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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.arithmetic import by_onednn, linear, operand, product
from trainer.contract.memory import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES

SOFT_CAP = 15.0  # nanochat at commit 92d63d4
# One chunk's fp32 logits. Smaller chunks save memory and suit a CPU's caches, but each adds a pass
# over lm_head's gradient and needs rows enough to keep a GPU busy (assumption: never run on one).
# Where lm_head's gradient has another dtype than a chunk's part of it, that part exists a block at
# a time: of as many bytes, in fp32, as a chunk's logits divided by this.
BLOCKS_A_CHUNK = 2
ONEDNN_BLOCKS_A_CHUNK = 8  # of its logits: made by oneDNN, which can't write where it is told


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


@torch.no_grad()
def learn(
    x_NC: Tensor,
    weight_PC: nn.Parameter,
    targets_N: Tensor,
    vocab_size: int,
    share: float = 1.0,
    chunk_bytes: int | None = None,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean nats over the targets that count (fp32 scalar, 0 when none does), and share times its
    gradient in x, of x's dtype; share times its gradient in the weight is added to weight_PC.grad.

    Not for use in compiled code, which would make a second gradient of the weight.
    """
    kernels, dtype = kernels or Kernels(), x_NC.dtype
    weigh = share / _count(targets_N).float()
    chunk_bytes = chunk_bytes or _chunk_bytes(x_NC.device)
    rows = chunk_rows(x_NC.size(0), weight_PC.size(0), chunk_bytes)
    if weight_PC.grad is None:
        weight_PC.grad = torch.zeros_like(weight_PC)
    cast_PC = operand(weight_PC.to(dtype))
    room = _Room(weight_PC, rows, dtype, chunk_bytes)
    total = torch.zeros((), device=x_NC.device)
    grad_NC = torch.empty_like(x_NC)
    chunks = _chunks(x_NC, targets_N, rows)
    for (x_RC, targets_R), grad_RC in zip(chunks, torch.split(grad_NC, rows), strict=True):
        wide_RC = operand(x_RC)
        logits_RP = room.logits(wide_RC, cast_PC)
        nats, sum_R1 = kernels.nats(logits_RP, targets_R, vocab_size)
        kernels.slope(logits_RP, sum_R1, targets_R, weigh, vocab_size)
        total += nats
        wide_RP = operand(logits_RP)
        grad_RC.copy_(product(wide_RP, cast_PC.mT))
        room.add_gradient(wide_RP, wide_RC, kernels)
    return total / _count(targets_N), grad_NC


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


class _Room:
    """What every chunk's products are written to: made anew, pages of that size cost as much."""

    def __init__(self, weight_PC: Tensor, rows: int, dtype: torch.dtype, chunk_bytes: int) -> None:
        self._weight_PC, self._chunk_bytes = weight_PC, chunk_bytes
        self._logits_RP = weight_PC.new_empty(rows, weight_PC.size(0), dtype=dtype)
        self._product: Tensor | None = None
        self._columns = chunk_rows(weight_PC.size(0), rows, chunk_bytes // ONEDNN_BLOCKS_A_CHUNK)
        self._transposed: Tensor | None = None

    def logits(self, x_RC: Tensor, weight_PC: Tensor) -> Tensor:
        """A chunk's logits, good until the next call."""
        logits_RP = self._logits_RP[: x_RC.size(0)]
        if by_onednn(x_RC):
            blocks = torch.split(weight_PC, self._columns)
            outs = torch.split(logits_RP, self._columns, dim=1)
            for out_RS, weight_SC in zip(outs, blocks, strict=True):
                out_RS.copy_(product(x_RC, weight_SC))
            return logits_RP
        if x_RC.dtype is logits_RP.dtype:
            return torch.mm(x_RC, weight_PC.mT, out=logits_RP)
        return logits_RP.copy_(x_RC @ weight_PC.mT)

    def add_gradient(self, slope_RP: Tensor, x_RC: Tensor, kernels: Kernels) -> None:
        """Add a chunk's gradient to the weight's; what that takes beside it, a block at a time."""
        assert self._weight_PC.grad is not None
        if by_onednn(slope_RP):  # which is slow to transpose
            if self._transposed is None:
                self._transposed = slope_RP.new_empty(self._columns, self._logits_RP.size(0))
            for grad_SC, slope_RS in self._blocks(slope_RP, self._columns):
                slope_SR = self._transposed[: grad_SC.size(0), : x_RC.size(0)]
                kernels.transpose(slope_SR, slope_RS)
                grad_SC.add_(product(slope_SR, x_RC.mT))
        elif slope_RP.dtype is self._weight_PC.dtype:
            self._weight_PC.grad.addmm_(slope_RP.mT, x_RC)
        else:
            most = self._chunk_bytes // BLOCKS_A_CHUNK
            rows = chunk_rows(slope_RP.size(1), x_RC.size(1), most)
            if self._product is None:
                self._product = x_RC.new_empty(rows, x_RC.size(1))
            for grad_SC, slope_RS in self._blocks(slope_RP, rows):
                out = self._product[: grad_SC.size(0)]
                kernels.add(grad_SC, torch.mm(slope_RS.mT, x_RC, out=out))

    def _blocks(self, slope_RP: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many rows of the weight's gradient at a time, and the columns that they belong to."""
        assert self._weight_PC.grad is not None
        slopes = torch.split(slope_RP, size, dim=1)
        yield from zip(torch.split(self._weight_PC.grad, size), slopes, strict=True)


def chunk_nats(logits_RP: Tensor, targets_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's nats, and the softmax's denominators [R, 1]."""
    exp_RP = (SOFT_CAP - SOFT_CAP * _short_of_one(logits_RP)).exp()
    sum_R1 = _without_padding(exp_RP, vocab_size).sum(-1, keepdim=True)
    hit_R1 = soft_cap(logits_RP.gather(-1, targets_R.clamp(min=0).long()[:, None]).float())
    return torch.where((targets_R >= 0)[:, None], sum_R1.log() - hit_R1, 0.0).sum(), sum_R1


def slope_in_place(
    logits_RP: Tensor, sum_R1: Tensor, targets_R: Tensor, weigh: Tensor, vocab_size: int
) -> None:
    """Turn a chunk's logits into the loss's gradient of them.

    With z = 15 tanh(l / 15) and p = softmax(z): d loss / d l = (p - onehot) (1 - tanh^2) weigh.
    """
    short_RP = _short_of_one(logits_RP)
    column_P = torch.arange(logits_RP.size(1), device=logits_RP.device)
    onehot_RP = (column_P == targets_R.long()[:, None]).float()
    exp_RP = (SOFT_CAP - SOFT_CAP * short_RP).exp()
    slope_RP = (exp_RP / sum_R1 - onehot_RP) * (short_RP * (2.0 - short_RP))
    slope_RP = slope_RP * torch.where((targets_R >= 0)[:, None], weigh, 0.0)
    logits_RP.copy_(_without_padding(slope_RP, vocab_size))


def _short_of_one(logits_RP: Tensor) -> Tensor:
    """1 - tanh(l / 15) = 2 / (exp(2 l / 15) + 1) in fp32, in half of tanh's time (docs/log.md).

    Off by 6e-8 at most; where exp overflows it is 0, as it should be.
    """
    return 2.0 / ((logits_RP.float() * (2.0 / SOFT_CAP)).exp() + 1.0)


def _without_padding(values_RP: Tensor, vocab_size: int) -> Tensor:
    """Zeros in the columns of no token, at the full width: so compiled code works in place."""
    if values_RP.size(1) == vocab_size:
        return values_RP
    column_P = torch.arange(values_RP.size(1), device=values_RP.device)
    return torch.where(column_P < vocab_size, values_RP, 0.0)


def add_in_place(sum_PC: Tensor, addend_PC: Tensor) -> None:
    """Add to an fp32 sum what has another dtype; compiled, without an fp32 copy of it."""
    sum_PC.add_(addend_PC)


def transpose_into(out_SR: Tensor, block_RS: Tensor) -> None:
    """Write a block's transpose; compiled, in a tenth of the time of torch's own copy."""
    out_SR.copy_(block_RS.mT)


class Kernels(NamedTuple):
    """What a chunk runs between its products; each alone, so that no compiled one needs a copy."""

    nats: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = chunk_nats
    slope: Callable[[Tensor, Tensor, Tensor, Tensor, int], None] = slope_in_place
    add: Callable[[Tensor, Tensor], None] = add_in_place
    transpose: Callable[[Tensor, Tensor], None] = transpose_into

    def compiled(self) -> Kernels:
        """The same through torch.compile."""
        through = partial(torch.compile, fullgraph=True, dynamic=False)
        return Kernels(*(through(each) for each in self))
