"""Gradients that leave for their owners during the backward pass, over two real gloo ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.unit.test_distributed import RANKS, both, meet
from trainer.contract.ownership import owners
from trainer.contract.scaling import param_groups
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World, travels_alone
from trainer.gpt import GPT
from trainer.sums import GradientSums

VOCABULARY = 4096  # times a width of 64 in fp32: tables and lm_head travel alone
SPEC = JobSpec.parse(
    {
        "model": {
            "depth": 4,
            "aspect_ratio": 16,
            "head_dim": 32,
            "max_seq_len": 16,
            "vocab_size": VOCABULARY,
        },
        "batch": {"device_batch_size": 2, "total_batch_size": 128},
        "evaluate": {"tokens": 16},
    }
)
MICRO_STEPS = 2


def parts() -> tuple[GPT, list[tuple[nn.Parameter, int]]]:
    shape = ModelShape.of(SPEC.model, VOCABULARY)
    model = GPT(shape, torch.float32, torch.float32)
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # zeros in the first weights would stop gradients
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    owner = owners(param_groups(SPEC, shape), shape.named_shapes(), RANKS)
    return model, [(p, owner[name]) for name, p in model.named_parameters()]


def learn(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, VOCABULARY, (2, 17), generator=generator)
    model.learn(ids_BT[:, :-1], ids_BT[:, 1:])


def seeds(rank: int, step: int) -> Iterator[int]:
    return (1000 * step + 10 * rank + micro for micro in range(MICRO_STEPS))


def rank_sums_while_it_learns(folder: str, rank: int) -> None:
    """Exits with 0 where every step's sums are those of all micro-steps of all ranks."""
    world = meet(folder, rank)
    model, owned = parts()
    sums = GradientSums(world, owned)
    model.tell_added(sums.added)
    alone = sum(travels_alone(parameter) for parameter, _ in owned)
    right = alone == 4  # wte, two tables of value embeddings, lm_head
    for step in range(3):
        for micro, seed in enumerate(seeds(rank, step)):
            if micro == MICRO_STEPS - 1:
                sums.last()
            learn(model, seed)
        right &= sums.finish() == (alone if step else 0)  # the first step finds the order
        plain, _ = parts()
        for each in range(RANKS):
            for seed in seeds(each, step):
                learn(plain, seed)
        for (ours, owner), theirs in zip(owned, plain.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            if owner == rank:
                right &= torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
            ours.grad.zero_()
    dist.destroy_process_group()
    sys.exit(not right)


def rank_comes_by_them_otherwise(folder: str, rank: int) -> None:
    """Rank 1 has its gradients in the opposite order: fewer leave early, the sums are the same."""
    world = meet(folder, rank)
    owned = [(nn.Parameter(torch.zeros(1 << 18)), n % RANKS) for n in range(4)]
    sums = GradientSums(world, owned)
    right = True
    for step in range(2):
        sums.last()
        for n in range(4) if rank == 0 else reversed(range(4)):
            owned[n][0].grad = torch.full((1 << 18,), float(n + rank))
            sums.added(owned[n][0])
        early = sums.finish()
        right &= early == (4 if step else 0)
        for n, (parameter, owner) in enumerate(owned):
            assert parameter.grad is not None
            right &= owner != rank or bool((parameter.grad == 2 * n + 1).all())
    dist.destroy_process_group()
    sys.exit(not right)


def test_gradients_leave_in_the_last_micro_step_and_are_summed_at_their_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rank_sums_while_it_learns, tmp_path, monkeypatch)


def test_all_ranks_send_in_rank_0s_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(rank_comes_by_them_otherwise, tmp_path, monkeypatch)


def test_each_gradient_is_told_of_once_a_micro_step() -> None:
    model, owned = parts()
    told: list[int] = []
    model.tell_added(lambda parameter: told.append(id(parameter)))
    learn(model, 0)
    assert sorted(told) == sorted(id(parameter) for parameter, _ in owned)
    assert told[0] == id(model.lm_head.weight)
    assert told[-1] == id(model.transformer.wte.weight)


def test_one_rank_alone_sends_nothing() -> None:
    model, owned = parts()
    sums = GradientSums(World(), owned)
    model.tell_added(sums.added)
    sums.last()
    learn(model, 0)
    assert sums.finish() == 0
