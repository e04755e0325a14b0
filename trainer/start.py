"""What an attempt starts from: chosen, verified, claimed.

Invariant: a claim names the checkpoint that was read back whole before it; what could not be read
is passed over to an older one, and said.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.train_state import TrainState
from trainer.contract.spec import JobSpec
from trainer.data.loader import START
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest
from trainer.storage.repository import CheckpointRepository, Loaded, Rejected


@dataclass(frozen=True)
class Start:
    """Verified files of a checkpoint and the state beside them, or a fresh state and no files."""

    attempt: int
    ref: CheckpointRef | None
    state: TrainState
    files: tuple[Path, ...]
    rejected: tuple[Rejected, ...]
    other_data: bool = False  # a continuation whose data is not the parent's: from its first row

    def drop_files(self) -> None:
        """Delete the local copies once they are loaded."""
        if self.files:
            shutil.rmtree(self.files[0].parent, ignore_errors=True)


def choose_start(
    repository: CheckpointRepository, document: JobDocument, folder: Path, host: str
) -> Start:
    """Take the newest loadable checkpoint of the job, else its parent's, else nothing; claim it.

    Args:
        folder: for the copies; whatever lies there is deleted.
        host: who claims.

    Raises:
        CorruptCheckpointError: there is no checkpoint of the job's own, and the parent's is bad.
        StateMisfitError: a manifest's state can't be read.
        StoreError: storage is away.
    """
    shutil.rmtree(folder, ignore_errors=True)

    def load(ref: CheckpointRef, manifest: Manifest) -> tuple[Path, ...]:
        return download(repository, ref, manifest, folder)

    found = repository.newest_loadable(load)
    if isinstance(found, Loaded):
        state = TrainState.from_dict(found.manifest.state)
        start = Start(0, found.ref, state, found.value, found.rejected)
    elif document.start is not None:
        start = replace(_from_parent(repository, document, folder), rejected=found.rejected)
    else:
        start = Start(0, None, TrainState(), (), found.rejected)
    return replace(start, attempt=repository.claim(start.ref, host).attempt)


def download(
    repository: CheckpointRepository, ref: CheckpointRef, manifest: Manifest, folder: Path
) -> tuple[Path, ...]:
    """Copy a checkpoint's parts here, each verified as it is read; CorruptCheckpointError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / part.name for part in manifest.parts)
    for part, path in zip(manifest.parts, files, strict=True):
        repository.read_part(ref, part, path)
    return files


def _from_parent(repository: CheckpointRepository, document: JobDocument, folder: Path) -> Start:
    """Weights and optimizer of another job; its position too where the rows are the same."""
    ref, binding = document.start, document.binding
    assert ref is not None
    assert binding is not None
    theirs = CheckpointRepository(repository.store, ref.job_id)
    manifest = theirs.manifest(ref)
    files = download(theirs, ref, manifest, folder)
    same_rows = (
        manifest.identity.get("data") == binding.data_sha256
        and manifest.identity.get("tokenizer") == binding.tokenizer.sha256
        and _order(theirs.document()) == _order(document)
    )
    state = TrainState.from_dict(manifest.state)
    state.tokens = 0  # counted from the job's own start
    if not same_rows:
        state.position = START
    return Start(0, ref, state, files, (), other_data=not same_rows)


def _order(document: JobDocument) -> tuple[int, int]:
    """What the sequence of rows depends on besides data and tokenizer."""
    spec = JobSpec.parse(document.spec)
    return spec.data.order_seed, spec.model.max_seq_len
