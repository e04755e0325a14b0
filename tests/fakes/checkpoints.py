"""Checkpoints with tiny parts, for tests of the repository."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from trainer.distributed import World
from trainer.storage.layout import part_name
from trainer.storage.manifest import CheckpointRef, Manifest, Part
from trainer.storage.repository import CheckpointRepository

JOB = "JOB"
MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class StillOptimizer:
    """What a snapshot asks of an optimizer, without any state."""

    def __init__(self, world: World) -> None:
        self.owner = {"a": world.size - 1, "b": 0}

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def counters(self) -> dict[str, int]:
        return {}


def ref_to(step: int, attempt: int = 1, job_id: str = JOB) -> CheckpointRef:
    return CheckpointRef(job_id=job_id, step=step, attempt=attempt)


def manifest_for(ref: CheckpointRef, parts: list[Part], bpb: float | None = None) -> Manifest:
    return Manifest(
        job_id=ref.job_id,
        step=ref.step,
        attempt=ref.attempt,
        parts=tuple(parts),
        state={"position": {"epoch": 0}, "rate": 0.1, "loss": [1e-300, -0.0], "note": None},
        spec_sha256="0" * 64,
        parent=None,
        identity={"data": "d"},
        versions={"torch": "2.13.0"},
        validation_bpb=bpb,
        created_at=MOMENT,
    )


def upload(
    repository: CheckpointRepository,
    folder: Path,
    step: int,
    attempt: int = 1,
    bpb: float | None = None,
) -> Manifest:
    """Upload two parts and return the manifest that would commit them."""
    ref = ref_to(step, attempt)
    parts = []
    for index in range(2):
        path = folder / f"{step}-{attempt}-{index}"
        path.write_bytes(f"step {step} attempt {attempt} part {index}".encode())
        part = Part.of_file(path, part_name(index), tensors=[f"w{index}"])
        repository.upload_part(ref, part, path)
        parts.append(part)
    return manifest_for(ref, parts, bpb)


def save(
    repository: CheckpointRepository,
    folder: Path,
    step: int,
    attempt: int = 1,
    bpb: float | None = None,
) -> CheckpointRef:
    """Upload and commit a checkpoint."""
    manifest = upload(repository, folder, step, attempt, bpb)
    repository.commit(manifest)
    return manifest.ref
