"""The optimizer: that rates asked for are rates applied, and that state survives by name."""

import math
from dataclasses import replace

import pytest
import torch

from trainer.contract.scaling import ParamGroup, param_groups
from trainer.contract.schedule import InForce, Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.gpt import GPT
from trainer.optim import Optimizer, OptimizerStateError, clip_grad_norm

SPEC = JobSpec.parse(
    {
        "model": {"depth": 3, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": 16},
        "batch": {"device_batch_size": 2, "total_batch_size": 32},
    }
)
SHAPE = ModelShape.of(SPEC.model, 100)
GROUPS = param_groups(SPEC, SHAPE)
SCHEDULE = Schedule(SPEC.schedule, GROUPS)


def training_model(dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(SHAPE, dtype, dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def fill_gradients(model: GPT, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def without_decay(values: InForce, lr: float | None = None) -> InForce:
    return replace(
        values,
        groups={
            name: replace(value, weight_decay=0.0, lr=value.lr if lr is None else lr)
            for name, value in values.groups.items()
        },
    )


def muon_norm(group: ParamGroup, lr: float) -> float:
    rows, cols = group.shape
    return lr * math.sqrt(max(1.0, rows / cols)) * math.sqrt(min(rows, cols))


def test_new_rates_move_the_weights_by_what_they_say() -> None:
    model = training_model()
    optimizer = Optimizer(model, GROUPS, torch.float32)
    for lr in (0.01, 0.0004, 0.02):
        before = weights_of(model)
        fill_gradients(model)
        optimizer.apply(without_decay(SCHEDULE.at(500), lr))
        optimizer.step()
        for group in GROUPS:
            for name in group.parameters:
                if group.kind == "muon":
                    moved = (model.state_dict()[name] - before[name]).norm().item()
                    assert moved == pytest.approx(muon_norm(group, lr), rel=1e-4)


def test_first_adamw_update_is_the_rate_itself() -> None:
    model = training_model()
    before = weights_of(model)
    fill_gradients(model)
    optimizer = Optimizer(model, GROUPS, torch.float32)
    # A rate well above the rounding of the weights.
    values = without_decay(SCHEDULE.at(0), lr=0.01)
    optimizer.apply(values)
    optimizer.step()
    for group in GROUPS:
        if group.kind == "adamw":
            for name in group.parameters:
                moved = (model.state_dict()[name] - before[name]).abs().mean().item()
                assert moved == pytest.approx(values.groups[group.name].lr, rel=1e-3)


def test_adamw_follows_torch() -> None:
    model = training_model()
    optimizer = Optimizer(model, GROUPS, torch.float32)
    copy = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    (wte,) = (group for group in GROUPS if group.name == "wte")
    theirs = torch.optim.AdamW([copy], wte.lr, wte.betas, wte.eps, wte.weight_decay)
    for step in range(5):
        fill_gradients(model, seed=step)
        copy.grad = model.transformer.wte.weight.grad
        optimizer.step()
        theirs.step()
    assert torch.allclose(model.transformer.wte.weight, copy, rtol=1e-5, atol=1e-7)


def test_decay_pulls_only_where_the_update_does() -> None:
    shape = next(group for group in GROUPS if group.name == "matrix_48x48")
    name = shape.parameters[0]
    ends = []
    for decay in (0.0, 0.5):
        model = training_model()
        before = model.state_dict()[name].clone()
        optimizer = Optimizer(model, GROUPS, torch.float32)
        values = SCHEDULE.at(0)
        groups = {k: replace(v, weight_decay=decay, lr=0.01) for k, v in values.groups.items()}
        optimizer.apply(replace(values, groups=groups))
        fill_gradients(model)
        optimizer.step()
        ends.append(model.state_dict()[name].clone())
    update = before - ends[0]
    expected = torch.where(update * before >= 0, 0.01 * 0.5 * before, 0.0)
    assert torch.allclose(ends[0] - ends[1], expected, atol=1e-7)


def test_values_read_back_are_the_ones_applied() -> None:
    optimizer = Optimizer(training_model(), GROUPS, torch.float32)
    for step in (0, 17, 299_999):
        values = SCHEDULE.at(step)
        optimizer.apply(values)
        assert optimizer.read() == values.groups
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [g.lr for g in GROUPS]


def test_values_of_other_groups_are_refused() -> None:
    optimizer = Optimizer(training_model(), GROUPS, torch.float32)
    values = SCHEDULE.at(0)
    fewer = {name: value for name, value in values.groups.items() if name != "x0"}
    with pytest.raises(OptimizerStateError, match="x0"):
        optimizer.apply(replace(values, groups=fewer))


def test_groups_that_miss_a_parameter_are_refused() -> None:
    with pytest.raises(OptimizerStateError, match="x0_lambdas"):
        Optimizer(training_model(), tuple(g for g in GROUPS if g.name != "x0"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_goes_on_exactly(dtype: torch.dtype) -> None:
    ends = []
    for interrupted in (False, True):
        model = training_model(dtype)
        optimizer = Optimizer(model, GROUPS, dtype)
        for step in range(4):
            if interrupted and step == 2:
                saved = {name: value.clone() for name, value in optimizer.state_tensors().items()}
                counters, weights = optimizer.counters(), weights_of(model)
                model = GPT(SHAPE, dtype, dtype)
                model.load_state_dict(weights)
                optimizer = Optimizer(model, GROUPS, dtype)
                optimizer.load_state_tensors(saved)
                optimizer.load_counters(counters)
            fill_gradients(model, seed=step)
            optimizer.apply(SCHEDULE.at(step))
            optimizer.step()
        ends.append(weights_of(model) | optimizer.state_tensors())
        assert set(optimizer.counters().values()) == {4}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_state_has_whole_tensors_by_parameter_name() -> None:
    state = Optimizer(training_model(torch.bfloat16), GROUPS, torch.bfloat16).state_tensors()
    shapes = SHAPE.named_shapes()
    for name in ("lm_head.weight", "transformer.wte.weight", "smear_lambda"):
        assert tuple(state[f"{name}.exp_avg"].shape) == shapes[name]
        assert tuple(state[f"{name}.exp_avg_sq"].shape) == shapes[name]
    assert state["transformer.wte.weight.exp_avg"].dtype == torch.bfloat16
    assert state["lm_head.weight.exp_avg"].dtype == torch.float32
    wide, tall = "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"
    assert tuple(state[f"{tall}.momentum_buffer"].shape) == shapes[tall] == (192, 48)
    assert tuple(state[f"{tall}.second_momentum_buffer"].shape) == (192, 1)
    assert tuple(state[f"{wide}.second_momentum_buffer"].shape) == (1, 192)
    assert len(state) == 2 * len(shapes)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer = Optimizer(training_model(), GROUPS, torch.float32)
    state = {name: value.clone() + 1 for name, value in optimizer.state_tensors().items()}
    with pytest.raises(OptimizerStateError, match="x0_lambdas"):
        optimizer.load_state_tensors({k: v for k, v in state.items() if "x0" not in k})
    with pytest.raises(OptimizerStateError, match="shape"):
        optimizer.load_state_tensors(state | {"smear_lambda.exp_avg": torch.zeros(2)})
    with pytest.raises(OptimizerStateError, match="counts"):
        optimizer.load_counters({"wte": 3})
    assert all(value.abs().max() == 0 for value in optimizer.state_tensors().values())


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    model = training_model()
    fill_gradients(model)
    whole = math.sqrt(
        sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    )
    assert clip_grad_norm(model.parameters()).item() == pytest.approx(whole, rel=1e-5)
    assert clip_grad_norm(model.parameters(), 1.0).item() == pytest.approx(whole, rel=1e-5)
    assert clip_grad_norm(model.parameters(), 2.0).item() == pytest.approx(1.0, rel=1e-5)
    assert clip_grad_norm(model.parameters()).item() == pytest.approx(1.0, rel=1e-5)


def test_zero_grad_leaves_zeros_in_the_same_memory() -> None:
    model = training_model()
    fill_gradients(model)
    there = [parameter.grad for parameter in model.parameters()]
    Optimizer(model, GROUPS, torch.float32).zero_grad()
    for parameter, grad in zip(model.parameters(), there, strict=True):
        assert parameter.grad is grad
        assert grad is not None
        assert not grad.any()
