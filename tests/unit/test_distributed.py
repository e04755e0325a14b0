"""What two real ranks over gloo agree on."""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainer.distributed import OWN_MESSAGE_BYTES, World

RANKS = 2
JOIN_S = 120.0


def tensors(rank: int) -> list[torch.Tensor]:
    """Of each way to travel: large, large but strided, small, small in another dtype, a scalar."""
    generator = torch.Generator().manual_seed(rank)
    large = torch.randn(OWN_MESSAGE_BYTES // 4 // 64, 64, generator=generator)
    small = torch.randn(3, 5, generator=generator)
    return [large, (2 * large).mT, small, small.to(torch.bfloat16), torch.tensor(float(rank))]


def rank_of_two(folder: str, rank: int) -> None:
    """Exits with 0 where the sums are right, and the same object holds them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        own = tensors(rank)
        World(rank, RANKS, rank).sum_(own)
        expected = [a + b for a, b in zip(tensors(0), tensors(1), strict=True)]
        right = all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    finally:
        dist.destroy_process_group()
    sys.exit(not right)


def test_tensors_of_every_kind_are_summed_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=rank_of_two, args=(str(tmp_path), n)) for n in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(JOIN_S)
    assert [process.exitcode for process in ranks] == [0, 0]


def test_one_rank_alone_changes_nothing() -> None:
    own = tensors(0)
    World().sum_(own)
    assert all(torch.equal(a, b) for a, b in zip(own, tensors(0), strict=True))
