"""What an attempt starts from: chosen, verified, claimed, loaded.

Invariant: a claim names the checkpoint that was read back whole before it; what could not be read
is passed over to an older one, and said.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from trainer.checkpoint.nanochat import read_nanochat, write_tensors
from trainer.checkpoint.train_state import StateMisfitError, TrainState, restore
from trainer.contract.spec import JobSpec
from trainer.data.loader import START, Position
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer
from trainer.storage.documents import sha256_hex
from trainer.storage.layout import part_name
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest, Part
from trainer.storage.nanochat_files import NanochatCheckpointError, NanochatFileCorruptError
from trainer.storage.object_store import (
    NotFoundError,
    ObjectStore,
    StoreUnavailableError,
    open_store,
)
from trainer.storage.repository import (
    CheckpointRepository,
    CorruptCheckpointError,
    Loaded,
    Rejected,
)
from trainer.storage.retention import ALWAYS_KEPT
from trainer.storage.retry import patiently
from trainer.versions import running_versions

DOWNLOADS = 4  # parts at once
# Of retries, while storage is away when an attempt begins: so long that no number of such attempts
# spends the budget of restarts, for one that trains goes on without it.
START_BUDGET_S = 600.0


@dataclass(frozen=True)
class Start:
    """A checkpoint that was read back whole, or a fresh state and no manifest."""

    attempt: int
    ref: CheckpointRef | None
    state: TrainState
    manifest: Manifest | None
    rejected: tuple[Rejected, ...]
    too_large: int | None = None  # rows a micro-step that an attempt ran out of memory with
    other_data: bool = False  # a continuation whose data is not the parent's: from its first row


def choose_start(
    repository: CheckpointRepository, document: JobDocument, folder: Path, host: str
) -> Start:
    """Take the newest loadable checkpoint of the job, else its parent's, else nothing; claim it.

    "Else" is for a job without checkpoints, or with one that is damaged; see below.

    Args:
        folder: for the verified copies; whatever lies there is deleted.
        host: who claims.

    Raises:
        CorruptCheckpointError: there is no checkpoint of the job's own, and the parent's is bad.
        StateMisfitError: a manifest's state can't be read, or none of several checkpoints.
        StoreError: storage is away.
    """
    shutil.rmtree(folder, ignore_errors=True)

    def load(ref: CheckpointRef, manifest: Manifest) -> tuple[Path, ...]:
        return download(repository, ref, manifest, folder)

    found = repository.newest_loadable(load)
    if isinstance(found, Loaded):
        state = TrainState.from_dict(found.manifest.state)
        start = Start(0, found.ref, state, found.manifest, found.rejected)
    elif len(found.rejected) >= ALWAYS_KEPT:
        # No accident of one file. Training from the start would supersede, then delete, them all.
        raise StateMisfitError(
            f"none of {len(found.rejected)} checkpoints can be read; the newest: "
            f"{found.rejected[0].reason}"
        )
    elif document.start is not None:
        start = replace(_from_parent(repository, document, folder), rejected=found.rejected)
    elif document.nanochat is not None:
        return import_nanochat(repository, document, folder, host)
    else:
        start = Start(0, None, TrainState(), None, found.rejected)
    return replace(start, attempt=repository.claim(start.ref, host).attempt)


def download(
    repository: CheckpointRepository, ref: CheckpointRef, manifest: Manifest, folder: Path
) -> tuple[Path, ...]:
    """Copy a checkpoint's parts here, each verified as it is read; CorruptCheckpointError.

    What is wrong is read once more: damage on the way here, or in memory, is none of the store's.
    """

    def read(part: Part, file: Path) -> None:
        try:
            repository.read_part(ref, part, file)
        except CorruptCheckpointError:
            repository.read_part(ref, part, file)

    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / part.name for part in manifest.parts)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(read, manifest.parts, files):
            pass
    return files


def load(
    start: Start, store: ObjectStore, copies: Path, model: GPT, optimizer: Optimizer, world: World
) -> None:
    """Load what was chosen. A box's first rank fetches the parts, its ranks read them."""
    if start.manifest is None or start.ref is None:
        return
    repository = CheckpointRepository(store, start.ref.job_id)
    fetch = partial(_fetch, repository, start.ref, start.manifest, copies)
    # On the first box choosing has copied them.
    fetches = world.local_rank == 0 and not world.is_first
    world.all_do(lambda: fetches and patiently(fetch, START_BUDGET_S))
    restore([copies / part.name for part in start.manifest.parts], start.state, model, optimizer)
    world.meet()  # every rank has read them
    if world.local_rank == 0:
        shutil.rmtree(copies, ignore_errors=True)


def _fetch(
    repository: CheckpointRepository, ref: CheckpointRef, manifest: Manifest, copies: Path
) -> None:
    """The parts to another box than rank 0's, which has just read them whole."""
    try:
        download(repository, ref, manifest, copies)
    except CorruptCheckpointError as error:
        raise StoreUnavailableError(f"damaged on its way to this box: {error}") from error


def _from_parent(repository: CheckpointRepository, document: JobDocument, folder: Path) -> Start:
    """Weights and optimizer of another job; its position too where the rows are the same."""
    ref, binding = document.start, document.binding
    assert ref is not None
    assert binding is not None
    theirs = CheckpointRepository(repository.store, ref.job_id)
    manifest = theirs.manifest(ref)
    download(theirs, ref, manifest, folder)
    same_rows = (
        manifest.identity.get("data") == binding.data_sha256
        and manifest.identity.get("tokenizer") == binding.tokenizer.sha256
        and _order(theirs.document()) == _order(document)
    )
    state = TrainState.from_dict(manifest.state)
    state.tokens = 0  # counted from the job's own start
    if not same_rows:
        state.position = START
    return Start(0, ref, state, manifest, (), other_data=not same_rows)


def import_nanochat(
    repository: CheckpointRepository, document: JobDocument, folder: Path, host: str
) -> Start:
    """Make nanochat's checkpoint the job's own first one, and start from that.

    Raises:
        StateMisfitError: a file is missing, torn, or not what it was at submission.
    """
    source, binding = document.nanochat, document.binding
    assert source is not None
    assert binding is not None
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(source.uri)
    try:
        for file in source.files:
            info = store.head(file.name)
            if info is None or info.size_bytes != file.size_bytes:
                found = "is gone" if info is None else f"has {info.size_bytes} bytes now"
                raise NanochatFileCorruptError(f"{file.name} {found}")
            store.get_file(file.name, folder / file.name)
        read = read_nanochat(folder, source.step)
    except (NanochatCheckpointError, NotFoundError) as error:
        raise StateMisfitError(f"{source.name}: {error}") from error
    attempt = repository.claim(None, host).attempt
    ref = CheckpointRef(job_id=document.job_id, step=source.step, attempt=attempt)
    state = TrainState(
        step=source.step,
        position=Position(epoch=source.epoch),
        in_force=read.in_force,
        counters=read.counters,
    )
    name = part_name(0)
    part = Part.of_file(folder / name, name, write_tensors(read, folder / name))
    repository.upload_part(ref, part, folder / name)
    manifest = Manifest(
        job_id=ref.job_id,
        step=ref.step,
        attempt=attempt,
        parts=(part,),
        state={**state.to_dict(), "initial_lr": read.initial_lr},
        spec_sha256=sha256_hex(document.encode()),
        identity={"data": binding.data_sha256, "tokenizer": binding.tokenizer.sha256},
        versions={**running_versions(), "imported_from": source.name},
        created_at=datetime.now(UTC),
    )
    repository.commit(manifest)
    return Start(attempt, ref, state, manifest, ())


def _order(document: JobDocument) -> tuple[int, int]:
    """What the sequence of rows depends on besides data and tokenizer."""
    spec = JobSpec.parse(document.spec)
    return spec.data.order_seed, spec.model.max_seq_len
