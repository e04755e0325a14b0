"""The background writer: snapshots become committed checkpoints while training goes on.

Two threads a rank. One brings snapshots to this box's disk, which frees their memory; the other
brings what is on disk to the store, and on rank 0 commits once every rank's share is there. Rank 0
says at each snapshot which steps are still wanted, so that all ranks upload the same ones.

Invariant: nothing here raises into the loop. Trouble with disk or store is told once and tried
again; a slow store costs checkpoints, never steps and never the newest one, which stays on disk;
a stale writer is told by `stale`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from trainer.checkpoint.snapshot import Snapshot, Snapshots
from trainer.checkpoint.spool import Spool, push
from trainer.distributed import World
from trainer.events import CheckpointCommitted, Reporter, Warned
from trainer.storage.documents import DocumentError
from trainer.storage.manifest import CheckpointRef, Manifest, Part, Share
from trainer.storage.object_store import StoreError
from trainer.storage.repository import (
    CheckpointRepository,
    ShareMissingError,
    StaleWriterError,
)
from trainer.storage.retention import Retention, prune, retention_in_force, sweep_orphans
from trainer.storage.retry import pauses

T = TypeVar("T")

SHARE_POLL_S = 0.25  # while another rank still uploads
NOTHING = -1  # a step before all steps
NICE = 10  # of the writer's threads: where cores are short, training has them first


@dataclass(frozen=True)
class Provenance:
    """What every manifest of an attempt says alike."""

    attempt: int
    spec_sha256: str
    parent: CheckpointRef | None
    identity: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Upcoming:
    """Rank 0's word on what is older than a new snapshot: safe up to a step; still to be stored."""

    committed: int
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Waits:
    """How long a checkpoint held training up, in seconds; postponed_s: it was due, without room."""

    stall_s: float
    postponed_s: float = 0.0


@dataclass(frozen=True)
class _Order:
    snapshot: Snapshot
    waits: Waits
    began: float
    # Taken once: a commit whose answer was lost is repeated with the very same manifest.
    created_at: datetime


class CheckpointWriter:
    """Hand it snapshots with `save`; `drain` waits for what was handed in."""

    def __init__(
        self,
        repository: CheckpointRepository,
        provenance: Provenance,
        retention: Retention,
        snapshots: Snapshots,
        spool: Spool,
        reporter: Reporter,
        world: World,
    ) -> None:
        self._repository = repository
        self._provenance = provenance
        self._retention = retention
        self.snapshots = snapshots
        self._spool = spool
        self._reporter = reporter
        self._world = world
        self._changed = threading.Condition()
        self._fresh: deque[_Order] = deque()  # in memory; the first is being written to disk
        self._local: dict[int, tuple[_Order, Share]] = {}  # on disk, by step
        self._wanted: list[int] = []  # steps to store; the first is under way
        self._kept: set[int] = set()  # steps that a rank of this box may still read from the disk
        self._lost: set[int] = set()  # steps that others may wait for, which this disk never took
        self._trouble: set[str] = set()  # the threads whose last try failed
        self._safe = NOTHING  # the step up to which the store has all, by rank 0's word
        self._closed = False
        self.stale = False  # a newer attempt holds the claim: training on would be for nothing
        self.committed: CheckpointRef | None = None  # the newest one of this writer
        self._threads = [
            threading.Thread(target=target, name=f"checkpoints-{name}", daemon=True)
            for name, target in (("disk", self._write_all), ("store", self._store_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def well(self) -> bool:
        """Whether nothing is being tried again, or was given up while others count on it."""
        return not (self._trouble or self._lost)

    @property
    def on_disk(self) -> bool:
        """Whether this box's disk has what was handed in."""
        return not self._fresh

    def upcoming(self, well: bool) -> Upcoming:
        """What rank 0 means to do with older snapshots; well: no rank is in trouble.

        One that waits gives way to the newer one, and in trouble the one under way does, too.
        """
        with self._changed:
            done = self.committed.step if self.committed else NOTHING
            return Upcoming(done, tuple(self._wanted[:1]) if well else ())

    def save(self, snapshot: Snapshot, waits: Waits, upcoming: Upcoming) -> None:
        """Take a snapshot over; returns at once."""
        order = _Order(snapshot, waits, time.monotonic(), datetime.now(UTC))
        with self._changed:
            self._fresh.append(order)
            self._safe = upcoming.committed
            self._wanted = [step for step in self._wanted if step in upcoming.wanted]
            self._wanted.append(snapshot.step)
            self._kept = {*upcoming.wanted, snapshot.step}
            self._lost &= set(upcoming.wanted)
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Wait until a snapshot can be taken: as long as the disk takes, never for the store."""
        with self._changed:
            self._changed.wait_for(lambda: self.snapshots.room)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all is stored, this rank's share at least; False where that took too long."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.stale or not (self._fresh or self._wanted), timeout_s
            )

    def forget(self, committed: int) -> None:
        """Drop from the disk what rank 0 has committed, up to that step."""
        self._spool.drop(committed)

    def close(self) -> None:
        """End the threads; what isn't stored by now stays on disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._spool.tidy()

    def _write_all(self) -> None:
        """From memory to disk, in order; while the disk takes nothing, the newest is enough."""
        _stand_back()
        while self._await(lambda: bool(self._fresh)):
            order = self._fresh[0]
            step = order.snapshot.step
            work = partial(self._spooled, order)
            share = self._persist("disk", step, work, lambda: len(self._fresh) > 1)
            self.snapshots.release(order.snapshot)
            with self._changed:
                self._fresh.popleft()
                if share is not None:
                    self._local[step] = (order, share)
                elif not self._closed and step in self._wanted:
                    self._wanted.remove(step)
                    self._lost.add(step)
                self._changed.notify_all()
            if share is None:
                self._spool.discard(self._ref(step))
            self._spool.drop(self._safe, self._kept)

    def _store_all(self) -> None:
        """From disk to the store, what is wanted, in order."""
        _stand_back()
        while self._await(lambda: bool(self._wanted) and self._wanted[0] in self._local):
            step = self._wanted[0]
            order, share = self._local[step]
            try:
                work = partial(self._stored, order, share)
                self._persist("store", step, work, partial(self._unwanted, step))
            except StaleWriterError:
                self.stale = True
            with self._changed:
                if not self._closed:
                    self._wanted = [each for each in self._wanted if each != step]
                self._local = {s: kept for s, kept in self._local.items() if s > step}
                self._changed.notify_all()
            if self.stale:
                return

    def _await(self, ready: Callable[[], bool]) -> bool:
        """Wait for something to do; False where the writer closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or ready())
            return not self._closed

    def _unwanted(self, step: int) -> bool:
        return self._wanted[:1] != [step]

    def _persist(
        self, where: str, step: int, work: Callable[[], T], given_up: Callable[[], bool]
    ) -> T | None:
        """What work returns, tried again until it does; None where it is given up, or we close."""
        told = False
        for pause_s in pauses():
            try:
                done = work()
            except StaleWriterError:
                raise
            except ShareMissingError:  # another rank still uploads
                pause_s = SHARE_POLL_S
            except Exception as error:
                # Store, disk, a claim that can't be read: this thread must outlive them all, or
                # later checkpoints would silently not be.
                self._trouble.add(where)
                if not told:
                    message = f"checkpoint at step {step}: {error}; trying again"
                    if where == "store":
                        message += ", meanwhile it is safe on this box's disk"
                    self._reporter.event(Warned(step, message))
                told = True
            else:
                self._trouble.discard(where)
                return done
            with self._changed:
                if self._changed.wait_for(lambda: self._closed or given_up(), pause_s):
                    return None
        raise AssertionError("pauses don't end")

    def _spooled(self, order: _Order) -> Share:
        """A snapshot's bytes, on disk."""
        snapshot, about, world = order.snapshot, self._provenance, self._world
        ref = self._ref(snapshot.step)

        def describe(parts: tuple[Part, ...]) -> Share:
            if not world.is_first:
                return Share(rank=world.rank, ranks=world.size, parts=parts)
            draft = Manifest(
                job_id=ref.job_id,
                step=ref.step,
                attempt=ref.attempt,
                parts=parts,
                state=snapshot.state,
                spec_sha256=about.spec_sha256,
                parent=about.parent,
                identity=about.identity,
                versions=about.versions,
                validation_bpb=snapshot.validation_bpb,
                created_at=order.created_at,
            )
            return Share(rank=0, ranks=world.size, parts=parts, draft=draft)

        return self._spool.write(ref, self.snapshots.parts, snapshot, describe)

    def _stored(self, order: _Order, share: Share) -> None:
        """A share in the store, and on rank 0 the checkpoint committed."""
        ref = self._ref(order.snapshot.step)
        push(self._repository, ref, share, self._spool.folder(ref))
        if share.draft is None:
            return
        manifest = self._repository.gather(share)
        self._repository.commit(manifest)
        self.committed = ref
        self._reporter.event(
            CheckpointCommitted(
                ref,
                manifest.size_bytes,
                time.monotonic() - order.began,
                order.waits.stall_s,
                order.waits.postponed_s,
            )
        )
        self._spool.drop(ref.step)
        self._prune(ref)

    def _prune(self, newest: CheckpointRef) -> None:
        try:
            prune(self._repository, retention_in_force(self._repository, self._retention))
            # What was given up, and what earlier attempts left when they were killed.
            sweep_orphans(self._repository, newest)
        except (StoreError, DocumentError) as error:
            # Clean-up trouble costs space, not steps; the next checkpoint prunes again.
            self._reporter.event(Warned(newest.step, f"old checkpoints stay for now: {error}"))

    def _ref(self, step: int) -> CheckpointRef:
        job_id, attempt = self._repository.job_id, self._provenance.attempt
        return CheckpointRef(job_id=job_id, step=step, attempt=attempt)


def _stand_back() -> None:
    """Give this thread, and those that it starts, less of the CPU than the loop's have."""
    with contextlib.suppress(OSError):  # a thread has a priority of its own on Linux alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
