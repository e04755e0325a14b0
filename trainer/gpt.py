"""The network: nanochat's GPT at any size, with nanochat's state-dict names.

Owns the residual stream: embeddings, smear, per-layer mixing, backout, and the weights' initial
values. Must not know optimizers, data or devices beyond the tensors it is given.

Invariant: `dict(model.named_parameters())` has the names, order and shapes of
`ModelShape.named_shapes`, and initial weights depend on the seed alone. Formulas: nanochat at
commit 92d63d4.

Shape legend: B rows, T positions, C width, E width of a value embedding, V vocabulary, P padded
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.attention import Attention, Linear, norm, rotary_tables
from trainer.contract.contradictions import SMEAR_GATE_CHANNELS
from trainer.contract.shape import ModelShape
from trainer.loss import (
    Kernels,
    learn,
    soft_capped_logits,
    token_losses,
)
from trainer.tables import look_up

WTE_STD, LM_HEAD_STD = 0.8, 0.001
MLP_FC_SCALE = 0.4  # of the bound that the other matrices are drawn from
GATE_BOUND = 0.02
BACKOUT_START = 0.2


class Table(nn.Module):
    """An embedding table [P, C] stored in a dtype of its own."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.added: Callable[[nn.Parameter], None] = lambda parameter: None

    def forward(self, idx_BT: Tensor) -> Tensor:
        """[B, T] token ids -> [B, T, C]."""
        return look_up(self.weight, idx_BT, self.added)


class Mlp(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.c_fc = Linear(shape.n_embd, 4 * shape.n_embd)
        self.c_proj = Linear(4 * shape.n_embd, shape.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.attn = Attention(shape, layer)
        self.mlp = Mlp(shape)

    def forward(
        self,
        x_BTC: Tensor,
        x0_BTC: Tensor,
        shares: tuple[Tensor, Tensor],
        embed_BTE: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]. shares: scalars, of the stream and of what it was at first."""
        x_BTC = shares[0] * x_BTC + shares[1] * x0_BTC
        if embed_BTE is not None:
            embed_BTE = embed_BTE.to(x_BTC.dtype)
        x_BTC = x_BTC + self.attn(norm(x_BTC), embed_BTE, cos, sin)
        return x_BTC + self.mlp(norm(x_BTC))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Token embedding and layers; it exists for nanochat's state-dict names."""

    def __init__(self, shape: ModelShape, embedding_dtype: torch.dtype) -> None:
        super().__init__()
        self.wte = Table(shape.padded_vocab_size, shape.n_embd, embedding_dtype)
        self.h = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layer))


class GPT(nn.Module):
    """The model. Its weights are undefined until init_weights or load_state_dict.

    Args:
        shape: all sizes.
        compute_dtype: of activations and matmuls; matrices are kept in fp32 and cast.
        embedding_dtype: of the token and value embedding tables in memory.
    """

    def __init__(
        self, shape: ModelShape, compute_dtype: torch.dtype, embedding_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.compute_dtype = shape, compute_dtype
        self.resid_lambdas = nn.Parameter(torch.empty(shape.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(shape.n_layer))
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.transformer = Trunk(shape, embedding_dtype)
        self.lm_head = Linear(shape.n_embd, shape.padded_vocab_size)
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        kv_width = shape.n_kv_head * shape.head_dim
        self.value_embeds = nn.ModuleDict(
            {
                str(i): Table(shape.padded_vocab_size, kv_width, embedding_dtype)
                for i in shape.value_embed_layers
            }
        )
        cos, sin = rotary_tables(shape.sequence_len, shape.head_dim)
        self.register_buffer("cos", cos.to(compute_dtype), persistent=False)
        self.register_buffer("sin", sin.to(compute_dtype), persistent=False)
        self._run = Run()
        self._added: Callable[[nn.Parameter], None] = lambda parameter: None
        self._kernels = Kernels()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight anew from nanochat's distributions.

        Draws happen on the CPU in fp32 and in module order, so they depend on the seed alone: not
        on device, dtype, thread count or torch's global generator. (They are not the numbers that
        nanochat itself would draw.)
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            _draw(name, drawn, self.shape, generator)
            parameter.copy_(drawn)

    def compile_loss(self) -> None:
        """Compile what training runs: layers, and the loss's way between its products.

        What adds to a gradient where it lies stays outside: tables (look_up) and lm_head.
        """
        self._run = self._run.compiled()
        self._kernels = self._kernels.compiled()

    def tell_added(self, added: Callable[[nn.Parameter], None]) -> None:
        """From now on call added whenever learn has added to a parameter's gradient. Call once."""
        self._added = added
        by_hand = {id(self.lm_head.weight)}
        for table in (self.transformer.wte, *self.value_embeds.values()):
            table.added = added  # type: ignore[assignment]
            by_hand.add(id(table.weight))
        for parameter in self.parameters():
            if id(parameter) not in by_hand:
                parameter.register_post_accumulate_grad_hook(added)  # type: ignore[no-untyped-call]

    def learn(self, idx_BT: Tensor, targets_BT: Tensor, share: float = 1.0) -> Tensor:
        """Mean nats over the targets that are not -1, an fp32 scalar without gradient; share times
        its gradient is added to every parameter's. T is at most sequence_len.
        """
        x_NC = self._final(self._run, idx_BT).flatten(0, 1)
        loss, grad_NC = learn(
            x_NC,
            self.lm_head.weight,
            targets_BT.flatten(),
            self.shape.vocab_size,
            share,
            kernels=self._kernels,
        )
        self._added(self.lm_head.weight)
        torch.autograd.backward(x_NC, grad_NC)
        return loss

    def logits(self, idx_BT: Tensor) -> Tensor:
        """Soft-capped logits, fp32 [B, T, V]."""
        x_BTC = self._final(Run(), idx_BT)
        return soft_capped_logits(x_BTC, self.lm_head.weight, self.shape.vocab_size)

    def token_losses(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Nats of every target, fp32 [B, T]; 0 where it is -1. For use without gradients."""
        x_BTC = self._final(Run(), idx_BT)
        losses_N = token_losses(
            x_BTC.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(), self.shape.vocab_size
        )
        return losses_N.view_as(targets_BT)

    def _final(self, run: Run, idx_BT: Tensor) -> Tensor:
        """Activations [B, T, C] that lm_head reads."""
        length = idx_BT.size(1)
        if length > self.shape.sequence_len:
            raise ValueError(
                f"{length} positions; this model takes at most {self.shape.sequence_len}"
            )
        cos, sin = self.cos[:, :length], self.sin[:, :length]  # type: ignore[index]
        x0_BTC = backout_BTC = run.begin(self, self.transformer.wte(idx_BT))
        x_BTC = x0_BTC.view_as(x0_BTC)  # itself twice would have a layer compiled for that alone
        shares = zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True)
        for i, (block, share) in enumerate(zip(self.transformer.h, shares, strict=True)):
            # Here, so that its gradient leaves as soon as the layer's backward pass is done.
            embed_BTE = self.value_embeds[str(i)](idx_BT) if str(i) in self.value_embeds else None
            x_BTC = run.layer(block, x_BTC, x0_BTC, share, embed_BTE, cos, sin)
            if i == self.shape.n_layer // 2:
                backout_BTC = x_BTC
        return run.end(self, x_BTC, backout_BTC)

    def begin(self, token_BTC: Tensor) -> Tensor:
        """The stream's first state: mixed into each position but the first is a gated share of the
        one before it.
        """
        x_BTC = norm(token_BTC.to(self.compute_dtype))
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTC[:, 1:, :SMEAR_GATE_CHANNELS]))
        mixed_BTC = x_BTC[:, 1:] + self.smear_lambda[0] * gate_BT1 * x_BTC[:, :-1]
        return torch.cat((x_BTC[:, :1], mixed_BTC), dim=1)

    def end(self, x_BTC: Tensor, backout_BTC: Tensor) -> Tensor:
        """What lm_head reads, of the last layer's stream and of the middle one's."""
        return norm(x_BTC - self.backout_lambda[0] * backout_BTC)


def _layer(block: Block, *inputs: Any) -> Tensor:
    return block(*inputs)  # type: ignore[no-any-return]


class Run(NamedTuple):
    """The pieces that a pass runs, each compiled alone: layers alike share code, and a layer's
    gradients are there when its backward pass is done.
    """

    begin: Callable[..., Tensor] = GPT.begin
    layer: Callable[..., Tensor] = _layer
    end: Callable[..., Tensor] = GPT.end

    def compiled(self) -> Run:
        """The same through torch.compile."""
        return Run(*(torch.compile(each, fullgraph=True, dynamic=False) for each in self))


def _draw(name: str, out: Tensor, shape: ModelShape, generator: torch.Generator) -> None:
    """Fill one parameter from its initial distribution; consecutive draws move the generator on."""
    bound = math.sqrt(3.0 / shape.n_embd)  # uniform with standard deviation 1 / sqrt(C)
    depth_L = torch.arange(shape.n_layer) / max(shape.n_layer - 1, 1)
    if name == "resid_lambdas":
        out.copy_(1.15 - 0.10 * depth_L)
    elif name == "x0_lambdas":
        out.copy_(0.20 - 0.15 * depth_L)
    elif name == "smear_lambda" or name.endswith("c_proj.weight"):
        out.zero_()
    elif name == "backout_lambda":
        out.fill_(BACKOUT_START)
    elif name == "transformer.wte.weight":
        out.normal_(0.0, WTE_STD, generator=generator)
    elif name == "lm_head.weight":
        out.normal_(0.0, LM_HEAD_STD, generator=generator)
    elif name.endswith("_gate.weight"):
        out.uniform_(0.0, GATE_BOUND, generator=generator)
    elif name.endswith("c_fc.weight"):
        out.uniform_(-MLP_FC_SCALE * bound, MLP_FC_SCALE * bound, generator=generator)
    else:
        out.uniform_(-bound, bound, generator=generator)
