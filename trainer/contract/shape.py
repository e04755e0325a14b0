"""The shape of a nanochat-class GPT: sizes, parameter names, counts and FLOPs.

Owns every number that follows from a model's configuration alone, so that `plan`, the model and the
checkpoint code agree on names and sizes. Knows nothing of torch, optimizers or devices.

Invariant: `named_shapes` lists each parameter once, in the order of nanochat's state dict; "module
order" anywhere in this project means that order. Formulas: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from trainer.contract.contradictions import SMEAR_GATE_CHANNELS
from trainer.contract.spec import ModelSpec

VE_GATE_CHANNELS = 12  # the value-embedding gate reads this many leading channels
VOCAB_MULTIPLE = 64  # embedding tables are padded to whole tensor-core tiles
WINDOW_MULTIPLE = 128  # short windows are whole blocks of this many tokens

_SCALARS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", "smear_gate.weight")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by role, as nanochat reports them; scalars include the smear gate."""

    wte: int
    value_embeds: int
    lm_head: int
    matrices: int
    scalars: int
    total: int


@dataclass(frozen=True)
class ModelShape:
    """Every size of the network. Build it with `of` or `build`, which keep the sizes consistent.

    windows[i] is how many tokens to the left of itself a query of layer i sees; a window of at
    least sequence_len is full causal attention. value_embed_layers have a value embedding.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    sequence_len: int
    windows: tuple[int, ...]
    value_embed_layers: tuple[int, ...]

    @classmethod
    def of(cls, model: ModelSpec, vocab_size: int) -> Self:
        """The shape that a model spec asks for, with the tokenizer's vocabulary size."""
        return cls.build(
            n_layer=model.depth,
            n_head=model.n_head,
            n_kv_head=model.kv_heads,
            head_dim=model.head_dim,
            vocab_size=vocab_size,
            sequence_len=model.max_seq_len,
            window_pattern=model.window_pattern,
        )

    @classmethod
    def build(
        cls,
        *,
        n_layer: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        vocab_size: int,
        sequence_len: int,
        window_pattern: str,
    ) -> Self:
        """The shape of a model given by its sizes, as a checkpoint's model_config does."""
        return cls(
            n_layer=n_layer,
            n_embd=n_head * head_dim,
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            vocab_size=vocab_size,
            padded_vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            sequence_len=sequence_len,
            windows=_windows(window_pattern, n_layer, sequence_len),
            value_embed_layers=tuple(i for i in range(n_layer) if i % 2 == (n_layer - 1) % 2),
        )

    def named_shapes(self) -> dict[str, tuple[int, ...]]:
        """State-dict name to shape of every parameter, in module order."""
        width, kv_width = self.n_embd, self.n_kv_head * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "resid_lambdas": (self.n_layer,),
            "x0_lambdas": (self.n_layer,),
            "smear_lambda": (1,),
            "backout_lambda": (1,),
            "transformer.wte.weight": (self.padded_vocab_size, width),
        }
        for i in range(self.n_layer):
            layer = f"transformer.h.{i}"
            shapes[f"{layer}.attn.c_q.weight"] = (width, width)
            shapes[f"{layer}.attn.c_k.weight"] = (kv_width, width)
            shapes[f"{layer}.attn.c_v.weight"] = (kv_width, width)
            shapes[f"{layer}.attn.c_proj.weight"] = (width, width)
            if i in self.value_embed_layers:
                shapes[f"{layer}.attn.ve_gate.weight"] = (self.n_kv_head, VE_GATE_CHANNELS)
            shapes[f"{layer}.mlp.c_fc.weight"] = (4 * width, width)
            shapes[f"{layer}.mlp.c_proj.weight"] = (width, 4 * width)
        shapes["lm_head.weight"] = (self.padded_vocab_size, width)
        shapes["smear_gate.weight"] = (1, SMEAR_GATE_CHANNELS)
        for i in self.value_embed_layers:
            shapes[f"value_embeds.{i}.weight"] = (self.padded_vocab_size, kv_width)
        return shapes

    @cached_property
    def _counts(self) -> ParameterCounts:
        sizes = {name: math.prod(shape) for name, shape in self.named_shapes().items()}
        return ParameterCounts(
            wte=sizes["transformer.wte.weight"],
            value_embeds=sum(n for name, n in sizes.items() if name.startswith("value_embeds.")),
            lm_head=sizes["lm_head.weight"],
            matrices=sum(n for name, n in sizes.items() if name.startswith("transformer.h.")),
            scalars=sum(sizes[name] for name in _SCALARS),
            total=sum(sizes.values()),
        )

    def parameter_counts(self) -> ParameterCounts:
        """Parameters by role; padding of the vocabulary counts."""
        return self._counts

    @property
    def matmul_params(self) -> int:
        """Weights that every token is multiplied with: layers, lm_head and the smear gate."""
        return self._counts.matrices + self._counts.lm_head + SMEAR_GATE_CHANNELS

    @property
    def scaling_params(self) -> int:
        """What nanochat's scaling rules count as the model's size: layers and lm_head."""
        return self._counts.matrices + self._counts.lm_head

    @property
    def flops_per_token(self) -> int:
        """FLOPs a token, forward and backward: 6 a matmul weight, 12 C a key in the window."""
        attended = sum(min(window, self.sequence_len) for window in self.windows)
        return 6 * self.matmul_params + 12 * self.n_embd * attended


def _windows(pattern: str, n_layer: int, sequence_len: int) -> tuple[int, ...]:
    """The pattern tiled over the layers: S a quarter of the context in blocks, L all of it."""
    quarter_blocks = -(-sequence_len // (4 * WINDOW_MULTIPLE))
    size = {"S": quarter_blocks * WINDOW_MULTIPLE, "L": sequence_len}
    tiled = [size[pattern[i % len(pattern)]] for i in range(n_layer)]
    tiled[-1] = sequence_len
    return tuple(tiled)
