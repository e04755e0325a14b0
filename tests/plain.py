"""A second, slow reading of nanochat's formulas: network, AdamW and Muon, one number at a time.

Shares no code with the trainer; differentiable, so that gradients can be compared too. Formulas:
nanochat at commit 92d63d4. Shape legend: T positions, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.contract.shape import ModelShape

ROUNDS = (  # Polar Express, arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def plain_logits(shape: ModelShape, w: Mapping[str, Tensor], idx_BT: Tensor) -> Tensor:
    """The forward pass position by position and head by head, straight from the formulas."""
    return torch.stack([plain_row(shape, w, idx_T) for idx_T in idx_BT])


def rms(x: Tensor) -> Tensor:
    """The last axis divided by its root mean square; eps is that of the fp32 original."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def plain_row(shape: ModelShape, w: Mapping[str, Tensor], idx_T: Tensor) -> Tensor:
    """Logits [T, V] of one row."""
    D, half = shape.head_dim, shape.head_dim // 2
    first = rms(w["transformer.wte.weight"][idx_T])
    smeared = [first[0]]
    for t in range(1, len(idx_T)):
        gate = torch.sigmoid(first[t, :24] @ w["smear_gate.weight"][0])
        smeared.append(first[t] + w["smear_lambda"] * gate * first[t - 1])
    x = torch.stack(smeared)
    x0, kept = x, None
    for i in range(shape.n_layer):
        layer = f"transformer.h.{i}"
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        y = rms(x)
        q, k, v = (y @ w[f"{layer}.attn.c_{m}.weight"].T for m in "qkv")
        heads = []
        for h in range(shape.n_head):
            g = h // (shape.n_head // shape.n_kv_head)
            kv = slice(g * D, (g + 1) * D)
            value = v[:, kv]
            if i in shape.value_embed_layers:
                gate = torch.sigmoid(y[:, :12] @ w[f"{layer}.attn.ve_gate.weight"][g])
                value = value + 3 * gate[:, None] * w[f"value_embeds.{i}.weight"][idx_T][:, kv]
            query, key = q[:, h * D : (h + 1) * D], k[:, kv]
            turned = []
            for z in (query, key):
                angle = torch.tensor(
                    [[t / 100_000 ** (2 * p / D) for p in range(half)] for t in range(len(z))],
                    dtype=z.dtype,
                )
                pair = torch.complex(z[:, :half], z[:, half:]) * torch.polar(
                    torch.ones_like(angle), -angle
                )
                turned.append(1.2 * rms(torch.cat((pair.real, pair.imag), -1)))
            seen = []
            for t in range(len(idx_T)):
                left = max(0, t - shape.windows[i])
                odds = torch.softmax(turned[1][left : t + 1] @ turned[0][t] / math.sqrt(D), 0)
                seen.append(odds @ value[left : t + 1])
            heads.append(torch.stack(seen))
        x = x + torch.cat(heads, -1) @ w[f"{layer}.attn.c_proj.weight"].T
        hidden = torch.relu(rms(x) @ w[f"{layer}.mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ w[f"{layer}.mlp.c_proj.weight"].T
        kept = x if i == shape.n_layer // 2 else kept
    x = rms(x - w["backout_lambda"] * kept)
    return 15 * torch.tanh((x @ w["lm_head.weight"].T)[:, : shape.vocab_size] / 15)


def plain_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats over the targets that are not -1."""
    losses = [
        torch.logsumexp(row_V, 0) - row_V[target]
        for row_V, target in zip(
            logits_BTV.flatten(0, 1), targets_BT.flatten().tolist(), strict=True
        )
        if target >= 0
    ]
    return torch.stack(losses).mean()


def plain_adamw(
    p: Tensor,
    g: Tensor,
    first: Tensor,
    second: Tensor,
    update: int,
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and both moments after an update, counted from 1; eps as nanochat's."""
    first = betas[0] * first + (1 - betas[0]) * g
    second = betas[1] * second + (1 - betas[1]) * g**2
    direction = (first / (1 - betas[0] ** update)) / (
        (second / (1 - betas[1] ** update)).sqrt() + 1e-10
    )
    return p * (1 - lr * decay) - lr * direction, first, second


def plain_muon(
    p: Tensor, g: Tensor, buffer: Tensor, second: Tensor, lr: float, momentum: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, its momentum and its second moments after an update; beta2 as nanochat's 0.9."""
    rows, cols = p.shape
    buffer = momentum * buffer + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * buffer
    whole = u.norm() / math.sqrt(rows)
    u = torch.stack([row * (whole / max(float(row.norm()), 1e-6)) for row in u])
    u = u / (1.01 * u.norm() + 1e-6)
    for a, b, c in ROUNDS:
        gram = u.T @ u if rows > cols else u @ u.T
        poly = b * gram + c * gram @ gram
        u = a * u + (u @ poly if rows > cols else poly @ u)
    u = u * (math.sqrt(min(rows, cols)) / max(float(u.norm()), 1e-6))
    axis = 1 if rows >= cols else 0
    second = 0.9 * second + 0.1 * (u**2).mean(axis, keepdim=True)
    even = u / second.clamp(min=1e-10).sqrt()
    u = even * (u.norm() / even.norm())
    rate = lr * math.sqrt(max(1.0, rows / cols))
    return p - rate * u - rate * decay * p * ((u * p) >= 0), buffer, second
