"""Which checkpoints to keep: a pure decision, then the deletions, each safe to interrupt.

Reads and deletes through a repository's store; writes nothing there but the retention in force.

Invariant: the last two current checkpoints, the latest attempt's start and whatever the caller
protects are never deleted. A manifest goes before its parts, so that no reader meets a checkpoint
with holes; what a crash leaves are parts without a manifest, swept later.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from trainer.contract.spec import CheckpointSpec
from trainer.storage import layout
from trainer.storage.manifest import CheckpointRef, ManifestError, RetentionDocument
from trainer.storage.object_store import NotFoundError
from trainer.storage.repository import CheckpointRepository, select_current

ALWAYS_KEPT = 2  # one to resume from, and one to fall back to


@dataclass(frozen=True)
class Retention:
    """What a job's spec says about keeping; keep_every_steps 0: none for their step's sake."""

    keep_last: int = 3
    keep_every_steps: int = 0
    keep_best: bool = True

    @classmethod
    def of(cls, told: CheckpointSpec | RetentionDocument) -> Self:
        """What a spec, or what was put in force after it, says."""
        return cls(told.keep_last, told.keep_every_steps, told.keep_best)


def put_in_force(repository: CheckpointRepository, retention: Retention) -> None:
    """Let a job keep other checkpoints than its spec says. Safe to repeat."""
    key = layout.retention_key(repository.job_id)
    repository.store.put(key, RetentionDocument(**asdict(retention)).encode())


def retention_in_force(repository: CheckpointRepository, asked: Retention) -> Retention:
    """What a job keeps now; asked: by its spec. DocumentError where it can't be read."""
    key = layout.retention_key(repository.job_id)
    try:
        found = RetentionDocument.decode(repository.store.get(key), key)
    except NotFoundError:
        return asked
    return Retention.of(found)


@dataclass(frozen=True)
class Pruned:
    """What was deleted, newest first."""

    refs: tuple[CheckpointRef, ...]


def to_delete(
    current: Sequence[CheckpointRef],
    superseded: Sequence[CheckpointRef],
    validation_bpb: dict[CheckpointRef, float],
    retention: Retention,
    protected: Collection[CheckpointRef],
) -> list[CheckpointRef]:
    """Decide what may go. Pure.

    current is newest first. A superseded checkpoint stays until the current line has two
    checkpoints and has passed its step: until then it may be all there is to look into.
    """
    kept = set(protected)
    kept.update(current[: max(ALWAYS_KEPT, retention.keep_last)])
    if retention.keep_every_steps > 0:
        kept.update(ref for ref in current if ref.step % retention.keep_every_steps == 0)
    if retention.keep_best:
        measured = [ref for ref in current if ref in validation_bpb]
        if measured:  # of equals the newest, since current is newest first
            kept.add(min(measured, key=lambda ref: validation_bpb[ref]))
    passed_step = current[0].step if len(current) >= ALWAYS_KEPT else -1
    candidates = [*current, *(ref for ref in superseded if ref.step <= passed_step)]
    doomed = [ref for ref in candidates if ref not in kept]
    return sorted(doomed, key=lambda ref: (ref.step, ref.attempt), reverse=True)


def prune(
    repository: CheckpointRepository,
    retention: Retention,
    protected: Collection[CheckpointRef] = (),
) -> Pruned:
    """Delete what retention allows. Safe to interrupt and repeat, by any number of callers.

    What other jobs hold is kept too. protected: what else must stay, such as what is being read.
    """
    committed = repository.committed()
    claims = repository.claims()
    current = select_current(committed, claims)
    counted = set(current)
    superseded = [ref for ref in committed if ref not in counted]
    bpb = _validation_bpb(repository, current) if retention.keep_best else {}
    starts = {claims[-1].start} if claims and claims[-1].start else set()
    kept = starts | set(protected) | repository.held()
    doomed = to_delete(current, superseded, bpb, retention, kept)
    return Pruned(tuple(ref for ref in doomed if delete_checkpoint(repository, ref)))


def delete_checkpoint(repository: CheckpointRepository, ref: CheckpointRef) -> bool:
    """Delete one checkpoint, manifest first; who may be deleted is the caller's decision.

    False where a job took hold of it, or an attempt claimed it as its start, meanwhile: then it
    stays. Who comes after the manifest's deletion finds none, and passes over it.
    """
    store = repository.store
    key = layout.manifest_key(ref.job_id, ref.step, ref.attempt)
    try:
        manifest = store.get(key)
    except NotFoundError:
        manifest = None  # a deletion that broke off
    store.delete(key)
    files = [i.key for i in store.list(layout.checkpoint_prefix(ref.job_id, ref.step, ref.attempt))]
    claimed = ref in [claim.start for claim in repository.claims()[-1:]]
    if manifest is not None and (claimed or any(map(layout.parse_hold, files))):
        store.put(key, manifest)
        return False
    for file in files:
        store.delete(file)
    return True


def sweep_orphans(repository: CheckpointRepository, newest: CheckpointRef) -> list[CheckpointRef]:
    """Delete parts that no manifest names, and that none can once newest is committed.

    Those of an older attempt, which is stale, and of this one's earlier steps: each rank uploads
    in order, and has uploaded newest. No clock decides; a commit that finds its parts gone is
    refused, not torn.
    """
    store, held = repository.store, repository.held()
    files: dict[CheckpointRef, list[str]] = {}
    for info in store.list(layout.checkpoints_prefix(repository.job_id)):
        if named := layout.parse_checkpoint(info.key):
            ref = CheckpointRef(job_id=named.job_id, step=named.step, attempt=named.attempt)
            files.setdefault(ref, []).append(info.key)
    swept = []
    for ref, keys in files.items():
        dead = (ref.attempt, ref.step) < (newest.attempt, newest.step)
        manifest = layout.manifest_key(ref.job_id, ref.step, ref.attempt)
        # Held: its manifest may just be on its way back (delete_checkpoint). Committed since the
        # listing: looked at once more.
        if dead and ref not in held and manifest not in keys and store.head(manifest) is None:
            for key in keys:
                store.delete(key)
            swept.append(ref)
    return swept


def _validation_bpb(
    repository: CheckpointRepository, refs: Sequence[CheckpointRef]
) -> dict[CheckpointRef, float]:
    measured = {}
    for ref in refs:
        try:
            bpb = repository.manifest(ref).validation_bpb
        except (NotFoundError, ManifestError):
            continue  # gone meanwhile, or unreadable: not the best of anything
        if bpb is not None:
            measured[ref] = bpb
    return measured
