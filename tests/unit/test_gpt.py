"""The network at the sizes that the recorded run doesn't have, against a plain re-reading of it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.plain import plain_logits
from trainer.attention import causal_attention
from trainer.contract.shape import ModelShape
from trainer.gpt import GPT


def shape_of(**sizes: object) -> ModelShape:
    usual = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "vocab_size": 70}
    usual |= {"sequence_len": 40, "window_pattern": "L"}
    return ModelShape.build(**{**usual, **sizes})  # type: ignore[arg-type]


def random_model(shape: ModelShape) -> GPT:
    """All weights far from their initial values, so that every part of the network matters."""
    model = GPT(shape, torch.float32, torch.float32)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(shape: ModelShape, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, shape.vocab_size, (rows, shape.sequence_len), generator=generator)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_layer": 1},
        {"n_layer": 2, "n_kv_head": 4},
        {"n_kv_head": 1, "vocab_size": 64},
        {"sequence_len": 140, "window_pattern": "SL"},
    ],
    ids=str,
)
def test_logits_are_those_of_the_plain_formulas(sizes: dict[str, object]) -> None:
    shape = shape_of(**sizes)
    model, idx_BT = random_model(shape), tokens(shape)
    actual, expected = model.logits(idx_BT), plain_logits(shape, model.state_dict(), idx_BT)
    assert actual.shape == (2, shape.sequence_len, shape.vocab_size)
    assert float((actual - expected).detach().norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(("length", "window"), [(40, 40), (40, 7), (40, 20), (5, 2), (9, 1)])
def test_a_query_sees_its_window_and_nothing_else(length: int, window: int) -> None:
    q, k, v = torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(0))
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    seen_TS = (s <= t) & (s >= t - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TS)
    assert torch.allclose(causal_attention(q, k, v, window), expected, atol=1e-6)


def test_names_order_and_shapes_are_those_of_the_contract() -> None:
    shape = shape_of()
    named = {
        name: tuple(p.shape) for name, p in GPT(shape, *2 * [torch.bfloat16]).named_parameters()
    }
    assert list(named.items()) == list(shape.named_shapes().items())


def test_loss_and_token_losses_agree_with_the_logits() -> None:
    shape = shape_of()
    model, idx_BT = random_model(shape), tokens(shape)
    targets_BT = idx_BT.roll(-1, dims=1)
    targets_BT[:, -1] = -1
    expected = F.cross_entropy(
        model.logits(idx_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-1
    )
    losses_BT = model.token_losses(idx_BT, targets_BT)
    assert model.learn(idx_BT, targets_BT).item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses_BT.sum().item() / (targets_BT >= 0).sum().item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_initial_weights_follow_the_seed_alone() -> None:
    shape = shape_of(n_layer=2, n_kv_head=4, vocab_size=4096)
    models = [GPT(shape, torch.float32, torch.float32) for _ in range(3)]
    for model, seed, noise in zip(models, (7, 7, 8), (0, 1, 2), strict=True):
        torch.manual_seed(noise)
        model.init_weights(seed)
    one, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_initial_weights_have_nanochats_distributions() -> None:
    shape = shape_of(n_layer=3, n_kv_head=4, vocab_size=4096)
    model = GPT(shape, torch.float32, torch.float32)
    model.init_weights(0)
    w, bound = model.state_dict(), math.sqrt(3 / 64)
    assert w["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.01)
    assert w["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.01)
    for name, top in (
        ("value_embeds.2.weight", bound),
        ("transformer.h.1.attn.c_q.weight", bound),
        ("transformer.h.1.mlp.c_fc.weight", 0.4 * bound),
    ):
        assert w[name].abs().max().item() == pytest.approx(top, rel=0.01)
        assert abs(w[name].mean().item()) < 0.02 * top
    assert w["transformer.h.0.attn.ve_gate.weight"].min() >= 0
    assert w["smear_gate.weight"].max() <= 0.02
    assert w["transformer.h.0.attn.c_proj.weight"].abs().max() == 0
    assert w["transformer.h.0.mlp.c_proj.weight"].abs().max() == 0
    assert w["resid_lambdas"].tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert w["x0_lambdas"].tolist() == pytest.approx([0.20, 0.125, 0.05])
    assert (w["smear_lambda"].item(), w["backout_lambda"].item()) == (0.0, pytest.approx(0.2))


def test_bf16_stays_near_fp32_and_tables_have_their_own_dtype() -> None:
    shape = shape_of()
    model, idx_BT = random_model(shape), tokens(shape)
    for tables in (torch.float32, torch.bfloat16):
        rounded = GPT(shape, torch.bfloat16, tables)
        rounded.load_state_dict(model.state_dict())
        assert rounded.transformer.wte.weight.dtype == tables
        assert rounded.lm_head.weight.dtype == torch.float32
        with torch.no_grad():
            exact = model.logits(idx_BT)
            gap = (rounded.logits(idx_BT) - exact).norm() / exact.norm()
        assert float(gap) < 0.05


def test_a_text_longer_than_the_context_is_refused() -> None:
    model = random_model(shape_of())
    with pytest.raises(ValueError, match="at most 40"):
        model.logits(torch.zeros(1, 41, dtype=torch.long))
