"""The checkpoints of one job: claim, commit, what is current, and reading with proof.

Knows keys through `layout`, documents through `manifest`; nothing of tensors. What to keep is
decided in `retention`.

Invariant: a checkpoint exists once its manifest does, and is current only if every later attempt
started at its step or after it. So whatever crashes or races, readers agree on one line of
checkpoints, each of them whole.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from trainer.storage import layout
from trainer.storage.documents import DocumentError
from trainer.storage.manifest import (
    CheckpointRef,
    Claim,
    JobDocument,
    Manifest,
    ManifestError,
    Part,
    Share,
)
from trainer.storage.object_store import (
    CHUNK_BYTES,
    AlreadyExistsError,
    NotFoundError,
    ObjectStore,
    Progress,
    StoreUnavailableError,
    write_file,
)

T = TypeVar("T")

Start = CheckpointRef | None
ChooseStart = Callable[[], Start]

CHOICES = 5  # of a newest checkpoint that is pruned while it is read
BEFORE_ALL_STEPS = -1  # where an attempt starts that takes nothing of its own job


class StaleWriterError(Exception):
    """A later attempt has claimed the job: stop writing and end; it goes on without us."""


class NotClaimedError(Exception):
    """The attempt never claimed its number, so it may not commit: claim first."""


class ShareMissingError(Exception):
    """Another rank has not uploaded its share of a checkpoint yet: look again."""


class CorruptCheckpointError(Exception):
    """A checkpoint is not what its manifest says: pass over it to an older one."""

    def __init__(self, ref: CheckpointRef, part: str, expected: str, found: str) -> None:
        super().__init__(
            f"{ref} (attempt {ref.attempt}) {part}: expected {expected}, found {found}"
        )
        self.ref, self.part, self.expected, self.found = ref, part, expected, found


@dataclass(frozen=True)
class Rejected:
    """A current checkpoint that couldn't be loaded, and what was wrong with it."""

    ref: CheckpointRef
    reason: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The newest checkpoint that could be loaded, and the newer ones passed over."""

    ref: CheckpointRef
    manifest: Manifest
    value: T
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class NothingLoadable:
    """No checkpoint could be loaded; rejected is empty where none was ever committed."""

    rejected: tuple[Rejected, ...]


class CheckpointRepository:
    """One job's checkpoints. Safe to use from several threads and processes."""

    def __init__(self, store: ObjectStore, job_id: str) -> None:
        self.store = store
        self.job_id = job_id
        self._claims: dict[int, Claim] = {}  # claims never change, so each is read once

    def save_document(self, document: JobDocument) -> None:
        """Write spec.json once; the same document again is no error, another one is.

        Raises:
            AlreadyExistsError: the job has a different document.
        """
        assert document.job_id == self.job_id
        self._put_once(layout.spec_key(self.job_id), document.encode())

    def document(self) -> JobDocument:
        """The job's document; NotFoundError, DocumentError."""
        key = layout.spec_key(self.job_id)
        return JobDocument.decode(self.store.get(key), key)

    def claims(self) -> list[Claim]:
        """Every attempt's claim, in order. DocumentError if one can't be read."""
        there = []
        for info in self.store.list(layout.claims_prefix(self.job_id)):
            named = layout.parse_claim(info.key)
            if named is None:
                continue
            there.append(named.attempt)
            if named.attempt not in self._claims:
                claim = Claim.decode(self.store.get(info.key), info.key)
                if claim.attempt != named.attempt:
                    raise DocumentError(f"{info.key} is the claim of attempt {claim.attempt}")
                self._claims[named.attempt] = claim
        # Those of a job that was deleted meanwhile count no longer: nobody may commit for it.
        return [self._claims[attempt] for attempt in sorted(there)]

    def claim(self, start: Start | ChooseStart, host: str) -> Claim:
        """Claim the next attempt number, naming the checkpoint that the attempt goes on from.

        A callable is asked again after each lost race, since the winner may have committed.
        After a crash the number is claimed or it isn't; claiming anew is always safe.
        """
        while True:
            taken = self.claims()
            claim = Claim(
                attempt=taken[-1].attempt + 1 if taken else 1,
                start=start() if callable(start) else start,
                host=host,
                nonce=secrets.token_hex(16),
                created_at=datetime.now(UTC),
            )
            try:
                self._put_once(layout.claim_key(self.job_id, claim.attempt), claim.encode())
            except AlreadyExistsError:
                continue
            self._claims[claim.attempt] = claim
            return claim

    def note_too_large(self, attempt: int, rows: int) -> None:
        """An attempt ran out of memory with so many rows a micro-step. Safe to repeat."""
        self.store.put(layout.too_large_key(self.job_id, attempt, rows), b"")

    def too_large(self) -> int | None:
        """The fewest rows a micro-step that any attempt ran out of memory with."""
        keys = (info.key for info in self.store.list(layout.claims_prefix(self.job_id)))
        return min((rows for key in keys if (rows := layout.parse_too_large(key))), default=None)

    def committed(self) -> list[CheckpointRef]:
        """Every checkpoint with a manifest, current or superseded, by step and attempt."""
        found = []
        for info in self.store.list(layout.checkpoints_prefix(self.job_id)):
            named = layout.parse_checkpoint(info.key)
            if named and named.file == layout.MANIFEST:
                found.append(self._ref(named.step, named.attempt))
        return sorted(found, key=lambda ref: (ref.step, ref.attempt))

    def hold(self, ref: CheckpointRef, by_job_id: str) -> None:
        """Keep a checkpoint from being pruned, since another job starts from it. Safe to repeat.

        Raises:
            NotFoundError: it was pruned before the hold was there.
        """
        key = layout.hold_key(ref.job_id, ref.step, ref.attempt, by_job_id)
        self.store.put(key, b"")
        manifest = layout.manifest_key(ref.job_id, ref.step, ref.attempt)
        if self.store.head(manifest) is None:
            self.store.delete(key)
            raise NotFoundError(manifest)

    def held(self) -> frozenset[CheckpointRef]:
        """The checkpoints that other jobs start from."""
        keys = (info.key for info in self.store.list(layout.checkpoints_prefix(self.job_id)))
        found = (layout.parse_hold(key) for key in keys)
        return frozenset(self._ref(named.step, named.attempt) for named in found if named)

    def current(self) -> list[CheckpointRef]:
        """The checkpoints that count, newest first."""
        # Claims are read last: one that appears after the listing then only removes, and a
        # checkpoint that it starts from is in the listing.
        committed = self.committed()
        return select_current(committed, self.claims())

    def manifest(self, ref: CheckpointRef) -> Manifest:
        """A checkpoint's manifest; NotFoundError, ManifestError."""
        key = layout.manifest_key(ref.job_id, ref.step, ref.attempt)
        manifest = Manifest.decode(self.store.get(key), key)
        if manifest.ref != ref:
            raise ManifestError(f"{key} is the manifest of {manifest.ref!r}")
        return manifest

    def upload_part(
        self, ref: CheckpointRef, part: Part, path: Path, progress: Progress | None = None
    ) -> None:
        """Upload one part's file. Nothing refers to it before the commit; safe to repeat.

        A part that is there whole was put there by an earlier try: its key is this attempt's own.
        """
        info = self.store.head(self._part_key(ref, part))
        if info is None or info.size_bytes != part.size_bytes:
            self.store.put_file(self._part_key(ref, part), path, progress)

    def put_share(self, ref: CheckpointRef, share: Share) -> None:
        """Tell rank 0 that a rank's parts are uploaded. Safe to repeat."""
        key = layout.share_key(ref.job_id, ref.step, ref.attempt, share.rank)
        self.store.put(key, share.encode())

    def gather(self, share: Share) -> Manifest:
        """The whole manifest from rank 0's share; ShareMissingError while another's is missing."""
        assert share.draft is not None, "only rank 0 commits"
        ref, parts = share.draft.ref, share.parts
        for rank in range(1, share.ranks):
            key = layout.share_key(ref.job_id, ref.step, ref.attempt, rank)
            try:
                parts += Share.decode(self.store.get(key), key).parts
            except NotFoundError as error:
                raise ShareMissingError(key) from error
        return Manifest(**{**dict(share.draft), "parts": parts})

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint exist. All its parts must be uploaded. Safe to repeat.

        Raises:
            StaleWriterError: a later attempt has claimed the job.
            NotClaimedError: this attempt has no claim.
            CorruptCheckpointError: a part is missing or of another size.
            AlreadyExistsError: this attempt committed something else at this step.
        """
        ref = manifest.ref
        for part in manifest.parts:
            info = self.store.head(self._part_key(ref, part))
            if info is None or info.size_bytes != part.size_bytes:
                found = "nothing" if info is None else f"{info.size_bytes} bytes"
                raise CorruptCheckpointError(ref, part.name, f"{part.size_bytes} bytes", found)
        self.check_writer(manifest.attempt)
        key = layout.manifest_key(ref.job_id, ref.step, ref.attempt)
        self._put_once(key, manifest.encode())

    def check_writer(self, attempt: int) -> None:
        """Raise StaleWriterError or NotClaimedError unless this attempt is the latest."""
        claims = self.claims()
        if claims and claims[-1].attempt > attempt:
            latest = claims[-1]
            raise StaleWriterError(
                f"attempt {attempt} of {self.job_id} is superseded by attempt {latest.attempt} "
                f"on {latest.host}"
            )
        if not claims or claims[-1].attempt != attempt:
            raise NotClaimedError(f"attempt {attempt} of {self.job_id} was never claimed")

    def open_part(self, ref: CheckpointRef, part: Part) -> Iterator[bytes]:
        """A part's bytes in order. What was yielded is proven only once the iterator has ended.

        Raises:
            CorruptCheckpointError: missing, or of another size or digest.
        """
        digest = hashlib.sha256()
        size = 0
        try:
            for chunk in self.store.stream(self._part_key(ref, part), CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if size > part.size_bytes:
                    break
                yield chunk
        except NotFoundError as error:
            raise CorruptCheckpointError(ref, part.name, "a file", "nothing") from error
        if size != part.size_bytes:
            more = "more than " * (size > part.size_bytes)
            found = f"{more}{min(size, part.size_bytes)} bytes"
            raise CorruptCheckpointError(ref, part.name, f"{part.size_bytes} bytes", found)
        if digest.hexdigest() != part.sha256:
            raise CorruptCheckpointError(
                ref, part.name, f"sha256 {part.sha256}", digest.hexdigest()
            )

    def read_part(self, ref: CheckpointRef, part: Part, destination: Path) -> None:
        """Copy a part to a file, which appears only when its digest is right."""
        write_file(destination, self.open_part(ref, part))

    def verify(
        self, ref: CheckpointRef, look: Callable[[], None] = lambda: None
    ) -> tuple[CorruptCheckpointError, ...]:
        """Read a whole checkpoint and return what is wrong with it; empty: it can be trusted.

        look: called beside each piece that was read; what it raises ends the reading.
        """
        try:
            manifest = self.manifest(ref)
        except (NotFoundError, ManifestError) as error:
            return (CorruptCheckpointError(ref, layout.MANIFEST, "a manifest", str(error)),)
        wrong = []
        for part in manifest.parts:
            try:
                for _ in self.open_part(ref, part):
                    look()
            except CorruptCheckpointError as error:
                wrong.append(error)
        return tuple(wrong)

    def read_current(self, step: int | None, read: Callable[[CheckpointRef], T]) -> T:
        """What read makes of the current checkpoint at a step, or of the newest.

        A job that trains may prune it meanwhile: then it is chosen anew.

        Raises:
            NotFoundError: there is none.
            CorruptCheckpointError: as read found it.
        """
        for _ in range(CHOICES):
            found = [ref for ref in self.current() if step is None or ref.step == step]
            if not found:
                break
            try:
                return read(found[0])
            except (NotFoundError, CorruptCheckpointError):
                if found[0] in self.committed():
                    raise
        wanted = "latest" if step is None else step
        raise NotFoundError(f"{self.job_id}@{wanted} was deleted a moment ago")

    def newest_loadable(
        self, load: Callable[[CheckpointRef, Manifest], T]
    ) -> Loaded[T] | NothingLoadable:
        """Load the newest current checkpoint, falling back to older ones where one is corrupt.

        load may raise CorruptCheckpointError; trouble with the store is not corruption and
        passes through. So does a writer that lives on and prunes what is read: look again.
        """
        rejected: list[Rejected] = []
        for ref in self.current():
            try:
                manifest = self.manifest(ref)
                return Loaded(ref, manifest, load(ref, manifest), tuple(rejected))
            except (CorruptCheckpointError, ManifestError, NotFoundError) as error:
                rejected.append(Rejected(ref, str(error)))
        if not {each.ref for each in rejected} <= set(self.committed()):
            raise StoreUnavailableError(f"checkpoints of {self.job_id} were pruned while read")
        return NothingLoadable(tuple(rejected))

    def _put_once(self, key: str, data: bytes) -> None:
        """Conditional put whose repetition is safe: what is there may be our own, from before."""
        try:
            self.store.put(key, data, if_none_match=True)
        except AlreadyExistsError:
            if self.store.get(key) != data:
                raise

    def _part_key(self, ref: CheckpointRef, part: Part) -> str:
        return layout.part_key(ref.job_id, ref.step, ref.attempt, part.name)

    def _ref(self, step: int, attempt: int) -> CheckpointRef:
        return CheckpointRef(job_id=self.job_id, step=step, attempt=attempt)


def select_current(committed: list[CheckpointRef], claims: list[Claim]) -> list[CheckpointRef]:
    """Of one job's committed checkpoints those that count, newest first. Pure.

    (step, a) counts only if every attempt after a started at that step or later; an attempt that
    started afresh, or from another job's checkpoint, took up none of this job's steps. At one
    step the highest attempt counts.
    """
    by_step: dict[int, CheckpointRef] = {}
    for ref in committed:
        starts = (start_step(claim, ref.job_id) for claim in claims if claim.attempt > ref.attempt)
        if all(start >= ref.step for start in starts):
            known = by_step.get(ref.step)
            if known is None or known.attempt < ref.attempt:
                by_step[ref.step] = ref
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def start_step(claim: Claim, job_id: str) -> int:
    """The step of its own job that an attempt goes on from."""
    if claim.start is None or claim.start.job_id != job_id:
        return BEFORE_ALL_STEPS
    return claim.start.step
