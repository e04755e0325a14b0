"""The update of Muon as nanochat runs it, on a stack of equally shaped matrices.

Owns the mathematics of one step: Nesterov momentum, row equilibration, orthogonalisation, second
moments, cautious decay. Must not know parameter groups, schedules or the model.

Invariant: with decay 0 an update's Frobenius norm is lr * sqrt(max(1, rows / cols)) *
sqrt(min(rows, cols)), whatever the gradient (unless it is 0).

Shape legend: K matrices, R rows, C columns, S the shorter of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.arithmetic import multiply, multiply_add, operand

# Polar Express (arXiv 2505.16932): a round takes X to a X + b X X'X + c X X'X X'X.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN = 1.01  # keeps every singular value below 1, where the quintics converge
SMALLEST_NORM = 1e-6


def second_moment_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of NorMuon's second moment of a matrix: a value a row, or a column if it is wide."""
    rows, cols = shape
    return (rows, 1) if rows >= cols else (1, cols)


def rate_factor(shape: tuple[int, ...]) -> float:
    """What Muon's rate is multiplied by for a matrix of this shape: tall ones take larger steps."""
    rows, cols = shape
    return math.sqrt(max(1.0, rows / cols))


def muon_update(
    param_KRC: Tensor,
    grad_KRC: Tensor,
    buffer_KRC: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: Tensor,
    one_minus_momentum: Tensor,
    momentum: Tensor,
    one_minus_beta2: Tensor,
    compute_dtype: torch.dtype,
    floor: float,
) -> Tensor:
    """The stack after one step; buffer_KRC and second are updated in place.

    Args:
        second: [K, R, 1] for tall or square matrices, [K, 1, C] for wide ones.
        rate: learning rate with rate_factor applied; decay: weight decay. These and the following
            are fp32 scalars in tensors, so that a new value neither recompiles nor rounds further.
        compute_dtype: of the orthogonalisation's matmuls.
        floor: least second moment.
    """
    buffer_KRC.copy_(buffer_KRC + (grad_KRC - buffer_KRC) * one_minus_momentum)
    nesterov_KRC = grad_KRC + (buffer_KRC - grad_KRC) * momentum
    rows, cols = param_KRC.shape[-2:]
    update_KRC = orthogonalise(nesterov_KRC, compute_dtype).to(param_KRC.dtype)

    # Muon+ (arXiv 2602.21545): exactly the norm of an orthogonal matrix.
    norm_K11 = update_KRC.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    update_KRC = update_KRC * (math.sqrt(min(rows, cols)) / norm_K11.clamp(min=SMALLEST_NORM))

    # NorMuon (arXiv 2510.05491): even out the rows (or columns) by their history, keeping the norm.
    axis = -1 if rows >= cols else -2
    mean_square = update_KRC.square().mean(dim=axis, keepdim=True)
    second.copy_(second + (mean_square - second) * one_minus_beta2)
    scale = second.clamp(min=floor).rsqrt()
    before_K11 = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after_K11 = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    update_KRC = update_KRC * (scale * (before_K11 / after_K11.clamp(min=floor)))

    # Cautious decay: only where it pulls the same way as the update.
    decayed_KRC = torch.where(update_KRC * param_KRC >= 0, decay * param_KRC, 0.0)
    return param_KRC - rate * (update_KRC + decayed_KRC)


def orthogonalise(grad_KRC: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """An approximation of the nearest (semi-)orthogonal matrix, at compute_dtype's precision."""
    rows, cols = grad_KRC.shape[-2:]
    # Row equilibration (arXiv 2603.28254): every row gets the same norm, the matrix keeps its own.
    norm_KR1 = grad_KRC.square().sum(dim=-1, keepdim=True).sqrt()
    whole_K11 = norm_KR1.square().sum(dim=-2, keepdim=True).sqrt()
    even_KR1 = (whole_K11 / math.sqrt(rows)) / norm_KR1.clamp(min=SMALLEST_NORM)
    # The equilibrated matrix's norm follows from its rows' norms: no further pass over it.
    bound_K11 = NORM_MARGIN * (norm_KR1 * even_KR1).square().sum(dim=-2, keepdim=True).sqrt()
    x_KRC = operand((grad_KRC * (even_KR1 / (bound_K11 + SMALLEST_NORM))).to(compute_dtype))
    for a, b, c in POLAR_EXPRESS:
        gram_KSS = multiply(x_KRC.mT, x_KRC) if rows > cols else multiply(x_KRC, x_KRC.mT)
        poly_KSS = multiply_add(gram_KSS, gram_KSS, gram_KSS, beta=b, alpha=c)
        left, right = (x_KRC, poly_KSS) if rows > cols else (poly_KSS, x_KRC)
        x_KRC = multiply_add(x_KRC, left, right, beta=a)
    return x_KRC
