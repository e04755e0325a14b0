"""What two real ranks over gloo agree on, and what each keeps of an optimizer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.unit.test_optim import GROUPS, SCHEDULE, fill_gradients, training_model
from trainer import distributed
from trainer.checkpoint.train_state import TrainState, live_tensors, restore
from trainer.contract.outcome import Outcome
from trainer.distributed import OWN_MESSAGE_BYTES, World
from trainer.failures import outcome_of
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm

RANKS = 2
STEPS = 3
JOIN_S = 120.0
LATE_S = 1.0


def tensors(rank: int) -> list[torch.Tensor]:
    """Of each way to travel: large, large but strided, small, small in another dtype, a scalar."""
    generator = torch.Generator().manual_seed(rank)
    large = torch.randn(OWN_MESSAGE_BYTES // 4 // 64, 64, generator=generator)
    small = torch.randn(3, 5, generator=generator)
    return [large, (2 * large).mT, small, small.to(torch.bfloat16), torch.tensor(float(rank))]


def meet(folder: str, rank: int, ranks: int = RANKS, timeout_s: float = JOIN_S) -> World:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return World(rank, ranks, rank)


def rank_sums(folder: str, rank: int) -> None:
    """Exits with 0 where the sums are right, and the same object holds them."""
    world = meet(folder, rank)
    expected = [a + b for a, b in zip(tensors(0), tensors(1), strict=True)]
    owner = [n % RANKS for n in range(len(expected))]
    own = tensors(rank)
    world.sum_(own)
    right = all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    own = tensors(rank)
    world.sum_at_owner_(list(zip(own, owner, strict=True)))
    for tensor, whole, owned_by in zip(own, expected, owner, strict=True):
        right &= owned_by != rank or torch.equal(tensor, whole)
    world.spread_(list(zip(own, owner, strict=True)))
    right &= all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    dist.destroy_process_group()
    sys.exit(not right)


def steps(model: GPT, optimizer: Optimizer, world: World, seeds: tuple[int, ...]) -> list[float]:
    """Updates as the loop makes them; a seed's gradients are a rank's, sums are what counts."""
    norms = []
    named = dict(model.named_parameters())
    for step in range(STEPS):
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for seed in seeds:
            fill_gradients(model, 10 * step + seed)
            total = {name: total[name] + p.grad for name, p in named.items() if p.grad is not None}
        for name, parameter in named.items():
            parameter.grad = total[name]
        world.sum_at_owner_(optimizer.owned(lambda parameter: parameter.grad))
        norms.append(clip_grad_norm(optimizer.own_parameters, 1.0, world).item())
        optimizer.apply(SCHEDULE.at(step))
        optimizer.step()
        optimizer.zero_grad()
        world.spread_(optimizer.owned(lambda parameter: parameter.data))
    return norms


def rank_trains(folder: str, rank: int) -> None:
    """Leaves what it holds at the end in a file, with its norms."""
    world = meet(folder, rank)
    model = training_model()
    optimizer = Optimizer(model, GROUPS, torch.float32, world=world)
    norms = steps(model, optimizer, world, (rank,))
    held = {name: tensor.contiguous() for name, tensor in live_tensors(model, optimizer).items()}
    save_file(held | {"norms": torch.tensor(norms)}, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def rank_waits_for_a_late_one(folder: str, rank: int) -> None:
    """One of four comes late, each in its turn; the others wait, from whichever place."""
    world = meet(folder, rank, ranks=4)
    right = True
    for late in range(4):
        come = Path(folder, f"late{late}")
        if rank == late:
            time.sleep(LATE_S)
            come.touch()
        world.meet()
        right &= come.exists()
    dist.destroy_process_group()
    sys.exit(not right)


def rank_works_for_long(folder: str, rank: int) -> None:
    """Rank 1's own work takes longer than a collective waits."""
    world = meet(folder, rank, timeout_s=2 * LATE_S)
    distributed.SIGN_OF_LIFE_S = LATE_S / 2

    def work() -> int:
        if rank == 1:
            time.sleep(5 * LATE_S)
            Path(folder, "done").touch()
        return rank

    right = world.all_do(work) == rank and Path(folder, "done").exists()
    dist.destroy_process_group()
    sys.exit(not right)


def rank_loses_the_other(folder: str, rank: int) -> None:
    """Rank 1 goes in the middle of a sum; rank 0 exits with 0 if it knows what that means.

    Neither closes anything: gloo's threads, one of them dead, abort an orderly exit at times.
    """
    world = meet(folder, rank)
    world.share(0)
    if rank == 1:
        os._exit(0)
    try:
        world.sum_(tensors(rank))
    except RuntimeError as error:
        os._exit(outcome_of(error) is not Outcome.COLLECTIVE_FAILED)
    os._exit(1)


def both(
    what: Callable[[str, int], None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int = RANKS,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=what, args=(str(folder), n)) for n in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(JOIN_S)
    assert [process.exitcode for process in ranks] == [0] * number


def test_tensors_of_every_kind_are_summed_and_spread_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_sums, tmp_path, monkeypatch)


def test_two_ranks_with_half_the_state_each_train_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_trains, tmp_path, monkeypatch)
    model = training_model()
    optimizer = Optimizer(model, GROUPS, torch.float32)
    norms = steps(model, optimizer, World(), (0, 1))
    alone = live_tensors(model, optimizer)
    shares = [load_file(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for share in shares:
        assert share.pop("norms").tolist() == pytest.approx(norms, rel=1e-6)
    state = [{name for name in share if name.startswith("optimizer.")} for share in shares]
    assert state[0]
    assert state[1]
    assert not state[0] & state[1]
    assert state[0] | state[1] == {name for name in alone if name.startswith("optimizer.")}
    for share in shares:
        for name, tensor in share.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


def test_a_rank_of_several_loads_its_share_of_a_whole_checkpoint(tmp_path: Path) -> None:
    model = training_model()
    optimizer = Optimizer(model, GROUPS, torch.float32)
    steps(model, optimizer, World(), (0,))
    whole = {name: tensor.contiguous() for name, tensor in live_tensors(model, optimizer).items()}
    save_file(whole, tmp_path / "part")
    state = TrainState(step=STEPS, counters=optimizer.counters())
    for rank in range(RANKS):
        other = training_model()
        share = Optimizer(other, GROUPS, torch.float32, world=World(rank, RANKS, rank))
        restore([tmp_path / "part"], state, other, share)
        held = live_tensors(other, share)
        assert len(held) < len(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in held.items())


def test_a_lost_rank_is_a_failed_collective_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_loses_the_other, tmp_path, monkeypatch)


def test_all_wait_for_the_one_that_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_waits_for_a_late_one, tmp_path, monkeypatch, number=4)


def test_a_ranks_own_work_may_take_longer_than_a_collective_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_works_for_long, tmp_path, monkeypatch)


def test_an_error_of_a_ranks_own_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        World().all_do(lambda: 1 // 0)


def test_one_rank_alone_changes_nothing() -> None:
    own = tensors(0)
    World().sum_(own)
    assert all(torch.equal(a, b) for a, b in zip(own, tensors(0), strict=True))
