"""Causal self-attention of a nanochat-class GPT, and the bias-free linear layer all of it uses.

Owns rotary embedding, query-key normalisation, value-embedding gates, full and sliding windows.
Must not know the residual stream's mixing, losses or optimizers.

Invariant: a query at t sees exactly the keys t - window .. t; a window of T or more is plain causal
attention. Formulas: nanochat at commit 92d63d4.

Shape legend: B rows, T positions, C width, H query heads, G key-value heads, D head dimension,
P half of D, O and I a matrix's outputs and inputs, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.arithmetic import linear, operand
from trainer.contract.shape import VE_GATE_CHANNELS, ModelShape
from trainer.short_attention import is_short, short_attention

ROPE_BASE = 100_000.0
QK_SCALE = 1.2  # sharpens attention after the norm has fixed the length of q and k
VALUE_GATE_RANGE = 3.0


class Linear(nn.Module):
    """A matrix without bias; the fp32 master weight is cast to its input's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the dtype of x."""
        return linear(x, self.weight)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without weight, with torch's default eps for the dtype."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32 [1, T, 1, P] each."""
    exponent_P = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle_TP = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / ROPE_BASE**exponent_P)
    return angle_TP.cos()[None, :, None, :], angle_TP.sin()[None, :, None, :]


def rotate(x_BTHD: Tensor, cos_1T1P: Tensor, sin_1T1P: Tensor) -> Tensor:
    """Turn the pairs (p, p + D/2) by minus their position's angle."""
    a_BTHP, b_BTHP = x_BTHD.chunk(2, dim=-1)
    return torch.cat(
        (a_BTHP * cos_1T1P + b_BTHP * sin_1T1P, b_BTHP * cos_1T1P - a_BTHP * sin_1T1P), dim=-1
    )


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int) -> Tensor:
    """Softmax attention [B, H, T, D] in which query t sees keys t - window .. t.

    Sliding windows go a block of `window` queries at a time: a block sees itself and the block to
    its left, so the work is 2 * window keys a query instead of T, and no T x T mask exists.
    """
    if is_short(q_BHTD, window):
        out_BHTD: Tensor = short_attention(q_BHTD, k_BGTD, v_BGTD)
        return out_BHTD
    dtype = q_BHTD.dtype
    q_BHTD, k_BGTD, v_BGTD = operand(q_BHTD), operand(k_BGTD), operand(v_BGTD)
    grouped = q_BHTD.size(1) != k_BGTD.size(1)
    length = q_BHTD.size(2)
    if window >= length:
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=grouped
        ).to(dtype)
    blocks = []
    for start in range(0, length, window):
        first, stop = max(start - window, 0), min(start + window, length)
        query_T1 = torch.arange(start, stop, device=q_BHTD.device)[:, None]
        key_1S = torch.arange(first, stop, device=q_BHTD.device)[None, :]
        seen_TS = (key_1S <= query_T1) & (key_1S >= query_T1 - window)
        blocks.append(
            F.scaled_dot_product_attention(
                q_BHTD[:, :, start:stop],
                k_BGTD[:, :, first:stop],
                v_BGTD[:, :, first:stop],
                attn_mask=seen_TS,
                enable_gqa=grouped,
            )
        )
    return torch.cat(blocks, dim=2).to(dtype)


class Attention(nn.Module):
    """The attention of one layer; ve_gate exists where the layer has a value embedding."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = shape.n_head, shape.n_kv_head, shape.head_dim
        self.window = shape.windows[layer]
        width, kv_width = shape.n_embd, shape.n_kv_head * shape.head_dim
        self.c_q = Linear(width, width)
        self.c_k = Linear(width, kv_width)
        self.c_v = Linear(width, kv_width)
        self.c_proj = Linear(width, width)
        gated = layer in shape.value_embed_layers
        self.ve_gate = Linear(VE_GATE_CHANNELS, shape.n_kv_head) if gated else None

    def forward(
        self, x_BTC: Tensor, embed_BTE: Tensor | None, cos_1T1P: Tensor, sin_1T1P: Tensor
    ) -> Tensor:
        """[B, T, C] normed input -> [B, T, C]; embed_BTE is the layer's value embedding, E = GD."""
        rows, length, _ = x_BTC.shape
        q_BTHD = self.c_q(x_BTC).view(rows, length, self.n_head, self.head_dim)
        k_BTGD = self.c_k(x_BTC).view(rows, length, self.n_kv_head, self.head_dim)
        v_BTGD = self.c_v(x_BTC).view(rows, length, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:
            assert embed_BTE is not None, "a gated layer has a value embedding"
            gate_BTG = torch.sigmoid(self.ve_gate(x_BTC[..., :VE_GATE_CHANNELS]))
            v_BTGD = v_BTGD + (VALUE_GATE_RANGE * gate_BTG)[..., None] * embed_BTE.view_as(v_BTGD)
        q_BTHD = norm(rotate(q_BTHD, cos_1T1P, sin_1T1P)) * QK_SCALE
        k_BTGD = norm(rotate(k_BTGD, cos_1T1P, sin_1T1P)) * QK_SCALE
        y_BHTD = causal_attention(
            q_BTHD.transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2), self.window
        )
        return self.c_proj(y_BHTD.transpose(1, 2).reshape(rows, length, -1))  # type: ignore[no-any-return]
