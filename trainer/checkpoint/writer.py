"""The background writer: snapshots become committed checkpoints while training goes on.

One thread, at most two snapshots alive: the one being written and the next. A newer snapshot takes
the place of one that still waits, so a slow store costs checkpoints, never steps.

Invariant: nothing here raises into the loop; trouble with the store is told and tried again, and a
stale writer is told by `stale`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save_file

from trainer.checkpoint.train_state import Snapshot
from trainer.events import CheckpointCommitted, Reporter, Warned
from trainer.storage.manifest import CheckpointRef, Manifest, Part
from trainer.storage.object_store import StoreError
from trainer.storage.repository import CheckpointRepository, StaleWriterError
from trainer.storage.retention import Retention, prune, sweep_orphans

PART_BYTES = 1 << 30  # a part of about this size uploads and verifies in parallel with others
ORPHAN_GRACE_S = 24 * 3600.0  # far longer than any upload
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Provenance:
    """What every manifest of an attempt says alike."""

    attempt: int
    spec_sha256: str
    parent: CheckpointRef | None
    identity: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Order:
    snapshot: Snapshot
    stall_s: float
    # Taken once: a commit whose answer was lost is repeated with the very same manifest.
    created_at: datetime


class CheckpointWriter:
    """Hand it snapshots with `save`; `drain` waits for what was handed in."""

    def __init__(
        self,
        repository: CheckpointRepository,
        provenance: Provenance,
        retention: Retention,
        scratch: Path,
        reporter: Reporter,
    ) -> None:
        self._repository = repository
        self._provenance = provenance
        self._retention = retention
        self._scratch = scratch
        self._reporter = reporter
        self._changed = threading.Condition()
        self._waiting: _Order | None = None
        self._busy = False
        self._closed = False
        self._stale = False
        self._committed: CheckpointRef | None = None
        self._swept = False  # once an attempt: what earlier ones left when they were killed
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def stale(self) -> bool:
        """Whether a newer attempt holds the claim: training on would be for nothing."""
        return self._stale

    @property
    def committed(self) -> CheckpointRef | None:
        """The newest checkpoint that this writer has committed."""
        return self._committed

    def save(self, snapshot: Snapshot, stall_s: float) -> None:
        """Take a snapshot over; returns at once. stall_s: how long taking it stopped training."""
        with self._changed:
            self._waiting = _Order(snapshot, stall_s, datetime.now(UTC))
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits and nothing is written; False where that took too long."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._stale or (self._waiting is None and not self._busy), timeout_s
            )

    def close(self) -> None:
        """End the thread; what is not committed by now is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                self._write(order)
            except StaleWriterError:
                self._stale = True
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _next(self) -> _Order | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            order, self._waiting = self._waiting, None
            self._busy = order is not None and not self._closed
            return order if self._busy else None

    def _write(self, order: _Order) -> None:
        """Write until committed, superseded by a newer snapshot, or closed."""
        tries = 0
        while True:
            try:
                self._commit(order)
                return
            except StaleWriterError:
                raise
            except Exception as error:
                # Store, scratch disk, a claim that can't be read: this thread must outlive them
                # all, or later checkpoints would silently not be.
                if tries == 0:
                    message = f"checkpoint at step {order.snapshot.step}: {error}; trying again"
                    self._reporter.event(Warned(order.snapshot.step, message))
                wait_s = BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                tries += 1
                with self._changed:
                    gone = self._changed.wait_for(
                        lambda: self._closed or self._waiting is not None, wait_s
                    )
                if gone:
                    return

    def _commit(self, order: _Order) -> None:
        began = time.monotonic()
        snapshot, about = order.snapshot, self._provenance
        ref = CheckpointRef(
            job_id=self._repository.job_id, step=snapshot.step, attempt=about.attempt
        )
        folder = self._scratch / f"{ref.job_id}-{ref.attempt}-{ref.step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            parts = []
            for number, names in enumerate(_divide(snapshot)):
                name = f"part-{number:05d}.safetensors"
                save_file({key: snapshot.tensors[key] for key in names}, folder / name)
                part = Part.of_file(folder / name, name, names)
                self._repository.upload_part(ref, part, folder / name)
                parts.append(part)
            manifest = Manifest(
                job_id=ref.job_id,
                step=ref.step,
                attempt=ref.attempt,
                parts=tuple(parts),
                state=snapshot.state,
                spec_sha256=about.spec_sha256,
                parent=about.parent,
                identity=about.identity,
                versions=about.versions,
                validation_bpb=snapshot.validation_bpb,
                created_at=order.created_at,
            )
            self._repository.commit(manifest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._committed = ref
        self._reporter.event(
            CheckpointCommitted(ref, manifest.size_bytes, time.monotonic() - began, order.stall_s)
        )
        self._prune(ref)

    def _prune(self, newest: CheckpointRef) -> None:
        try:
            prune(self._repository, self._retention)
            if not self._swept:
                sweep_orphans(self._repository, ORPHAN_GRACE_S, datetime.now(UTC))
                self._swept = True
        except StoreError as error:
            # Clean-up trouble costs space, not steps; the next checkpoint prunes again.
            self._reporter.event(Warned(newest.step, f"old checkpoints stay for now: {error}"))


def _divide(snapshot: Snapshot) -> Iterator[list[str]]:
    """Names of tensors for each part, in order of name, each part about PART_BYTES."""
    names: list[str] = []
    size = 0
    for name in sorted(snapshot.tensors):
        if names and size + snapshot.tensors[name].nbytes > PART_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += snapshot.tensors[name].nbytes
    yield names
