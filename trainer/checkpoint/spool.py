"""Checkpoints on this box's disk, from the snapshot until the store has them.

A folder a checkpoint, `<step>-<attempt>`: part files, then a description of each rank's share,
written last; shares without one are torn and don't count. What the store didn't get before the
process ended is brought there by `salvage`, when the job's next attempt starts on this box.

Invariant: a share that is there is whole; the newest is only dropped once the store has it or a
newer one is whole. A job that never comes back to this box loses what it left after ABANDONED_S.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.checkpoint.shares import PartLayout, write_part
from trainer.checkpoint.snapshot import Snapshot
from trainer.storage.documents import DocumentError
from trainer.storage.layout import parse_share, share_name
from trainer.storage.manifest import CheckpointRef, Part, Share
from trainer.storage.object_store import write_file
from trainer.storage.repository import (
    CheckpointRepository,
    CorruptCheckpointError,
    ShareMissingError,
)

UPLOADS = 2  # files at once, each of them in parallel pieces
ABANDONED_S = 14 * 86_400  # since a job last wrote here
KEPT = 2  # the one on its way, and the newest
_FOLDER = re.compile(r"([0-9]{1,10})-([1-9][0-9]{0,9})")
log = logging.getLogger(__name__)


class Spool:
    """One job's checkpoints on this box; ranks of one box share it."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self._root = folder / job_id
        self._job_id = job_id

    def folder(self, ref: CheckpointRef) -> Path:
        """Where a checkpoint's files lie."""
        return self._root / f"{ref.step}-{ref.attempt}"

    def write(
        self,
        ref: CheckpointRef,
        layouts: Sequence[PartLayout],
        taken: Snapshot,
        describe: Callable[[tuple[Part, ...]], Share],
    ) -> Share:
        """Write a rank's share; OSError, StoreError where the disk takes no more."""
        folder = self.folder(ref)
        folder.mkdir(parents=True, exist_ok=True)
        buffer = taken.buffer.numpy().data
        share = describe(tuple(write_part(folder / each.name, each, buffer) for each in layouts))
        write_file(folder / share_name(share.rank), iter((share.encode(),)))
        return share

    def refs(self) -> list[CheckpointRef]:
        """What is here, newest first, whole or not."""
        try:
            names = [path.name for path in self._root.iterdir()]
        except FileNotFoundError:
            names = []
        found = [match for name in names if (match := _FOLDER.fullmatch(name))]
        refs = [
            CheckpointRef(job_id=self._job_id, step=int(m[1]), attempt=int(m[2])) for m in found
        ]
        return sorted(refs, key=lambda ref: (ref.step, ref.attempt), reverse=True)

    def shares(self, ref: CheckpointRef) -> list[Share]:
        """The whole shares of a checkpoint that lie here; files that are not as described drop."""
        found = []
        for path in sorted(self.folder(ref).iterdir()):
            if parse_share(path.name) is None:
                continue
            try:
                share = Share.decode(path.read_bytes(), str(path))
                same = [
                    Part.of_file(path.with_name(p.name), p.name, p.tensors) for p in share.parts
                ]
            except (DocumentError, OSError):
                continue
            if tuple(same) == share.parts:
                found.append(share)
        return found

    def drop(self, upto: int, wanted: Collection[int] = ()) -> None:
        """Delete what is no longer needed: what the store has up to a step, and what is old."""
        for number, ref in enumerate(self.refs()):
            if ref.step <= upto or (number >= KEPT and ref.step not in wanted):
                shutil.rmtree(self.folder(ref), ignore_errors=True)

    def discard(self, ref: CheckpointRef) -> None:
        """Delete one that is not whole: it takes room, and counts among those that are kept."""
        shutil.rmtree(self.folder(ref), ignore_errors=True)

    def tidy(self) -> None:
        """Leave no empty folder behind, once nobody writes here."""
        with contextlib.suppress(OSError):
            self._root.rmdir()


def sweep(folder: Path, own_job_id: str, now: float) -> None:
    """Delete what other jobs left in a folder of this box and did not come back to."""
    for root in folder.glob("*"):
        with contextlib.suppress(OSError):  # its job ends just now
            newest = max(path.stat().st_mtime for path in (root, *root.glob("*")))
            if root.name != own_job_id and now - newest > ABANDONED_S:
                log.warning("deleting %s: its job has not been here for 14 days", root)
                shutil.rmtree(root)


def push(repository: CheckpointRepository, ref: CheckpointRef, share: Share, folder: Path) -> None:
    """Bring a rank's share to the store. Safe to repeat."""
    with ThreadPoolExecutor(UPLOADS) as pool:
        for _ in pool.map(lambda p: repository.upload_part(ref, p, folder / p.name), share.parts):
            pass
    if share.draft is None:
        repository.put_share(ref, share)  # for rank 0, who commits


def salvage(spool: Spool, repository: CheckpointRepository, commits: bool) -> list[CheckpointRef]:
    """Bring to the store what an earlier process of the newest attempt left here.

    commits: whether this rank may commit, too: after every box has called it without.
    Safe to repeat. Older attempts' checkpoints may not be current any more, and are dropped.
    """
    claims = repository.claims()
    newest = claims[-1].attempt if claims else 0
    done = max((ref.step for ref in repository.current()), default=-1)
    saved: list[CheckpointRef] = []
    for ref in spool.refs():
        if ref.attempt != newest or ref.step <= done:
            continue
        shares = spool.shares(ref)
        for share in shares:
            if not commits:
                push(repository, ref, share, spool.folder(ref))
            elif share.draft is not None and not saved:
                try:
                    repository.commit(repository.gather(share))
                    log.info("%s was on boxes' disks only; it is committed now", ref)
                    saved.append(ref)
                except (ShareMissingError, CorruptCheckpointError) as error:
                    log.warning("%s on this box is not whole: %s", ref, error)
    return saved
