"""nanochat's checkpoints as its ranks would write them, made from the recorded one, and jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fakes.attempts import Bucket
from trainer.storage.manifest import CheckpointRef, JobDocument
from trainer.storage.nanochat_files import NanochatSummary

NATIVE = Path(__file__).parents[1] / "data" / "nanochat" / "native"
# The recorded run's own model and rates.
MODEL = {"depth": 4, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": 128}
RATES = {"embedding_lr": 6.0, "unembedding_lr": 0.16, "matrix_lr": 0.4, "scalar_lr": 1.0}
# What goes on from there.
SPEC: dict[str, Any] = {
    "model": MODEL,
    "batch": {"device_batch_size": 4, "total_batch_size": 512},
    "optimizer": RATES,
    "schedule": {"num_iterations": 17, "warmup_steps": 0},
    "evaluate": {"every": 0, "tokens": 256},
    "guards": {"allow_lr_jump": True},
}


def add_from_nanochat(
    bucket: Bucket, job_id: str, summary: NanochatSummary, through: CheckpointRef | None = None
) -> None:
    """Store a job's document that starts from nanochat, or from the import of that."""
    plain = f"{job_id}PLAIN"
    bucket.add(plain, **SPEC)
    document = bucket.repository(plain).document()
    name = f"{through.job_id}@{through.step}" if through else summary.start.name
    bucket.repository(job_id).save_document(
        JobDocument(
            job_id=job_id,
            spec={**document.spec, "start": {"from": name, "init_seed": 42}},
            binding=document.binding,
            start=through,
            nanochat=summary.start,
            in_force=summary.in_force.to_dict(),
        )
    )


def shard(folder: Path, world_size: int) -> None:
    """Rewrite the optimizer file as nanochat's ranks would have: large state in slices."""
    whole = torch.load(folder / "optim_000015_rank0.pt", weights_only=True)
    for rank in range(world_size):
        state: dict[int, dict[str, Any]] = {}
        for index, entry in whole["state"].items():
            state[index] = {
                key: value
                if not isinstance(value, Tensor) or ("exp" in key and value.numel() < 1024)
                else _slice(value, rank, world_size)
                for key, value in entry.items()
            }
        groups = {"state": state, "param_groups": whole["param_groups"]}
        torch.save(groups, folder / f"optim_000015_rank{rank}.pt")


def same(one: Any, other: Any) -> bool:
    """Equal to the bit: tables of tensors and numbers, types included."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype is other.dtype and one.shape == other.shape
        return alike and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return type(one) is type(other) and bool(one == other)


def _slice(value: Tensor, rank: int, world_size: int) -> Tensor:
    share = -(-len(value) // world_size)
    padded = torch.cat((value, value.new_zeros(share * world_size - len(value), *value.shape[1:])))
    return padded[rank * share : (rank + 1) * share].clone()
