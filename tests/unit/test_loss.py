"""The chunked loss against the plain form."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import arithmetic
from trainer.loss import Kernels, chunk_rows, learn, token_losses

N, C, V, P = 37, 16, 50, 64


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_NC = (4 * torch.randn(N, C, generator=generator)).to(dtype).requires_grad_()
    weight_PC = nn.Parameter(2 * torch.randn(P, C, generator=generator))
    targets_N = torch.randint(0, V, (N,), generator=generator)
    targets_N[::5] = -1
    return x_NC, weight_PC, targets_N


def plain(x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor) -> Tensor:
    logits = F.linear(x_NC, weight_PC.to(x_NC.dtype))[:, :V]
    logits = logits.float() if logits.dtype is torch.bfloat16 else logits
    return F.cross_entropy(15 * torch.tanh(logits / 15), targets_N, ignore_index=-1)


@pytest.mark.parametrize("rows", [1, 8, N, 1000])
@pytest.mark.parametrize("logits", [1e-3, 1.0, 4.0])
@pytest.mark.parametrize("onednn", [True, False])
def test_value_and_gradients_are_those_of_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, rows: int, logits: float, onednn: bool
) -> None:
    monkeypatch.setattr(arithmetic, "_ONEDNN", onednn)
    x_NC, weight_PC, targets_N = inputs()
    x_NC = logits * x_NC.detach()
    exact_NC, exact_PC = (each.detach().double().requires_grad_() for each in (x_NC, weight_PC))
    expected = plain(exact_NC, exact_PC, targets_N)
    grads = torch.autograd.grad(3.0 * expected, (exact_NC, exact_PC))
    actual, grad_NC = learn(x_NC, weight_PC, targets_N, V, 3.0, chunk_bytes=4 * P * rows)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert weight_PC.grad is not None
    for one, other in zip((grad_NC, weight_PC.grad), grads, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_where_the_cap_is_reached_gradients_are_nearer_the_truth_than_the_plain_ones() -> None:
    x_NC, weight_PC, targets_N = inputs()
    x_NC = (50.0 * x_NC.detach()).requires_grad_()
    exact_NC = x_NC.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(exact_NC, weight_PC.double(), targets_N), exact_NC)
    (usual,) = torch.autograd.grad(plain(x_NC, weight_PC, targets_N), x_NC)
    _, ours = learn(x_NC, weight_PC, targets_N, V)
    assert (ours - truth).norm() < (usual - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "onednn"), [(torch.bfloat16, False), (torch.float32, True)])
def test_what_is_compiled_is_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, onednn: bool
) -> None:
    monkeypatch.setattr(arithmetic, "_ONEDNN", onednn)
    found = []
    for kernels in (Kernels(), Kernels().compiled()):
        x_NC, weight_PC, targets_N = inputs(dtype)
        loss, grad_NC = learn(x_NC, weight_PC, targets_N, V, 1.0, 4 * P * 8, kernels)
        assert weight_PC.grad is not None
        found.append((loss, grad_NC.float(), weight_PC.grad))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


def test_bf16_gradients_are_as_near_the_truth_as_the_plain_ones() -> None:
    x_NC, weight_PC, targets_N = inputs(torch.bfloat16)
    truth = torch.autograd.grad(plain(x_NC.float(), weight_PC, targets_N), weight_PC)[0]
    usual = torch.autograd.grad(plain(x_NC, weight_PC, targets_N), weight_PC)[0]
    learn(x_NC, weight_PC, targets_N, V, chunk_bytes=4 * P * 8)
    ours = weight_PC.grad
    assert ours is not None
    assert ours.dtype == torch.float32
    assert (ours - truth).norm() < 1.5 * (usual - truth).norm()


def test_the_weights_gradient_grows_where_it_lies() -> None:
    x_NC, weight_PC, targets_N = inputs()
    learn(x_NC, weight_PC, targets_N, V)
    there = weight_PC.grad
    assert there is not None
    once = there.clone()
    learn(x_NC, weight_PC, targets_N, V, 2.0)
    assert weight_PC.grad is there
    torch.testing.assert_close(there, 3.0 * once)


def test_padding_rows_get_no_gradient() -> None:
    x_NC, weight_PC, targets_N = inputs()
    learn(x_NC, weight_PC, targets_N, V)
    assert weight_PC.grad is not None
    assert weight_PC.grad[V:].abs().max() == 0


def test_losses_of_tokens_have_the_same_mean() -> None:
    x_NC, weight_PC, targets_N = inputs()
    with torch.no_grad():
        losses_N = token_losses(x_NC, weight_PC, targets_N, V)
    assert losses_N[::5].abs().max() == 0
    expected = plain(x_NC, weight_PC, targets_N).item()
    assert losses_N.sum().item() / (targets_N >= 0).sum().item() == pytest.approx(expected)


def test_no_target_at_all_gives_zero_and_no_gradient() -> None:
    x_NC, weight_PC, _ = inputs()
    loss, grad_NC = learn(x_NC, weight_PC, torch.full((N,), -1), V)
    assert loss.item() == 0
    assert grad_NC.abs().max() == 0


def test_chunks_stay_within_their_bytes_and_are_nearly_equal() -> None:
    rows = chunk_rows(16_384, 32_768, 256 * 2**20)
    assert rows * 32_768 * 4 <= 256 * 2**20
    assert 16_384 % rows == 0
    assert chunk_rows(3, 32_768, 2**20) == 3
    assert chunk_rows(10, 10**9, 2**20) == 1
