"""The use cases: plan, submit, adopt, list, watch, pause, resume, cancel; checkpoints, history.

Knows stores, storage and the reconciler's wake-up, nothing of gRPC or Ray. A use case changes what
is desired; the reconciler moves what is.

Invariant: submit either returns a job that is durable, or raises and has created nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ulid import ULID

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.checkpoints import CheckpointName
from service.comparison import Comparison
from service.errors import (
    CheckpointNeededError,
    JobNotFoundError,
    LearningRateJumpError,
    PreconditionError,
    RequestReusedError,
    StorageAwayError,
    StoredDataError,
)
from service.jobs import Desired, Job, JobView, Record
from service.lineage import Ancestor, Fork, forks, lineage
from service.placement import Node
from service.planning import Planner, Resolved, jump_message
from service.storage import Storage, Stored
from service.store import Database, DeletionStore, JobStore, RecordStore
from trainer.contract.states import JobState
from trainer.contract.violations import SpecError, Violation
from trainer.storage.documents import sha256_hex
from trainer.storage.layout import LogKey
from trainer.storage.logs import LogLine
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest

LOG_POLL_S = 1.0  # trainers ship theirs every two seconds
LOOK_REST = 10.0  # times what listing a log takes: a day's has 40,000 pieces a rank
WATCH_BATCH = 500  # records read at once

# What a stop left behind: the newest checkpoint, None without any, or why that can't be read.
Left = Manifest | StorageAwayError | StoredDataError | None


class Lifecycle:
    """What users can do with jobs."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        nodes: Callable[[], Sequence[Node] | None],
        wake: Callable[[], None],
        explained: Callable[[Job], Job],
    ) -> None:
        """nodes: the cluster's, None while unknown. wake: makes the reconciler look now.

        explained: a job with the reason why it waits.
        """
        self._database = database
        self._jobs = JobStore(database)
        self._records = RecordStore(database)
        self._deletions = DeletionStore(database)
        self.forking = asyncio.Lock()  # held while a start is looked up and taken, or given up
        self._storage = storage
        self._planner = Planner(self._jobs, self._records, storage, nodes)
        self._wake = wake
        self._explained = explained

    async def plan(self, data: Mapping[str, Any], inherit: bool, device: str = "") -> Resolved:
        """Resolve and plan a spec; see Planner.plan."""
        return await self._planner.plan(data, inherit, device)

    async def submit(
        self,
        data: Mapping[str, Any],
        inherit: bool,
        request_id: str,
        request_sha256: str,
        actor: str = "",
    ) -> tuple[JobView, Resolved | None]:
        """Queue a job, or return the one that this request made before (then without a plan).

        Raises:
            SpecError, StorageAwayError: as plan.
            LearningRateJumpError: the guard objects.
            RequestReusedError: request_id was used for something else.
        """
        if request_id and (known := await self._made_before(request_id, request_sha256)):
            return known, None
        resolved = await self.plan(data, inherit)
        if resolved.plan.jumps:
            raise LearningRateJumpError(jump_message(resolved.plan))
        # Done to its end though the caller hangs up, who may ask again.
        queueing = self._queue(resolved, request_id or str(ULID()), request_sha256, actor)
        stored = await asyncio.shield(queueing)
        if stored is None:  # the same request came twice at once
            return await self.submit(data, inherit, request_id, request_sha256, actor)
        return stored, resolved

    async def _queue(
        self, resolved: Resolved, request_id: str, request_sha256: str, actor: str
    ) -> JobView | None:
        """Make a job with all that it needs, or nothing; None where the request made one before."""
        now = time.time()
        job = Job(
            id=str(ULID()),
            spec=resolved.spec,
            start=resolved.start,
            request_id=request_id,
            request_sha256=request_sha256,
            created_at=now,
        )
        fork = resolved.plan.fork
        document = JobDocument(
            job_id=job.id,
            spec=resolved.spec.to_dict(),
            binding=resolved.binding,
            start=resolved.start,
            nanochat=resolved.nanochat,
            in_force=fork.in_force.to_dict() if fork else None,
        )
        # Who starts afresh needs nobody's checkpoint, and waits for nobody.
        async with self.forking if resolved.start is not None else contextlib.nullcontext():
            if resolved.start is not None:
                await self.check_kept(resolved.start)
            try:
                if resolved.start is not None:
                    await self._storage.hold(resolved.start, job.id)
                # First the document: a job whose spec can't be stored must not be in the queue.
                await self._storage.save_document(document)
                stored = await self._jobs.insert(job, events.state_changed(job, now, actor=actor))
            except Exception:
                with contextlib.suppress(Exception):  # store or database may have taken it
                    if await self._jobs.get(job.id) is None:
                        await self._storage.delete_job(job.id, job.start)
                raise
        if stored is None:
            await self._storage.delete_job(job.id, job.start)
        self._wake()
        return stored

    async def check_kept(self, start: CheckpointRef) -> None:
        """Raise SpecError where the job that it belongs to is being deleted."""
        if await self._deletions.state(start.job_id) is not None:
            reason = f"job {start.job_id} is being deleted, or was"
            raise SpecError([Violation("start.from", str(start), reason)])

    async def get(self, job_id: str) -> JobView:
        """One job; JobNotFoundError."""
        view = await self._jobs.view(job_id)
        if view is None:
            raise JobNotFoundError(f"no job {job_id!r}")
        return replace(view, job=self._explained(view.job))

    async def page(
        self, states: Collection[JobState], before: int | None, limit: int
    ) -> list[JobView]:
        """Jobs newest first, those submitted before a submission number."""
        views = await self._jobs.page(states, before, limit)
        return [replace(view, job=self._explained(view.job)) for view in views]

    async def watch(self, job_id: str, cursor: int) -> AsyncIterator[Record]:
        """A job's records after cursor, as they come; ends when the job is final."""
        await self.get(job_id)
        while True:
            growth = self._database.growth(job_id)
            job = await self._jobs.get(job_id)
            records = await self._records.read(job_id, cursor, WATCH_BATCH)
            for record in records:
                yield record
                cursor = record.cursor
            if records:
                continue
            if job is None or job.is_final:
                return
            await growth.wait()

    async def logs(
        self, job_id: str, attempt: int | None, rank: int | None, follow: bool
    ) -> AsyncIterator[LogLine]:
        """The log lines of a job, all ranks and attempts or one; with follow until it is final."""
        seen: set[LogKey] = set()
        heads: dict[tuple[int, int], LogKey] = {}  # by attempt and rank
        look_at = 0.0
        while True:
            ended = not follow or (await self.get(job_id)).job.is_final
            if ended or time.monotonic() >= look_at:
                began = time.monotonic()
                keys = await self._storage.log_pieces(job_id, seen, attempt, rank)
                look_at = time.monotonic() + LOOK_REST * (time.monotonic() - began)
            else:  # what comes next is known, but for what a new rank or attempt writes
                newest = max(heads, default=(0, 0))[0]
                keys = [
                    replace(head, sequence=head.sequence + 1)
                    for head in heads.values()
                    if head.attempt == newest
                ]
            for key in keys:
                for line in await self._storage.log_lines(job_id, key):
                    seen.add(key)
                    heads[key.attempt, key.rank] = key
                    yield line
            if ended:
                return
            await asyncio.sleep(LOG_POLL_S)

    async def checkpoints(self, job_id: str) -> list[Stored]:
        """The current checkpoints of a job, newest first."""
        await self.get(job_id)
        return await self._storage.stored(job_id)

    async def require(self, wanted: CheckpointName) -> None:
        """Raise JobNotFoundError or CheckpointNotFoundError unless there is that checkpoint."""
        await self.get(wanted.job_id)
        await self._storage.require(wanted)

    async def adopt(
        self,
        source: str,
        data: Mapping[str, Any],
        bring: Callable[[str], Awaitable[object]],
        actor: str = "",
    ) -> Manifest:
        """Make nanochat's checkpoint the end of a job of its own. Safe to repeat.

        bring: commits, for the job whose document is stored, the checkpoint that this names. The
        job is there only once that is done; what a crash leaves in the bucket nobody refers to.

        Raises:
            SpecError: the source or the spec can't be used.
        """
        spec, binding, summary = await self._planner.adopted(source, data)
        start = summary.start
        digest = sha256_hex(start.model_dump_json().encode() + json.dumps(spec.to_dict()).encode())
        request_id = f"import-{digest}"
        known = await self._jobs.by_request(request_id)
        if known is not None:
            return await self._storage.resolve(f"{known.id}@{start.step}")
        now, job_id = time.time(), str(ULID())
        await self._storage.save_document(
            JobDocument(
                job_id=job_id,
                spec=spec.to_dict(),
                binding=binding,
                nanochat=start,
                in_force=summary.in_force.to_dict(),
            )
        )
        await bring(job_id)
        manifest = await self._storage.resolve(f"{job_id}@{start.step}")
        job = Job(
            id=job_id,
            spec=spec,
            start=None,
            request_id=request_id,
            request_sha256=digest,
            created_at=now,
            state=JobState.SUCCEEDED,
            reason=f"imported from {start.name}",
            ended_at=now,
        )
        told = events.state_changed(job, now, start.step, actor)
        await self._jobs.insert(job, events.imported(manifest, now), told)
        return manifest

    async def verify(self, name: str) -> tuple[Stored, list[str]]:
        """Read every byte of JOB@STEP back; what is wrong with it, empty: nothing."""
        wanted = CheckpointName.parse(name)
        await self.get(wanted.job_id)
        return await self._storage.verify(wanted)

    async def delete_checkpoint(self, name: str, actor: str = "") -> None:
        """Delete JOB@STEP, unless somebody needs it: CheckpointNeededError."""
        wanted = CheckpointName.parse(name)
        job = (await self.get(wanted.job_id)).job
        if job.holds_resources:
            raise CheckpointNeededError(
                f"job {job.id} is {job.state} and may be reading {name}: pause it first"
            )
        await self._storage.delete_checkpoint(wanted)
        told = events.requested(f"delete checkpoint {name}", actor, time.time())
        await self._records.append(job.id, [told])

    async def lineage(self, job_id: str) -> tuple[list[Ancestor], list[Fork]]:
        """The job, its parent, and so on; and the other jobs that continue from any of them."""
        found = await lineage(self._jobs, self._storage, job_id)
        return found, await forks(self._jobs, found)

    async def compare(self, job_ids: list[str]) -> pb.CompareJobsResponse:
        """Jobs side by side; see Comparison."""
        return await Comparison(self._jobs, self._records, self._storage).compare(job_ids)

    async def metrics(
        self, job_id: str, start_step: int, end_step: int | None, max_points: int | None, limit: int
    ) -> list[Record]:
        """Metric points of a job's steps; see RecordStore.points."""
        await self.get(job_id)
        return await self._records.points(job_id, start_step, end_step, max_points, limit)

    async def cancel(self, job_id: str, actor: str = "") -> tuple[JobView, Left]:
        """Stop a job for good; waits until it is final. Safe to repeat."""
        await self._desire(job_id, Desired.CANCELLED, "cancel", actor)
        return await self._settled(job_id, Desired.CANCELLED)

    async def pause(self, job_id: str, actor: str = "") -> tuple[JobView, Left]:
        """Checkpoint a job and free its resources; waits until it has. Safe to repeat.

        PreconditionError where somebody resumes or cancels it meanwhile.
        """
        await self._desire(job_id, Desired.PAUSED, "pause", actor)
        return await self._settled(job_id, Desired.PAUSED)

    async def resume(self, job_id: str, actor: str = "") -> JobView:
        """Queue a paused job again. Safe to repeat."""
        await self._desire(job_id, Desired.RUNNING, "resume", actor)
        return await self.get(job_id)

    async def _desire(self, job_id: str, desired: Desired, wish: str, actor: str) -> None:
        while True:
            job = (await self.get(job_id)).job
            if job.desired is desired and not (job.is_final and desired is Desired.RUNNING):
                return
            if job.is_final:
                raise PreconditionError(f"job {job_id} is {job.state}: nothing to change")
            if job.desired is Desired.CANCELLED:
                raise PreconditionError(f"job {job_id} is being cancelled")
            now = time.time()
            asked = None if desired is Desired.RUNNING else job.stop_asked_at or now
            wanted = replace(job, desired=desired, stop_asked_at=asked)
            if await self._jobs.change(job, wanted, events.requested(wish, actor, now)):
                self._wake()
                return

    async def _settled(self, job_id: str, desired: Desired) -> tuple[JobView, Left]:
        """Once the job is final or as desired; what it left behind."""
        while True:
            growth = self._database.growth(job_id)
            view = await self.get(job_id)
            if view.job.is_final or view.job.state.value == desired.value:
                break
            if view.job.desired is not desired:
                since = f"somebody wants it {view.job.desired} since"
                raise PreconditionError(f"job {job_id} does not become {desired}: {since}")
            await growth.wait()
        try:
            manifests = await self._storage.manifests(job_id)
        except (StorageAwayError, StoredDataError) as error:
            return view, error  # the job has stopped all the same
        return view, manifests[0] if manifests else None

    async def _made_before(self, request_id: str, request_sha256: str) -> JobView | None:
        job = await self._jobs.by_request(request_id)
        if job is None:
            return None
        if job.request_sha256 != request_sha256:
            raise RequestReusedError(
                f"request_id {request_id!r} made job {job.id} from another request"
            )
        return await self.get(job.id)


def request_digest(message: bytes) -> str:
    """What tells one submission from another under the same request_id."""
    return sha256_hex(message)
