"""The use cases: plan, submit, list, watch, pause, resume, cancel; checkpoints and history.

Knows stores, storage and the reconciler's wake-up, nothing of gRPC or Ray. A use case changes what
is desired; the reconciler moves what is.

Invariant: submit either returns a job that is durable, or raises and has created nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ulid import ULID

from everstep.specs import merged
from service import events
from service.checkpoints import CheckpointName
from service.errors import (
    CheckpointNeededError,
    JobNotFoundError,
    LearningRateJumpError,
    PreconditionError,
    RequestReusedError,
)
from service.jobs import Desired, Job, JobView, Record
from service.lineage import Ancestor, lineage
from service.scheduler import Capacity, needs
from service.storage import Storage, Stored
from service.store import Database, JobStore, RecordStore
from trainer.contract.plan import Fork, Plan, make_plan
from trainer.contract.schedule import InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.states import JobState
from trainer.contract.violations import SpecError, Violation
from trainer.storage.binding import DataBinding
from trainer.storage.documents import sha256_hex
from trainer.storage.layout import LogKey
from trainer.storage.logs import LogLine
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest
from trainer.storage.object_store import NotFoundError

LOG_POLL_S = 1.0  # trainers ship theirs every two seconds
WATCH_BATCH = 500  # records read at once
NANOCHAT = "nanochat:"


@dataclass(frozen=True)
class Resolved:
    """A spec with everything that it refers to looked up."""

    spec: JobSpec
    binding: DataBinding
    start: CheckpointRef | None
    plan: Plan


class Lifecycle:
    """What users can do with jobs."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        capacity: Callable[[], Capacity | None],
        wake: Callable[[], None],
    ) -> None:
        """capacity: the cluster's, None while unknown. wake: makes the reconciler look now."""
        self._database = database
        self._jobs = JobStore(database)
        self._records = RecordStore(database)
        self._storage = storage
        self._capacity = capacity
        self._wake = wake

    async def plan(self, data: Mapping[str, Any], inherit: bool) -> Resolved:
        """Resolve and plan a spec; nothing is created.

        Raises:
            SpecError: with every violation found.
            StorageAwayError: storage can't be reached.
        """
        spec = await self._parse(data, inherit)
        found = self._check_capacity(spec)
        parent: tuple[JobDocument, Manifest] | None = None
        try:
            parent = await self._parent(spec)
        except SpecError as error:
            found += error.violations
        try:
            binding = await self._bind(spec, parent[0] if parent else None)
        except SpecError as error:
            raise SpecError([*found, *error.violations]) from error
        vocab_size = binding.tokenizer.vocab_size
        if parent is not None:
            found += _check_fit(spec, vocab_size, parent[0])
        fork = _fork(parent[1]) if parent else None
        try:
            plan = make_plan(spec, vocab_size, fork)
        except SpecError as error:
            raise SpecError([*found, *error.violations]) from error
        except ValueError as error:
            raise SpecError(
                [*found, Violation("start.from", spec.start.from_, str(error))]
            ) from error
        if found:
            raise SpecError(found)
        return Resolved(spec, binding, parent[1].ref if parent else None, plan)

    async def submit(
        self, data: Mapping[str, Any], inherit: bool, request_id: str, request_sha256: str
    ) -> tuple[Job, Resolved | None]:
        """Queue a job, or return the one that this request made before (then without a plan).

        Raises:
            SpecError, StorageAwayError: as plan.
            LearningRateJumpError: the guard objects.
            RequestReusedError: request_id was used for something else.
        """
        known = await self._jobs.by_request(request_id) if request_id else None
        if known is not None:
            return self._same_request(known, request_sha256), None
        resolved = await self.plan(data, inherit)
        if resolved.plan.jumps:
            raise LearningRateJumpError(_jump_message(resolved.plan))
        now = time.time()
        job = Job(
            id=str(ULID()),
            spec=resolved.spec,
            start=resolved.start,
            request_id=request_id or str(ULID()),
            request_sha256=request_sha256,
            created_at=now,
        )
        fork = resolved.plan.fork
        if resolved.start is not None:
            await self._storage.hold(resolved.start, job.id)
        # First the document: a job whose spec can't be stored must not be in the queue.
        await self._storage.save_document(
            JobDocument(
                job_id=job.id,
                spec=resolved.spec.to_dict(),
                binding=resolved.binding,
                start=resolved.start,
                in_force=fork.in_force.to_dict() if fork else None,
            )
        )
        stored = await self._jobs.insert(job, events.state_changed(job, now))
        self._wake()
        return self._same_request(stored, request_sha256), resolved

    async def get(self, job_id: str) -> JobView:
        """One job; JobNotFoundError."""
        view = await self._jobs.view(job_id)
        if view is None:
            raise JobNotFoundError(f"no job {job_id!r}")
        return view

    async def page(
        self, states: Collection[JobState], before: int | None, limit: int
    ) -> list[JobView]:
        """Jobs newest first, those submitted before a submission number."""
        return await self._jobs.page(states, before, limit)

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
        seen: frozenset[LogKey] = frozenset()
        while True:
            ended = not follow or (await self.get(job_id)).job.is_final
            for key in await self._storage.log_pieces(job_id, seen, attempt, rank):
                seen |= {key}
                for line in await self._storage.log_lines(job_id, key):
                    yield line
            if ended:
                return
            await asyncio.sleep(LOG_POLL_S)

    async def checkpoints(self, job_id: str) -> list[Stored]:
        """The current checkpoints of a job, newest first."""
        await self.get(job_id)
        return await self._storage.stored(job_id)

    async def verify(self, name: str) -> tuple[Stored, list[str]]:
        """Read every byte of JOB@STEP back; what is wrong with it, empty: nothing."""
        wanted = CheckpointName.parse(name)
        await self.get(wanted.job_id)
        return await self._storage.verify(wanted)

    async def delete_checkpoint(self, name: str) -> None:
        """Delete JOB@STEP, unless somebody needs it: CheckpointNeededError."""
        wanted = CheckpointName.parse(name)
        job = (await self.get(wanted.job_id)).job
        if job.holds_resources:
            raise CheckpointNeededError(
                f"job {job.id} is {job.state} and may be reading {name}: pause it first"
            )
        await self._storage.delete_checkpoint(wanted)

    async def lineage(self, job_id: str) -> list[Ancestor]:
        """The job, its parent, and so on back to fresh weights."""
        return await lineage(self._jobs, self._storage, job_id)

    async def metrics(
        self, job_id: str, start_step: int, end_step: int | None, max_points: int | None, limit: int
    ) -> list[Record]:
        """Metric points of a job's steps; see RecordStore.points."""
        await self.get(job_id)
        return await self._records.points(job_id, start_step, end_step, max_points, limit)

    async def cancel(self, job_id: str) -> tuple[JobView, Manifest | None]:
        """Stop a job for good; waits until it is final. Safe to repeat."""
        await self._desire(job_id, Desired.CANCELLED)
        return await self._settled(job_id, lambda job: job.is_final)

    async def pause(self, job_id: str) -> tuple[JobView, Manifest | None]:
        """Checkpoint a job and free its resources; waits until it has."""
        await self._desire(job_id, Desired.PAUSED)
        return await self._settled(job_id, lambda job: job.is_final or job.state is JobState.PAUSED)

    async def resume(self, job_id: str) -> JobView:
        """Queue a paused job again. Safe to repeat."""
        await self._desire(job_id, Desired.RUNNING)
        return await self.get(job_id)

    async def _desire(self, job_id: str, desired: Desired) -> None:
        while True:
            job = (await self.get(job_id)).job
            if job.desired is desired:
                return
            if job.is_final:
                raise PreconditionError(f"job {job_id} is {job.state}: nothing to change")
            if job.desired is Desired.CANCELLED:
                raise PreconditionError(f"job {job_id} is being cancelled")
            if await self._jobs.change(job, replace(job, desired=desired)):
                self._wake()
                return

    async def _settled(
        self, job_id: str, done: Callable[[Job], bool]
    ) -> tuple[JobView, Manifest | None]:
        while True:
            growth = self._database.growth(job_id)
            view = await self.get(job_id)
            if done(view.job):
                manifests = await self._storage.manifests(job_id)
                return view, manifests[0] if manifests else None
            await growth.wait()

    async def _parse(self, data: Mapping[str, Any], inherit: bool) -> JobSpec:
        if not inherit:
            return JobSpec.parse(data)
        start = data.get("start")
        name = start.get("from") if isinstance(start, Mapping) else None
        if not isinstance(name, str) or "@" not in name:
            raise SpecError([Violation("start.from", name, "names the job to inherit from")])
        parent = await self._jobs.get(name.rpartition("@")[0])
        if parent is None:
            raise SpecError([Violation("start.from", name, "there is no such job")])
        inherited = {k: v for k, v in parent.spec.to_dict().items() if k != "start"}
        return JobSpec.parse(merged(inherited, data))

    async def _parent(self, spec: JobSpec) -> tuple[JobDocument, Manifest] | None:
        name = spec.start.from_
        if name is None:
            return None
        if name.startswith(NANOCHAT):
            reason = "nanochat checkpoints can't be started from yet"
            raise SpecError([Violation("start.from", name, reason)])
        job_id = name.rpartition("@")[0]
        try:
            document = await self._storage.document(job_id)
        except NotFoundError:
            raise SpecError([Violation("start.from", name, "there is no such job")]) from None
        return document, await self._storage.resolve(name)

    async def _bind(self, spec: JobSpec, parent: JobDocument | None) -> DataBinding:
        """The parent's binding where the spec names the same data: its position stays valid."""
        if parent is not None and parent.binding is not None:
            theirs = JobSpec.parse(parent.spec).data
            if theirs == spec.data:
                return parent.binding
        return await self._storage.bind(spec.data)

    def _check_capacity(self, spec: JobSpec) -> list[Violation]:
        total = self._capacity()
        if total is None:
            return []
        need = needs(spec.resources)
        workers = f"workers.min {spec.resources.workers.min}"
        found = []
        if need.gpus > total.gpus:
            reason = f"with {workers} needs {need.gpus} GPU, the cluster has {total.gpus}"
            value = spec.resources.gpus_per_worker
            found.append(Violation("resources.gpus_per_worker", value, reason))
        if need.cpus > total.cpus:
            reason = f"with {workers} needs {need.cpus} CPU, the cluster has {total.cpus}"
            value = spec.resources.cpus_per_worker
            found.append(Violation("resources.cpus_per_worker", value, reason))
        return found

    def _same_request(self, job: Job, request_sha256: str) -> Job:
        if job.request_sha256 != request_sha256:
            raise RequestReusedError(
                f"request_id {job.request_id!r} made job {job.id} from another request"
            )
        return job


def request_digest(message: bytes) -> str:
    """What tells one submission from another under the same request_id."""
    return sha256_hex(message)


def _fork(manifest: Manifest) -> Fork:
    in_force = manifest.state.get("in_force")
    assert isinstance(in_force, dict), "every checkpoint of ours says what was in force"
    return Fork(str(manifest.ref), manifest.step, InForce.from_dict(in_force))


def _check_fit(spec: JobSpec, vocab_size: int, parent: JobDocument) -> list[Violation]:
    """The weights must have the names and shapes that the parent's have."""
    assert parent.binding is not None
    theirs = ModelShape.of(JobSpec.parse(parent.spec).model, parent.binding.tokenizer.vocab_size)
    ours = ModelShape.of(spec.model, vocab_size)
    found = []
    for field in ("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size"):
        old, new = getattr(theirs, field), getattr(ours, field)
        if old != new:
            reason = f"gives {field} {new}, but {spec.start.from_} has {old}"
            section = "data.tokenizer" if field == "vocab_size" else "model"
            found.append(Violation(section, spec.start.from_, reason))
    return found


def _jump_message(plan: Plan) -> str:
    lines = "; ".join(str(jump) for jump in plan.jumps)
    name = plan.fork.name if plan.fork else ""
    return (
        f"learning rates would jump above those in force at {name}: {lines}. "
        "Ways out: lower rates (--set optimizer.<rate>=...), schedule.anchor: continue, "
        "or guards.allow_lr_jump: true"
    )
