"""Widened bf16 products against those of bf16 kernels, and oneDNN's against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import arithmetic
from trainer.contract.shape import ModelShape
from trainer.contract.spec import ModelSpec
from trainer.gpt import GPT
from trainer.muon import orthogonalise

BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 numbers


def learned(model: GPT, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and each parameter's gradient."""
    model.zero_grad()
    loss = model.learn(ids_BT[:, :-1], ids_BT[:, 1:])
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
        found.append(learned(model, ids_BT))
    (wide_loss, wide), (native_loss, native) = found
    torch.testing.assert_close(wide_loss, native_loss, rtol=BF16_STEP, atol=0.0)
    for name, gradient in native.items():
        apart = (wide[name] - gradient).float().norm() / gradient.float().norm().clamp(min=1e-6)
        assert apart < 4 * BF16_STEP, name


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("strides", ["plain", "transposed", "neither"])
def test_products_by_onednn_are_torchs_whatever_the_strides(rows: int, strides: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(33, rows, generator=generator).mT.requires_grad_()
    weight_OI = {
        "plain": torch.randn(50, 33, generator=generator),
        "transposed": torch.randn(33, 50, generator=generator).mT,
        "neither": torch.randn(50, 70, generator=generator)[:, ::2][:, :33],
    }[strides].requires_grad_()
    grad_NO = torch.randn(rows, 50, generator=generator)
    expected = F.linear(x_NI.double(), weight_OI.double())
    gradients = torch.autograd.grad(expected, (x_NI, weight_OI), grad_NO.double())
    actual = arithmetic.onednn_linear(x_NI, weight_OI)
    torch.testing.assert_close(actual, expected.float())
    found = torch.autograd.grad(actual, (x_NI, weight_OI), grad_NO)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operations_of_our_own_keep_what_they_promise_the_compiler() -> None:
    x_NI, weight_OI = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(arithmetic.onednn_linear, (x_NI, weight_OI))
    stacks = torch.randn(3, 6, 5), torch.randn(3, 5, 4).mT
    torch.library.opcheck(arithmetic.onednn_linears, stacks)


def test_who_multiplies_is_asked_of_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_ONEDNN", True)
    assert arithmetic.by_onednn(torch.ones(2, 2))
    assert not arithmetic.by_onednn(torch.ones(2, 2, dtype=torch.bfloat16))
    assert not arithmetic.by_onednn(torch.ones(2, 2, device="meta"))
    monkeypatch.setattr(arithmetic, "_ONEDNN", False)
    assert not arithmetic.by_onednn(torch.ones(2, 2))


def test_a_model_learns_the_same_by_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(depth=2, aspect_ratio=64, head_dim=32, max_seq_len=32, window_pattern="SL")
    shape = ModelShape.of(spec, 96)
    model = GPT(shape, torch.float32, torch.float32)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):  # zeros would hide what lies before them
            torch.nn.init.normal_(parameter, std=0.05)
    ids_BT = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for onednn in (True, False):
        monkeypatch.setattr(arithmetic, "_ONEDNN", onednn)
        found.append((*learned(model, ids_BT), model.logits(ids_BT[:, :-1])))
    (loss, gradients, logits), (usual_loss, usual, usual_logits) = found
    torch.testing.assert_close(loss, usual_loss)
    torch.testing.assert_close(logits, usual_logits)
    for name, gradient in usual.items():
        assert (gradients[name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("size", [(3, 16, 40), (3, 40, 16), (2, 24, 24)])
def test_orthogonal_updates_are_the_same_by_either_library(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]
) -> None:
    gradients = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = []
    for onednn in (True, False):
        monkeypatch.setattr(arithmetic, "_ONEDNN", onednn)
        found.append(orthogonalise(gradients, torch.float32))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
