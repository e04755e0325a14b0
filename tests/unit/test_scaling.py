"""Shapes, counts, effective rates and nanochat's -1 defaults against its own recorded values."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.contract.scaling import (
    auto_total_batch_size,
    batch_lr_scale,
    iterations_for,
    param_groups,
    scaled_weight_decay,
    target_tokens,
)
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec, ModelSpec

RECORDED = Path(__file__).parents[1] / "data" / "nanochat"
CONFIGS: list[dict[str, Any]] = json.loads((RECORDED / "derived.json").read_text())
SCALARS = 2 + 24  # smear and backout lambdas, smear gate

everywhere = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"d{c['args']['depth']}")


def spec_of(config: dict[str, Any]) -> JobSpec:
    args = config["args"]
    model = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern")
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
    schedule = ("warmup_steps", "warmdown_ratio", "final_lr_frac")
    return JobSpec.parse(
        {
            "model": {key: args[key] for key in model},
            "batch": {
                "device_batch_size": 1,
                "total_batch_size": config["total_batch_size"],
            },
            "optimizer": {key: float(args[key]) for key in rates},
            "schedule": {key: args[key] for key in schedule}
            | {"num_iterations": config["num_iterations"]},
        }
    )


def shape_of(config: dict[str, Any]) -> ModelShape:
    return ModelShape.of(spec_of(config).model, config["vocab_size"])


def test_d12_has_the_known_size_and_flops() -> None:
    shape = ModelShape.of(ModelSpec(depth=12), 32768)
    assert shape.parameter_counts().total == 286_261_730
    assert shape.flops_per_token == 887_098_032


@everywhere
def test_shape_and_counts_are_nanochats(config: dict[str, Any]) -> None:
    shape, recorded = shape_of(config), config["param_counts"]
    counts = shape.parameter_counts()
    for key in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
        assert getattr(shape, key) == config["model_config"][key]
    assert list(shape.windows) == [left for left, _ in config["window_sizes"]]
    assert list(shape.value_embed_layers) == config["value_embeds_layers"]
    assert counts.matrices == recorded["transformer_matrices"]
    for key in ("wte", "value_embeds", "lm_head", "scalars", "total"):
        assert getattr(counts, key) == recorded[key]
    assert shape.matmul_params == config["num_matmul_params"]
    assert shape.scaling_params == config["num_scaling_params"]
    assert shape.flops_per_token == config["flops_per_token"]
    assert target_tokens(shape) == config["target_tokens"]


@everywhere
def test_effective_rates_and_decay_are_nanochats(config: dict[str, Any]) -> None:
    spec, shape = spec_of(config), shape_of(config)
    assert batch_lr_scale(config["total_batch_size"]) == config["batch_lr_scale"]
    assert scaled_weight_decay(spec, shape) == config["weight_decay_scaled"]
    groups = param_groups(spec, shape)
    assert len(groups) == len(config["groups"])
    for group, recorded in zip(groups, config["groups"], strict=True):
        assert group.kind == recorded["kind"]
        assert group.parameters[0] == recorded["first_param"]
        assert len(group.parameters) == recorded["n_params"]
        assert list(group.shape) == recorded["shape"]
        assert group.lr == recorded["initial_lr"]
        assert group.weight_decay == recorded["weight_decay"]
        if recorded["betas"] is not None:
            assert list(group.betas) == recorded["betas"]


@everywhere
def test_schedule_is_nanochats_at_every_recorded_step(config: dict[str, Any]) -> None:
    spec, shape = spec_of(config), shape_of(config)
    schedule = Schedule(spec.schedule, param_groups(spec, shape))
    for recorded in config["schedule"]:
        values = schedule.at(recorded["step"])
        assert values.lr_multiplier == recorded["lrm"]
        assert values.momentum == recorded["momentum"]
        assert values.weight_decay == recorded["weight_decay"]


@everywhere
def test_defaults_of_minus_one_derive_as_in_nanochat(config: dict[str, Any]) -> None:
    spec, shape, args = spec_of(config), shape_of(config), config["args"]
    if args["total_batch_size"] == -1:
        batch = auto_total_batch_size(spec.model, config["vocab_size"])
        assert batch == config["total_batch_size"]
    if args["num_iterations"] == -1:
        assert iterations_for(shape, config["total_batch_size"]) == config["num_iterations"]


def test_target_flops_give_the_horizon_when_asked() -> None:
    shape = ModelShape.of(ModelSpec(depth=12), 32768)
    steps = iterations_for(shape, 65_536, target_flops=887_098_032 * 65_536 * 41.4)
    assert steps == 41


def test_recorded_run_uses_the_rates_that_its_flags_derive() -> None:
    config = json.loads((RECORDED / "config.json").read_text())
    config |= {"total_batch_size": 2048, "num_iterations": 30}
    spec = spec_of({**config, "args": config["cli_args"]})
    shape = ModelShape.of(spec.model, config["model_config"]["vocab_size"])
    groups = param_groups(spec, shape)
    layout = json.loads((RECORDED / "optim_layout.json").read_text())["groups"]
    for group, recorded, members in zip(groups, config["param_groups"], layout, strict=True):
        assert group.lr == recorded["initial_lr"]
        assert group.weight_decay == recorded["weight_decay"]
        assert list(group.parameters) == [member["name"] for member in members["members"]]


def test_every_parameter_is_in_exactly_one_group_with_grouped_queries_too() -> None:
    spec = JobSpec.parse(
        {"model": {"depth": 3, "aspect_ratio": 64, "head_dim": 32, "n_kv_head": 2}}
    )
    shape = ModelShape.of(spec.model, 1000)
    grouped = [name for group in param_groups(spec, shape) for name in group.parameters]
    assert sorted(grouped) == sorted(shape.named_shapes())
    assert shape.padded_vocab_size == 1024
    total = sum(math.prod(size) for size in shape.named_shapes().values())
    assert shape.parameter_counts().total == total
    assert shape.parameter_counts().scalars == 2 * 3 + SCALARS
