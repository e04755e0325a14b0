"""A recorded run of nanochat, trained on one worker, then on two, then on one again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.unit.test_distributed import RANKS, both, meet
from tests.unit.test_parity import GROUPS, RECORDED, SPEC, STEPS, batches, model_at, off
from trainer.checkpoint.train_state import TrainState, live_tensors, restore
from trainer.contract.schedule import Schedule
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm

FIRST, SECOND = 10, 20  # steps at which the number of workers changes
STEP = 5  # whose update is compared from the very same state


def begin(folder: Path, world: World, step: int) -> tuple[GPT, Optimizer]:
    """What a rank holds of the state that lies in the folder's files; at step 0 of a fresh one."""
    model = model_at(0)
    optimizer = Optimizer(model, GROUPS, torch.float32, world=world)
    if step:
        counters = dict.fromkeys(optimizer.counters(), step)
        files = sorted(folder.glob(f"step{step}-*"))
        restore(files, TrainState(step=step, counters=counters), model, optimizer)
    return model, optimizer


def train(
    model: GPT, optimizer: Optimizer, world: World, steps: range
) -> tuple[list[float], list[float]]:
    """Mean losses and norms of steps: each rank takes its part of the micro-steps, in order."""
    schedule = Schedule(SPEC.schedule, GROUPS)
    losses, norms = [], []
    for step in steps:
        torch.set_num_threads(1)
        micro = list(batches(step))
        share = len(micro) // world.size
        total = torch.zeros(())
        for x_BT, y_BT in micro[world.rank * share : (world.rank + 1) * share]:
            total += model.learn(x_BT, y_BT, 1.0 / len(micro)) / len(micro)
        world.sum_at_owner_(optimizer.owned(lambda parameter: parameter.grad))
        world.sum_([total])
        norms.append(clip_grad_norm(optimizer.own_parameters, world=world).item())
        losses.append(total.item())
        optimizer.apply(schedule.at(step))
        optimizer.step()
        optimizer.zero_grad()
        world.spread_(optimizer.owned(lambda parameter: parameter.data))
    return losses, norms


def leave(folder: Path, world: World, step: int, model: GPT, optimizer: Optimizer) -> None:
    """Write what the rank owns, as its share of a checkpoint."""
    live = live_tensors(model, optimizer)
    own = {
        name: tensor.contiguous()
        for name, tensor in live.items()
        if name.removeprefix("model.") in optimizer.own or name.startswith("optimizer.")
    }
    save_file(own, folder / f"step{step}-{world.rank}")


def rank_goes_on(folder: str, rank: int) -> None:
    world = meet(folder, rank)
    model, optimizer = begin(Path(folder), world, FIRST)
    losses, norms = train(model, optimizer, world, range(FIRST, SECOND))
    leave(Path(folder), world, SECOND, model, optimizer)
    save_file({"losses": torch.tensor(losses), "norms": torch.tensor(norms)}, f"{folder}/r{rank}")
    dist.destroy_process_group()


def rank_takes_one_step(folder: str, rank: int) -> None:
    world = meet(folder, rank)
    model, optimizer = begin(Path(folder), world, STEP)
    train(model, optimizer, world, range(STEP, STEP + 1))
    leave(Path(folder), world, STEP + 1, model, optimizer)
    dist.destroy_process_group()


def test_one_then_two_then_one_worker_follow_the_recorded_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = World()
    model, optimizer = begin(tmp_path, alone, 0)
    losses, norms = train(model, optimizer, alone, range(FIRST))
    leave(tmp_path, alone, FIRST, model, optimizer)
    both(rank_goes_on, tmp_path, monkeypatch)
    told = [load_file(tmp_path / f"r{rank}") for rank in range(RANKS)]
    for name in ("losses", "norms"):
        assert torch.equal(told[0][name], told[1][name]), "every rank knows the same"
    model, optimizer = begin(tmp_path, alone, SECOND)
    last_losses, last_norms = train(model, optimizer, alone, range(SECOND, len(STEPS)))
    recorded = [step["mean_loss"] for step in STEPS]
    assert [*losses, *told[0]["losses"].tolist(), *last_losses] == pytest.approx(recorded, rel=1e-4)
    recorded = [step["grad_norm"] for step in STEPS]
    assert [*norms, *told[0]["norms"].tolist(), *last_norms] == pytest.approx(recorded, rel=1e-3)
    final = load_file(RECORDED / "model_step000030.safetensors")
    assert max(off(value, final[name]) for name, value in model.state_dict().items()) < 1e-3


def test_a_step_of_two_workers_is_that_of_one_from_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = World()
    model, optimizer = begin(tmp_path, alone, 0)
    train(model, optimizer, alone, range(STEP))
    leave(tmp_path, alone, STEP, model, optimizer)
    train(model, optimizer, alone, range(STEP, STEP + 1))
    both(rank_takes_one_step, tmp_path, monkeypatch)
    shares = {}
    for rank in range(RANKS):
        shares |= load_file(tmp_path / f"step{STEP + 1}-{rank}")
    whole = live_tensors(model, optimizer)
    assert shares.keys() == whole.keys()
    assert max(off(shares[name], tensor) for name, tensor in whole.items()) < 1e-6
