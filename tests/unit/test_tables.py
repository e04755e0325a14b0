"""A table's gradient grows where it lies, by what autograd itself would have added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.tables import look_up

ROWS, WIDTH = 50, 8


def gradients(dtype: torch.dtype, ids: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a table after some micro-steps: ours, and autograd's in fp32."""
    drawn = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    ours, plain = nn.Parameter(drawn.to(dtype)), nn.Parameter(drawn)
    for idx_BT, weight_BTC in zip(ids, weights, strict=True):
        (look_up(ours, idx_BT).float() * weight_BTC).sum().backward()
        (F.embedding(idx_BT, plain) * weight_BTC).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    return ours.grad, plain.grad


def micro_steps(count: int, tokens: int = 40) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, ROWS // 2, (2, tokens), generator=generator) for _ in range(count)]
    return ids, [torch.randn(2, tokens, WIDTH, generator=generator) for _ in range(count)]


def test_the_first_micro_step_is_autograds_to_the_bit() -> None:
    ours, plain = gradients(torch.float32, *micro_steps(1))
    assert torch.equal(ours, plain)


def test_further_micro_steps_add_to_it() -> None:
    ours, plain = gradients(torch.float32, *micro_steps(3))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_frequent_token_is_not_lost_to_rounding_in_bf16() -> None:
    ids = [torch.zeros(2, 1000, dtype=torch.int64)]  # 2,000 times 1: bf16 stops counting at 256
    ours, _ = gradients(torch.bfloat16, ids, [torch.ones(2, 1000, WIDTH)])
    assert ours.dtype is torch.bfloat16
    assert ours[0].tolist() == [2000.0] * WIDTH
    assert not ours[1:].any()


def test_the_gradient_stays_where_it_is() -> None:
    table = nn.Parameter(torch.randn(ROWS, WIDTH))
    table.grad = there = torch.zeros(ROWS, WIDTH)
    look_up(table, torch.tensor([[3, 3]])).sum().backward()
    assert table.grad is there
    assert there[3].tolist() == [2.0] * WIDTH


def test_a_token_that_the_table_does_not_hold_is_refused() -> None:
    table = nn.Parameter(torch.randn(ROWS, WIDTH))
    with pytest.raises(IndexError):
        look_up(table, torch.tensor([[ROWS]]))
