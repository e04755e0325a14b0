"""The chunked loss against the plain form."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.loss import chunk_rows, mean_loss, token_losses

N, C, V, P = 37, 16, 50, 64


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_NC = (4 * torch.randn(N, C, generator=generator)).to(dtype).requires_grad_()
    weight_PC = (2 * torch.randn(P, C, generator=generator)).requires_grad_()
    targets_N = torch.randint(0, V, (N,), generator=generator)
    targets_N[::5] = -1
    return x_NC, weight_PC, targets_N


def plain(x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor) -> Tensor:
    logits = F.linear(x_NC, weight_PC.to(x_NC.dtype))[:, :V].float()
    return F.cross_entropy(15 * torch.tanh(logits / 15), targets_N, ignore_index=-1)


@pytest.mark.parametrize("rows", [1, 8, N, 1000])
def test_value_and_gradients_are_those_of_the_plain_form(rows: int) -> None:
    x_NC, weight_PC, targets_N = inputs()
    expected = plain(x_NC, weight_PC, targets_N)
    grads = torch.autograd.grad(3.0 * expected, (x_NC, weight_PC))
    actual = mean_loss(x_NC, weight_PC, targets_N, V, chunk_bytes=4 * P * rows)
    ours = torch.autograd.grad(3.0 * actual, (x_NC, weight_PC))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, grads, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_bf16_gradients_are_as_near_the_truth_as_the_plain_ones() -> None:
    x_NC, weight_PC, targets_N = inputs(torch.bfloat16)
    truth = torch.autograd.grad(plain(x_NC.float(), weight_PC, targets_N), weight_PC)[0]
    usual = torch.autograd.grad(plain(x_NC, weight_PC, targets_N), weight_PC)[0]
    loss = mean_loss(x_NC, weight_PC, targets_N, V, chunk_bytes=4 * P * 8)
    ours = torch.autograd.grad(loss, weight_PC)[0]
    assert ours.dtype == torch.float32
    assert (ours - truth).norm() < 1.5 * (usual - truth).norm()


def test_padding_rows_get_no_gradient() -> None:
    x_NC, weight_PC, targets_N = inputs()
    mean_loss(x_NC, weight_PC, targets_N, V).backward()
    assert weight_PC.grad is not None
    assert weight_PC.grad[V:].abs().max() == 0


def test_without_gradients_the_value_is_the_same() -> None:
    x_NC, weight_PC, targets_N = inputs()
    with torch.no_grad():
        value = mean_loss(x_NC, weight_PC, targets_N, V)
        losses_N = token_losses(x_NC, weight_PC, targets_N, V)
    assert value.item() == pytest.approx(plain(x_NC, weight_PC, targets_N).item(), rel=1e-6)
    assert losses_N[::5].abs().max() == 0
    assert losses_N.sum().item() / (targets_N >= 0).sum().item() == pytest.approx(value.item())


def test_no_target_at_all_gives_zero_and_no_gradient() -> None:
    x_NC, weight_PC, _ = inputs()
    loss = mean_loss(x_NC, weight_PC, torch.full((N,), -1), V)
    loss.backward()
    assert loss.item() == 0
    assert x_NC.grad is not None
    assert x_NC.grad.abs().max() == 0


def test_chunks_stay_within_their_bytes_and_are_nearly_equal() -> None:
    rows = chunk_rows(16_384, 32_768, 256 * 2**20)
    assert rows * 32_768 * 4 <= 256 * 2**20
    assert 16_384 % rows == 0
    assert chunk_rows(3, 32_768, 2**20) == 3
    assert chunk_rows(10, 10**9, 2**20) == 1
