"""Attention by plain products against exact attention, and where it is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import arithmetic, short_attention
from trainer.attention import causal_attention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Inputs = tuple[Tensor, Tensor, Tensor]


def drawn(heads: int, groups: int, length: int, width: int = 64) -> Inputs:
    """q and k as the model's: of a norm that is as large as 1.2 * sqrt(D)."""
    generator = torch.Generator().manual_seed(length)
    each = (
        torch.randn(2, length, many, width, generator=generator) for many in (heads, groups, groups)
    )
    q_BTHD, k_BTGD, v_BTGD = each
    q_BTHD, k_BTGD = (1.2 * F.rms_norm(one, (width,)) for one in (q_BTHD, k_BTGD))
    q, k, v = (one.transpose(1, 2).bfloat16() for one in (q_BTHD, k_BTGD, v_BTGD))
    return q, k, v


def differentiated(inputs: Inputs, how: str) -> tuple[Tensor, ...]:
    """Output and gradients: exact, of torch's own kernel, or ours."""
    dtype = torch.float64 if how == "exact" else torch.bfloat16
    q, k, v = (each.detach().to(dtype).requires_grad_() for each in inputs)
    if how == "ours":
        out = short_attention.short_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


# One block, blocks and a part of one, and several query heads to a head of keys.
@pytest.mark.parametrize(("heads", "groups", "length"), [(2, 2, 40), (4, 2, 600)])
def test_output_and_gradients_are_as_exact_as_those_of_torchs_kernel(
    heads: int, groups: int, length: int
) -> None:
    inputs = drawn(heads, groups, length)
    exact = differentiated(inputs, "exact")
    usual, ours = differentiated(inputs, "usual"), differentiated(inputs, "ours")
    for truth, one, other in zip(exact, ours, usual, strict=True):
        off, usually = ((each.double() - truth).norm() / truth.norm() for each in (one, other))
        assert off < 2.0 * usually
        assert off < 2.0**-7


def test_a_change_of_a_later_key_changes_nothing_before_it() -> None:
    q, k, v = drawn(2, 2, 40)
    before = short_attention.short_attention(q, k, v)
    k[:, :, 30:] += 1.0
    v[:, :, 30:] += 1.0
    after = short_attention.short_attention(q, k, v)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


@pytest.mark.parametrize(
    ("length", "window", "fast", "chosen"),
    [
        (40, 40, True, True),
        (40, 39, True, False),  # a sliding window
        (1025, 1025, True, False),
        (40, 40, False, False),
    ],
)
def test_it_is_for_short_sequences_in_compiled_code_where_bf16_is_fast(
    length: int, window: int, fast: bool, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "_EMULATED", not fast)
    monkeypatch.setattr(arithmetic, "_AMX", False)
    q, _, _ = drawn(1, 1, length)
    assert not short_attention.is_short(q, window)  # nothing is being compiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert short_attention.is_short(q, window) is chosen
    assert not short_attention.is_short(q.float(), window)


def test_compiled_attention_is_near_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_EMULATED", False)
    monkeypatch.setattr(arithmetic, "_AMX", False)
    q, k, v = drawn(2, 2, 40)
    calls = []
    original = short_attention._forward
    monkeypatch.setattr(
        short_attention, "_forward", lambda *each: calls.append(1) or original(*each)
    )
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=False)(q, k, v, 40)
    assert calls == [1, 1]  # a row at a time
    torch.testing.assert_close(compiled, causal_attention(q, k, v, 40), rtol=2e-2, atol=2e-2)
