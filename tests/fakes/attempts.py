"""Whole attempts in this process: a job's document in a folder, run to the end or to a stop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from tests.fakes.control_plane import TINY, changed
from tests.fakes.corpus import write_corpus
from tests.fakes.reporter import RecordingReporter
from trainer.attempt import AttemptContext, run_attempt
from trainer.contract.outcome import AttemptResult
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.events import Directive
from trainer.storage.binding import bind
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest
from trainer.storage.object_store import open_store
from trainer.storage.repository import CheckpointRepository

LINE = "The quick brown fox jumps over the lazy dog, again and again. "


@dataclass(frozen=True)
class Bucket:
    """Jobs in a folder."""

    folder: Path

    @property
    def uri(self) -> str:
        return f"file:{self.folder / 'bucket'}"

    def repository(self, job_id: str) -> CheckpointRepository:
        return CheckpointRepository(open_store(self.uri), job_id)

    def add(self, job_id: str, start: CheckpointRef | None = None, **sections: Any) -> JobSpec:
        """Store a job's document, as the service does at submission."""
        began = {"start": {"from": f"{start.job_id}@{start.step}"}} if start else {}
        spec = JobSpec.parse(changed(TINY, **began, **sections))
        binding = bind(spec.data.source, spec.data.tokenizer, spec.data.validation)
        in_force: Any = None
        if start is not None:
            in_force = self.repository(start.job_id).manifest(start).state["in_force"]
        document = JobDocument(
            job_id=job_id, spec=spec.to_dict(), binding=binding, start=start, in_force=in_force
        )
        self.repository(job_id).save_document(document)
        return spec

    def run(
        self,
        job_id: str,
        stop_at: int | None = None,
        world: World | None = None,
        reporter: RecordingReporter | None = None,
        **facts: Any,
    ) -> tuple[AttemptResult, RecordingReporter]:
        """One attempt; stop_at: the service asks for a stop after that step."""
        directives = {} if stop_at is None else {stop_at: Directive.STOP}
        reporter = reporter or RecordingReporter(directives)
        context = AttemptContext(
            job_id=job_id,
            storage_uri=self.uri,
            cache_dir=str(self.folder / "cache"),
            host="here",
            threads=1,  # quickest for a model so small
            reporter=reporter,
            **facts,
        )
        return run_attempt(context, world or World()), reporter

    def checkpoint(self, job_id: str, step: int) -> tuple[Manifest, dict[str, Tensor]]:
        """A current checkpoint, whole."""
        repository = self.repository(job_id)
        (ref,) = [ref for ref in repository.current() if ref.step == step]
        manifest = repository.manifest(ref)
        tensors: dict[str, Tensor] = {}
        for part in manifest.parts:
            tensors.update(load(b"".join(repository.open_part(ref, part))))
        return manifest, tensors

    def part_file(self, job_id: str, ref: CheckpointRef) -> Path:
        """Where the first part of a checkpoint lies."""
        folder = f"jobs/{job_id}/checkpoints/{ref.step:010d}/{ref.attempt}"
        return self.folder / "bucket" / folder / "part-00000-00000.safetensors"


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """What an attempt sets for its process is put back."""
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    environment = dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_num_threads(threads)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def small_corpus(folder: Path) -> dict[str, Any]:
    """Data with an epoch of between two and three steps of TINY."""
    rows = [f"{n}: {LINE * 4}" for n in range(3)]
    write_corpus(folder, [[rows[:2], rows[:1]], [rows[:2]], [rows]])
    return {"source": f"file:{folder}"}


def ref_of(bucket: Bucket, job_id: str, step: int) -> CheckpointRef:
    return bucket.checkpoint(job_id, step)[0].ref
