"""Causal attention of short sequences by plain products, on CPUs that multiply bf16 fast.

There torch's own kernel multiplies at a sixth of the speed of its matmul (docs/log.md). Here a
block of queries of one row meets all keys up to it, in compiled code that all layers share.

Invariant: what a training step computes is causal attention whose scores are as exact as fp32 sums:
a bf16 product, and a second one of what rounding took from it. Only inputs and output are kept for
the backward pass.

Shape legend: B rows, T positions, H query heads, G key-value heads, D head dimension, R = H / G
query heads a key-value head, Q queries of a block, X = R * Q, S keys up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.arithmetic import multiplies_bf16

MOST_TOKENS = 1024  # beyond, torch's kernel is no slower, and blocks take long to compile
BLOCK_QUERIES = 256


def is_short(q_BHTD: Tensor, window: int) -> bool:
    """Whether this is the place for it. Only in compiled code, where its own is compiled, too."""
    length = q_BHTD.size(2)
    fits = length <= min(window, MOST_TOKENS) and multiplies_bf16(q_BHTD)
    return fits and torch.compiler.is_compiling()


@torch.library.custom_op("everstep::short_attention", mutates_args=())
def short_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    """Softmax attention, contiguous [B, H, T, D], in which a query sees the keys up to its own."""
    out_BHTD = torch.empty_like(q_BHTD, memory_format=torch.contiguous_format)
    for row, of_row in enumerate(zip(q_BHTD, k_BGTD, v_BGTD, strict=True)):
        out_BHTD[row] = _compiled(_forward)(*of_row)
    return out_BHTD


@short_attention.register_fake
def _(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    return q_BHTD.new_empty(q_BHTD.shape)


@torch.library.custom_op("everstep::short_attention_backward", mutates_args=())
def short_attention_backward(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, out_BHTD: Tensor, grad_BHTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of short_attention's inputs, contiguous. out_BHTD: what it returned."""
    inputs = (q_BHTD, k_BGTD, v_BGTD)
    q, k, v = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in inputs)
    for row, of_row in enumerate(zip(*inputs, out_BHTD, grad_BHTD, strict=True)):
        q[row], k[row], v[row] = _compiled(_backward)(*of_row)
    return q, k, v


@short_attention_backward.register_fake
def _(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, out_BHTD: Tensor, grad_BHTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (each.new_empty(each.shape) for each in (q_BHTD, k_BGTD, v_BGTD))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradients(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = short_attention_backward(*ctx.saved_tensors, grad_BHTD)
    return found


short_attention.register_autograd(_gradients, setup_context=_keep)


@cache
def _compiled(of_row: Callable[..., Any]) -> Callable[..., Any]:
    """When first used: importing the compiler takes a second, and few need it."""
    compiled: Callable[..., Any] = torch.compile(of_row, dynamic=False)
    return compiled


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK_QUERIES):
        yield start, min(start + BLOCK_QUERIES, length)


def _by_group(each_HTD: Tensor, groups: int) -> Tensor:
    """[H, T, D] -> [G, R, T, D]: the query heads of each key-value head."""
    return each_HTD.reshape(groups, -1, *each_HTD.shape[1:])


def _weights(q_GRQD: Tensor, k_GSD: Tensor, start: int) -> Tensor:
    """Softmax of a block's scores, fp32 [G, R, Q, S]; its first query is at `start`."""
    q_GXD, keys_GDS = q_GRQD.flatten(1, 2), k_GSD.mT
    high_GXS = q_GXD @ keys_GDS
    low_GXS = torch.baddbmm(high_GXS, q_GXD, keys_GDS, beta=-1.0)
    scores_GXS = (high_GXS.float() + low_GXS.float()) * q_GRQD.size(-1) ** -0.5
    scores_GRQS = scores_GXS.unflatten(1, q_GRQD.shape[1:3])
    query_Q1 = torch.arange(start, start + q_GRQD.size(2))[:, None]
    seen_QS = torch.arange(k_GSD.size(1))[None, :] <= query_Q1
    return torch.where(seen_QS, scores_GRQS, float("-inf")).softmax(-1)


def _forward(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor) -> Tensor:
    q_GRTD = _by_group(q_HTD, k_GTD.size(0))
    blocks = []
    for start, stop in _blocks(q_HTD.size(1)):
        q_GRQD = q_GRTD[:, :, start:stop]
        weights_GRQS = _weights(q_GRQD, k_GTD[:, :stop], start).to(q_HTD.dtype)
        out_GXD = weights_GRQS.flatten(1, 2) @ v_GTD[:, :stop]
        blocks.append(out_GXD.view(q_GRQD.shape))
    return torch.cat(blocks, dim=2).flatten(0, 1)


def _backward(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, out_HTD: Tensor, grad_HTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, scale = q_HTD.dtype, q_HTD.size(-1) ** -0.5
    q_GRTD, out_GRTD, grad_GRTD = (
        _by_group(each, k_GTD.size(0)) for each in (q_HTD, out_HTD, grad_HTD)
    )
    dq_blocks = []
    dk_GTD, dv_GTD = (torch.zeros_like(each, dtype=torch.float32) for each in (k_GTD, v_GTD))
    for start, stop in _blocks(q_HTD.size(1)):
        q_GRQD, grad_GRQD = q_GRTD[:, :, start:stop], grad_GRTD[:, :, start:stop]
        k_GSD, v_GSD = k_GTD[:, :stop], v_GTD[:, :stop]
        weights_GRQS = _weights(q_GRQD, k_GSD, start)
        grad_GXD = grad_GRQD.flatten(1, 2)
        mean_GRQ1 = (grad_GRQD.float() * out_GRTD[:, :, start:stop].float()).sum(-1, keepdim=True)
        slope_GRQS = (grad_GXD @ v_GSD.mT).view(weights_GRQS.shape).float() - mean_GRQ1
        scores_GXS = (weights_GRQS * slope_GRQS * scale).to(dtype).flatten(1, 2)
        dq_blocks.append((scores_GXS @ k_GSD).view(q_GRQD.shape))
        dk_GTD[:, :stop] += scores_GXS.mT @ q_GRQD.flatten(1, 2)
        dv_GTD[:, :stop] += weights_GRQS.to(dtype).flatten(1, 2).mT @ grad_GXD
    dq_HTD = torch.cat(dq_blocks, dim=2).flatten(0, 1)
    return dq_HTD, dk_GTD.to(dtype), dv_GTD.to(dtype)
