"""Embedding tables: rows looked up, and their gradient added where it lies.

Owns the way from token ids to rows of a table and back. Must not know the network.

A table's gradient has the table's size, though a micro-step touches a few of its rows. Left to
autograd each micro-step makes such a tensor and adds it up. Here rows are added to the gradient
that is there, and no second one exists.

Invariant: after a backward pass a table's grad has grown by the sum of its rows' gradients, summed
in fp32 within a micro-step; the same bits every time.

Shape legend: B rows, T positions, C width, P padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def look_up(
    table_PC: nn.Parameter,
    idx_BT: Tensor,
    added: Callable[[nn.Parameter], None] = lambda table_PC: None,
) -> Tensor:
    """[B, T] token ids -> [B, T, C]. A backward pass adds to table_PC.grad, says so by calling
    added, and returns nothing.

    Not for use in compiled code: a compiled graph can't see the gradient that it would add to.
    """
    rows_BTC: Tensor = _Rows.apply(table_PC, idx_BT, added)  # type: ignore[no-untyped-call]
    return rows_BTC


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_PC: nn.Parameter, idx_BT: Tensor, added: Callable[[nn.Parameter], None]
    ) -> Tensor:
        ctx.added = added
        ctx.table = table_PC  # not saved_tensors: its grad is what backward is for
        ctx.save_for_backward(idx_BT)
        return F.embedding(idx_BT, table_PC)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        (grad_BTC,) = grad_outputs
        (idx_BT,) = ctx.saved_tensors
        table_PC = ctx.table
        if table_PC.grad is None:
            table_PC.grad = torch.zeros_like(table_PC)
        ids_N, grad_NC = idx_BT.flatten(), grad_BTC.flatten(0, 1)
        if table_PC.dtype is not torch.float32:  # one after another would be lost to rounding
            ids_N, grad_NC = _summed(ids_N, grad_NC, table_PC.dtype)
        table_PC.grad.index_add_(0, ids_N, grad_NC)
        ctx.added(table_PC)
        return None, None, None


def _summed(ids_N: Tensor, grad_NC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each id once with the fp32 sum of its rows, rounded to dtype; filled up with zeros for id 0.

    So the shape depends on no data, and nothing waits for a device.
    """
    sorted_N, order_N = ids_N.sort(stable=True)
    place_N = (sorted_N.diff(prepend=sorted_N[:1]) != 0).cumsum(0)
    sum_NC = torch.zeros_like(grad_NC, dtype=torch.float32)
    sum_NC.index_add_(0, place_N, grad_NC.float()[order_N])
    once_N = torch.zeros_like(ids_N)
    once_N[place_N] = sorted_N
    return once_N, sum_NC.to(dtype)
