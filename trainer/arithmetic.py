"""Where matrices are multiplied: the dtype that this machine multiplies fast.

Many CPUs have no bf16 arithmetic. torch's kernels then emulate it: some sixty times slower than
fp32 on one with AVX2, 2.5 times with AVX-512 (docs/log.md). There, bf16 operands are widened to
fp32, which is exact, and products are rounded to bf16 as a bf16 kernel with fp32 sums would.

Invariant: a product of `operand`s, cast back to the operands' own dtype, is that of a bf16 matmul
with fp32 accumulation; on every other device and in fp32 nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Read once: it can't change while a process lives, and compiled code may not ask.
_CAN = {name for name, there in torch.cpu.get_capabilities().items() if there}
_EMULATED = not {"avx512_bf16", "amx_bf16"} & _CAN
_AMX = "amx_bf16" in _CAN


def operand(matrix: Tensor) -> Tensor:
    """The matrix, in fp32 where this device would multiply its bf16 by emulation."""
    if _EMULATED and matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu":
        return matrix.float()
    return matrix


def multiplies_bf16(matrix: Tensor) -> bool:
    """Whether the matrix is bf16 on a CPU whose vectors multiply that (without AMX's tiles)."""
    on_cpu = matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu"
    return on_cpu and not _EMULATED and not _AMX


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """[..., I] -> [..., O], in the dtype of x, to which the master weight is cast."""
    return F.linear(operand(x), operand(weight_OI.to(x.dtype))).to(x.dtype)
