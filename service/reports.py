"""RunService: what attempts report becomes durable, then visible; directives go back.

Invariant: an entry is acknowledged only after it is on disk, and recorded once however often it is
sent. A report never changes what is desired; it moves a job from STARTING to RUNNING, no more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service import convert, events
from service.errors import BusyError, ForbiddenError, InvalidRequestError, JobNotFoundError
from service.interceptors import caller
from service.jobs import Attempt, Job
from service.metrics import Metrics
from service.store import JobStore, NewRecord, RecordStore
from trainer.contract.states import JobState

MAX_STREAMS = 4  # of one attempt


class RunServicer(rpc.RunServiceServicer):  # type: ignore[misc]
    """See the .proto."""

    def __init__(
        self,
        jobs: JobStore,
        records: RecordStore,
        metrics: Metrics,
        directive: Callable[[Job], pb.Directive],
    ) -> None:
        self._jobs = jobs
        self._records = records
        self._metrics = metrics
        self._directive = directive
        self._open = Counter[tuple[str, int]]()

    async def Report(  # noqa: N802 - gRPC's name
        self,
        requests: AsyncIterator[pb.ReportRequest],
        _context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.ReportResponse]:
        hello: pb.Hello | None = None
        with ExitStack() as cleanup:
            async for request in requests:
                if hello is None:
                    hello = self._greet(request)
                    cleanup.enter_context(self._counted((hello.job_id, hello.attempt)))
                    upto = await self._begin(hello)
                else:
                    upto = await self._take(hello, request.entries)
                job = await self._job(hello.job_id)
                yield pb.ReportResponse(acknowledged_sequence=upto, directive=self._directive(job))

    @contextmanager
    def _counted(self, who: tuple[str, int]) -> Iterator[None]:
        """One of an attempt's streams: it has one, and those that the network has not let go of."""
        if self._open[who] >= MAX_STREAMS:
            raise BusyError(f"{MAX_STREAMS} streams of this attempt are open already")
        self._open[who] += 1
        try:
            yield
        finally:
            self._open[who] -= 1
            self._open = +self._open  # without those that have none

    def _greet(self, request: pb.ReportRequest) -> pb.Hello:
        if not request.HasField("hello"):
            raise InvalidRequestError("hello: the first request of a stream names the attempt")
        hello = request.hello
        who = caller.get()
        if who is None or (who.job_id, who.attempt) != (hello.job_id, hello.attempt):
            raise ForbiddenError("the credential is another attempt's")
        return hello

    async def _begin(self, hello: pb.Hello) -> int:
        job = await self._job(hello.job_id)
        now = time.time()
        attempt = Attempt(job.id, hello.attempt, now, hello.start_step)
        record = events.attempt_started(hello.attempt, hello.start_step, now)
        acknowledged = await self._records.begin_attempt(attempt, record)
        view = await self._jobs.view(job.id)  # it may have begun before: this is its word again
        if view is not None and not job.is_final:
            self._metrics.observe_attempt(view)
        return acknowledged

    async def _take(self, hello: pb.Hello, entries: Sequence[pb.ReportEntry]) -> int:
        numbered = [(entry.sequence, _record(entry, hello.attempt)) for entry in entries]
        before, upto = await self._records.append_reported(hello.job_id, hello.attempt, numbered)
        if upto > before:
            job = await self._job(hello.job_id)
            trained = False
            for entry in entries:
                # Of a job that is final series may be gone, and would come back for ever.
                if before < entry.sequence <= upto and not job.is_final:
                    trained |= entry.HasField("point")
                    self._observe(job, entry, hello.node_id)
            if trained and job.state is JobState.STARTING:
                await self._running(job, hello.attempt)
        return upto

    def _observe(self, job: Job, entry: pb.ReportEntry, node_id: str) -> None:
        if entry.HasField("point"):
            self._metrics.observe_point(job, entry.point, node_id)
        else:
            self._metrics.observe_event(job, entry.event, convert.seconds(entry.time))

    async def _running(self, job: Job, attempt: int) -> None:
        """The first step is done. Somebody else's change wins: the next point comes soon."""
        first = job.started_at is None
        moved = job.moved(JobState.RUNNING, f"attempt {attempt} trains", time.time())
        if await self._jobs.change(job, moved, events.state_changed(moved, time.time())) and first:
            self._metrics.observe_running(job)

    async def _job(self, job_id: str) -> Job:
        job = await self._jobs.get(job_id)
        if job is None:
            raise JobNotFoundError(f"no job {job_id!r}")
        return job


def _record(entry: pb.ReportEntry, attempt: int) -> NewRecord | None:
    """What an entry adds to the stream; nothing where it says nothing."""
    if entry.WhichOneof("record") is None:
        return None
    at = min(convert.seconds(entry.time), time.time())  # a trainer's clock may be ahead of ours
    if entry.HasField("point"):
        return events.point_record(entry.point, at, attempt)
    return events.event_record(entry.event, at, attempt)
