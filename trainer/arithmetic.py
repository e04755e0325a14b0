"""Where matrices are multiplied: the dtype and the library that this machine multiplies fast in.

Many CPUs have no bf16 arithmetic. torch's kernels then emulate it: some sixty times slower than
fp32 on one with AVX2, 2.5 times with AVX-512 (docs/log.md). There, bf16 operands are widened to
fp32, which is exact, and products are rounded to bf16 as a bf16 kernel with fp32 sums would.

In fp32 torch multiplies by MKL, which doesn't use AVX-512 on CPUs that Intel didn't make: half of
their speed. There, oneDNN multiplies, as it does bf16 everywhere. It is a part of torch, reached by
the operation that torch's own compiler uses for it.

Invariant: a product of `operand`s, cast back to the operands' own dtype, is that of a matmul with
fp32 accumulation in that dtype, whatever multiplies; gradients likewise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Read once: it can't change while a process lives, and compiled code may not ask.
_CAN = {name for name, there in torch.cpu.get_capabilities().items() if there}
_EMULATED = not {"avx512_bf16", "amx_bf16"} & _CAN
_AMX = "amx_bf16" in _CAN
_MKL_IS_SLOW = "avx512_f" in _CAN and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
_ONEDNN = _MKL_IS_SLOW and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
LEAST_WEIGHTS = 1 << 12  # of a matrix; multiplying by fewer is over before oneDNN is called


def operand(matrix: Tensor) -> Tensor:
    """The matrix, in fp32 where this device would multiply its bf16 by emulation."""
    if _EMULATED and matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu":
        return matrix.float()
    return matrix


def multiplies_bf16(matrix: Tensor) -> bool:
    """Whether the matrix is bf16 on a CPU whose vectors multiply that (without AMX's tiles)."""
    on_cpu = matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu"
    return on_cpu and not _EMULATED and not _AMX


def by_onednn(matrix: Tensor) -> bool:
    """Whether the matrix is better multiplied by onednn_linear than by torch's own operations."""
    return _ONEDNN and matrix.dtype is torch.float32 and matrix.device.type == "cpu"


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """[..., I] -> [..., O], in the dtype of x, to which the master weight is cast."""
    return product(operand(x), operand(weight_OI.to(x.dtype))).to(x.dtype)


def product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """[..., I] -> [..., O], x @ weight^T of `operand`s."""
    if by_onednn(x) and weight_OI.numel() >= LEAST_WEIGHTS:
        flat_NO: Tensor = onednn_linear(x.reshape(-1, x.size(-1)), weight_OI)
        return flat_NO.view(*x.shape[:-1], -1)
    return F.linear(x, weight_OI)


def multiply(x_KMI: Tensor, y_KIN: Tensor) -> Tensor:
    """Products [K, M, N] of two stacks of `operand`s. Without gradients."""
    if by_onednn(x_KMI):
        products_KMN: Tensor = onednn_linears(x_KMI.contiguous(), y_KIN.mT)
        return products_KMN
    return x_KMI @ y_KIN


def multiply_add(
    sum_KMN: Tensor, x_KMI: Tensor, y_KIN: Tensor, beta: float, alpha: float = 1.0
) -> Tensor:
    """beta * sum + alpha * x @ y, of stacks of `operand`s. Without gradients."""
    if by_onednn(x_KMI):
        return beta * sum_KMN + alpha * multiply(x_KMI, y_KIN)
    return torch.baddbmm(sum_KMN, x_KMI, y_KIN, beta=beta, alpha=alpha)


@torch.library.custom_op("everstep::onednn_linear", mutates_args=())
def onednn_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight^T by oneDNN, fp32 [N, O] on a CPU; quickest if x is contiguous."""
    return _by_onednn(x_NI, weight_OI)


@onednn_linear.register_fake
def _(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.size(0), weight_OI.size(0))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor]:
    # Transposed here and not by oneDNN: compiled code does it in a tenth of the time.
    x_NI, weight_OI = ctx.saved_tensors
    grad_OI: Tensor = onednn_linear(grad_NO.mT.contiguous(), x_NI.mT)
    return onednn_linear(grad_NO, weight_OI.mT), grad_OI


onednn_linear.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("everstep::onednn_linears", mutates_args=())
def onednn_linears(x_KMI: Tensor, y_KNI: Tensor) -> Tensor:
    """onednn_linear of each of K pairs, fp32 [K, M, N], without gradients."""
    out_KMN = x_KMI.new_empty(x_KMI.size(0), x_KMI.size(1), y_KNI.size(1))
    for out_MN, x_MI, y_NI in zip(out_KMN, x_KMI, y_KNI, strict=True):
        out_MN.copy_(_by_onednn(x_MI, y_NI))
    return out_KMN


@onednn_linears.register_fake
def _(x_KMI: Tensor, y_KNI: Tensor) -> Tensor:
    return x_KMI.new_empty(x_KMI.size(0), x_KMI.size(1), y_KNI.size(1))


def _by_onednn(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    if not (weight_OI.is_contiguous() or weight_OI.mT.is_contiguous()):
        weight_OI = weight_OI.contiguous()  # with other strides it takes a thousand times as long
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")
    return found
