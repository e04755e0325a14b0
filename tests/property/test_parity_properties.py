"""Loss, gradients and updates of random models against the plain reading, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.plain import plain_adamw, plain_logits, plain_loss, plain_muon
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.gpt import GPT
from trainer.optim import Optimizer

NEAR = 2e-4  # of a gradient's or an update's norm: fp32 against float64 over a whole network
SLIGHT = 1e-5  # a gradient so small beside all of them is rounding itself


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    """Depths odd and even, widths nudged up to whole heads, grouped heads, windows, padding."""
    depth, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 12, 16]))
    aspect_ratio = draw(st.integers(-(-24 // depth), 40 // depth + 16))  # the gates read 24
    heads = -(-depth * aspect_ratio // head_dim)
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    length = draw(st.integers(2, 14))
    return JobSpec.parse(
        {
            "model": {
                "depth": depth,
                "aspect_ratio": aspect_ratio,
                "head_dim": head_dim,
                "n_kv_head": kv_heads,
                "max_seq_len": length,
                "window_pattern": draw(st.text("SL", min_size=1, max_size=3)),
                "vocab_size": draw(st.integers(3, 90)),
            },
            "batch": {"device_batch_size": 1, "total_batch_size": length},
            "evaluate": {"tokens": length},
            "precision": {"compute": "fp32"},
            "resources": {"gpus_per_worker": 0},
        }
    )


def random_weights(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def distance(found: Tensor, wanted: Tensor, scale: float) -> float:
    return float((found.detach().double() - wanted).norm()) / max(scale, 1e-30)


@settings(max_examples=12)
@given(specs(), st.integers(0, 2**16), st.booleans())
def test_losses_gradients_and_an_update_are_those_of_the_plain_formulas(
    spec: JobSpec, seed: int, ignored: bool
) -> None:
    vocabulary = spec.model.vocab_size
    assert vocabulary is not None
    shape = ModelShape.of(spec.model, vocabulary)
    model = GPT(shape, torch.float32, torch.float32)
    random_weights(model, seed)
    ids_BT = torch.randint(
        0, vocabulary, (2, shape.sequence_len + 1), generator=torch.Generator().manual_seed(seed)
    )
    x_BT, y_BT = ids_BT[:, :-1], ids_BT[:, 1:].clone()
    if ignored:
        y_BT[0, ::2] = -1
    plain = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}

    loss = model.learn(x_BT, y_BT)
    plain_value = plain_loss(plain_logits(shape, plain, x_BT), y_BT)
    plain_value.backward()
    assert abs(loss.item() / plain_value.item() - 1.0) < 1e-5
    gradients = {n: p.grad for n, p in plain.items()}
    whole = float(torch.stack([g.norm() for g in gradients.values() if g is not None]).norm())
    for name, parameter in model.named_parameters():
        wanted = gradients[name]
        if wanted is None:  # the plain reading never touched it, as no gate of one position
            wanted = torch.zeros_like(plain[name])
            assert parameter.grad is not None
        found = parameter.grad
        assert found is not None
        assert distance(found, wanted, float(wanted.norm()) + SLIGHT / NEAR * whole) < NEAR, name

    _check_update(spec, shape, model, seed)


def _check_update(spec: JobSpec, shape: ModelShape, model: GPT, seed: int) -> None:
    """One step from random gradients and random state, which tests more than the model's own."""
    groups = param_groups(spec, shape)
    optimizer = Optimizer(model, groups, torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    state = {
        name: (0.1 * torch.randn(tensor.shape, generator=generator)).abs()
        if "_sq" in name or "second" in name
        else 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in optimizer.state_tensors().items()
    }
    optimizer.load_state_tensors(state)
    optimizer.load_counters(dict.fromkeys(optimizer.counters(), 6))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    named = dict(model.named_parameters())
    before = {n: p.detach().double() for n, p in named.items()}
    gradient = {n: p.grad.double() for n, p in named.items() if p.grad is not None}
    values = Schedule(spec.schedule, groups).at(7)
    optimizer.apply(values)
    optimizer.step()
    after = optimizer.state_tensors()
    for group in groups:
        value = values.groups[group.name]
        keys = (
            ("momentum_buffer", "second_momentum_buffer")
            if group.kind == "muon"
            else ("exp_avg", "exp_avg_sq")
        )
        for name in group.parameters:
            first, second = (state[f"{name}.{key}"].double() for key in keys)
            if group.kind == "muon":
                wanted = plain_muon(
                    before[name],
                    gradient[name],
                    first,
                    second,
                    value.lr,
                    value.momentum,
                    value.weight_decay,
                )
            else:
                betas = (value.momentum, group.betas[1])
                wanted = plain_adamw(
                    before[name],
                    gradient[name],
                    first,
                    second,
                    7,
                    value.lr,
                    betas,
                    value.weight_decay,
                )
            moved = float((wanted[0] - before[name]).norm())
            rounding = 1e-6 * float(before[name].norm())  # of the weight itself in fp32
            assert distance(named[name], wanted[0], 1.0) < 10 * NEAR * moved + rounding, name
            for key, moment in zip(keys, wanted[1:], strict=True):
                scale = float(moment.norm())
                assert distance(after[f"{name}.{key}"], moment, scale) < 10 * NEAR, f"{name}.{key}"
