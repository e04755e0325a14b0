"""Widened bf16 products against those of bf16 kernels."""

from __future__ import annotations

import pytest
import torch

from trainer import arithmetic
from trainer.contract.shape import ModelShape
from trainer.contract.spec import ModelSpec
from trainer.gpt import GPT

BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 numbers


@pytest.mark.parametrize("emulated", [True, False])
def test_only_bf16_where_it_is_emulated_is_widened(
    monkeypatch: pytest.MonkeyPatch, emulated: bool
) -> None:
    monkeypatch.setattr(arithmetic, "_EMULATED", emulated)
    wide = torch.float32 if emulated else torch.bfloat16
    assert arithmetic.operand(torch.ones(2, 2, dtype=torch.bfloat16)).dtype is wide
    whole = torch.ones(2, 2)
    assert arithmetic.operand(whole) is whole
    elsewhere = torch.ones(2, 2, dtype=torch.bfloat16, device="meta")
    assert arithmetic.operand(elsewhere) is elsewhere


def test_a_model_computes_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(depth=2, aspect_ratio=32, head_dim=16, max_seq_len=32, window_pattern="SL")
    shape = ModelShape.of(spec, 96)
    model = GPT(shape, torch.bfloat16, torch.bfloat16)
    model.init_weights(0)
    ids_BT = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for emulated in (True, False):
        monkeypatch.setattr(arithmetic, "_EMULATED", emulated)
        model.zero_grad()
        loss = model.learn(ids_BT[:, :-1], ids_BT[:, 1:])
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss, gradients))
    (wide_loss, wide), (native_loss, native) = found
    torch.testing.assert_close(wide_loss, native_loss, rtol=BF16_STEP, atol=0.0)
    for name, gradient in native.items():
        apart = (wide[name] - gradient).float().norm() / gradient.float().norm().clamp(min=1e-6)
        assert apart < 4 * BF16_STEP, name
