"""Against a recorded run of nanochat: losses, gradients, weights, logits, tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.fakes.nanochat import MODEL, RATES, shard
from trainer.checkpoint.nanochat import NanochatCheckpoint, read_nanochat
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm
from trainer.sample import generate
from trainer.storage.nanochat_files import (
    NanochatFileCorruptError,
    NanochatFileMissingError,
    NanochatMisfitError,
)

RECORDED = Path(__file__).parents[1] / "data" / "nanochat"
SPEC = JobSpec.parse(
    {
        "model": MODEL,
        "batch": {"device_batch_size": 4, "total_batch_size": 2048},
        "optimizer": RATES,
        "schedule": {"num_iterations": 30, "warmup_steps": 200},
    }
)
SHAPE = ModelShape.of(SPEC.model, 768)
GROUPS = param_groups(SPEC, SHAPE)
STEPS: list[dict[str, Any]] = json.loads((RECORDED / "losses.json").read_text())["steps"]
SAMPLES = json.loads((RECORDED / "generate_step30.json").read_text())["samples"]


def model_with(weights: dict[str, Tensor]) -> GPT:
    model = GPT(SHAPE, torch.float32, torch.float32)
    model.load_state_dict(weights)
    return model


def model_at(step: int) -> GPT:
    return model_with(load_file(RECORDED / f"model_step{step:06d}.safetensors"))


def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = load_file(RECORDED / "batches.safetensors")
    return zip(data["x"][step], data["y"][step], strict=True)


def backward(model: GPT, step: int) -> list[float]:
    losses = []
    for x_BT, y_BT in batches(step):
        losses.append(model.learn(x_BT, y_BT, 0.25).item())
    return losses


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The recording used one thread, and a second is slower at this size when cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def native() -> NanochatCheckpoint:
    return read_nanochat(RECORDED / "native", 15)


def test_thirty_steps_follow_the_recorded_losses_and_norms() -> None:
    model = model_at(0)
    optimizer = Optimizer(model, GROUPS, torch.float32)
    schedule = Schedule(SPEC.schedule, GROUPS)
    for recorded in STEPS:
        losses = backward(model, recorded["step"])
        norm = clip_grad_norm(model.parameters()).item()
        assert losses == pytest.approx(recorded["micro_losses"], rel=1e-4)
        assert norm == pytest.approx(recorded["grad_norm"], rel=1e-3)
        optimizer.apply(schedule.at(recorded["step"]))
        optimizer.step()
        optimizer.zero_grad()
    final = load_file(RECORDED / "model_step000030.safetensors")
    assert max(off(value, final[name]) for name, value in model.state_dict().items()) < 1e-3


def test_gradients_of_step_15_are_the_recorded_ones(native: NanochatCheckpoint) -> None:
    model = model_with(native.weights)
    backward(model, 15)
    recorded = load_file(RECORDED / "grads_step000015.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert off(parameter.grad, recorded[name]) < 1e-5, name


def test_weights_one_step_after_a_native_checkpoint_are_the_recorded_ones(
    native: NanochatCheckpoint,
) -> None:
    model = model_with(native.weights)
    optimizer = Optimizer(model, GROUPS, torch.float32)
    optimizer.load_state_tensors(native.optimizer_state)
    optimizer.load_counters(native.counters)
    backward(model, 15)
    optimizer.apply(Schedule(SPEC.schedule, GROUPS).at(15))
    optimizer.step()
    recorded = load_file(RECORDED / "model_step000016.safetensors")
    for name, value in model.state_dict().items():
        assert off(value, recorded[name]) < 1e-5, name


def test_logits_and_token_losses_are_the_recorded_ones(native: NanochatCheckpoint) -> None:
    recorded = load_file(RECORDED / "logits.safetensors")
    ids_BT = recorded["input_ids"]
    with torch.no_grad():
        for step, model in ((15, model_with(native.weights)), (30, model_at(30))):
            logits = model.logits(ids_BT)[:, -32:]
            assert off(logits, recorded[f"logits_step{step}_last32"]) < 1e-5
        losses_T = recorded["token_losses_step15"]
        targets_BT = next(
            y_BT[row : row + 1]
            for step in range(30)
            for x_BT, y_BT in batches(step)
            for row in range(len(x_BT))
            if torch.equal(x_BT[row : row + 1], ids_BT)
        )
        actual_BT = model_with(native.weights).token_losses(ids_BT, targets_BT)
        assert off(actual_BT[0], losses_T) < 1e-5


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["prompt"])
def test_greedy_tokens_are_the_recorded_ones(sample: dict[str, Any]) -> None:
    model = model_at(30)
    expected = sample["naive_greedy_new"]
    tokens = generate(
        model.logits, sample["prompt_ids"], len(expected), context_tokens=SHAPE.sequence_len
    )
    assert list(tokens) == expected


def test_native_checkpoint_gives_the_values_in_force_from_its_optimizer_state(
    native: NanochatCheckpoint,
) -> None:
    expected = Schedule(SPEC.schedule, GROUPS).at(14)
    assert native.in_force.step == 14
    assert native.in_force.lr_multiplier == pytest.approx(expected.lr_multiplier, rel=1e-12)
    assert native.in_force.momentum == pytest.approx(expected.momentum, rel=1e-12)
    for name, values in expected.groups.items():
        assert native.in_force.groups[name].lr == pytest.approx(values.lr, rel=1e-12)
        assert native.in_force.groups[name].weight_decay == pytest.approx(values.weight_decay)
    assert set(native.counters.values()) == {15}
    assert native.shape == SHAPE


def copy_of(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in (RECORDED / "native").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_sharded_over_ranks_is_merged(
    native: NanochatCheckpoint, tmp_path: Path, world_size: int
) -> None:
    folder = copy_of(tmp_path / "sharded")
    shard(folder, world_size)
    merged = read_nanochat(folder, 15).optimizer_state
    assert merged.keys() == native.optimizer_state.keys()
    for name, value in native.optimizer_state.items():
        assert torch.equal(merged[name], value), name


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_file_is_refused(tmp_path: Path, rank: int) -> None:
    folder = copy_of(tmp_path / "sharded")
    shard(folder, 3)
    (folder / f"optim_000015_rank{rank}.pt").unlink()
    with pytest.raises((NanochatFileMissingError, NanochatMisfitError), match="missing"):
        read_nanochat(folder, 15)


@pytest.mark.parametrize("name", ["meta_000015.json", "model_000015.pt", "optim_000015_rank0.pt"])
def test_missing_and_cut_off_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = copy_of(tmp_path / "broken")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(NanochatFileCorruptError, match=name):
        read_nanochat(folder, 15)
    (folder / name).unlink()
    with pytest.raises(NanochatFileMissingError, match=name):
        read_nanochat(folder, 15)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "other")
    meta = json.loads((folder / "meta_000015.json").read_text())
    meta["model_config"]["n_layer"] = 6
    (folder / "meta_000015.json").write_text(json.dumps(meta))
    with pytest.raises(NanochatMisfitError, match="differ"):
        read_nanochat(folder, 15)
