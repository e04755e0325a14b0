"""TrainingService's handlers: decode, call a use case, encode. Nothing is decided here.

Calls that a later release fills answer UNIMPLEMENTED, which the generated base class does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service import convert
from service.errors import InvalidRequestError
from service.jobs import JobView
from service.lifecycle import Lifecycle, request_digest
from service.storage import Storage, Stored, manifest_sha256
from trainer.storage.manifest import Manifest

DEFAULT_PAGE = 50
MAX_PAGE = 500
MAX_REQUEST_ID = 128
MAX_POINTS = 20_000  # of one answer: about 12 MB

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(rpc.TrainingServiceServicer):  # type: ignore[misc]
    """See the .proto for what each call promises."""

    def __init__(self, lifecycle: Lifecycle, storage: Storage) -> None:
        self._lifecycle = lifecycle
        self._storage = storage

    async def SubmitJob(  # noqa: N802 - gRPC's name
        self, request: pb.SubmitJobRequest, _context: Context
    ) -> pb.SubmitJobResponse:
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidRequestError(f"request_id: at most {MAX_REQUEST_ID} characters")
        data = convert.spec_dict_from_proto(request.spec)
        if request.validate_only:
            resolved = await self._lifecycle.plan(data, request.inherit)
            plan = convert.plan_to_proto(resolved.plan, resolved.start)
            return pb.SubmitJobResponse(plan=plan)
        digest = request_digest(request.SerializeToString(deterministic=True))
        job, made = await self._lifecycle.submit(data, request.inherit, request.request_id, digest)
        view = await self._lifecycle.get(job.id)
        return pb.SubmitJobResponse(
            job=convert.job_to_proto(view),
            plan=convert.plan_to_proto(made.plan, made.start) if made else None,
        )

    async def PlanJob(  # noqa: N802
        self, request: pb.PlanJobRequest, _context: Context
    ) -> pb.PlanJobResponse:
        data = convert.spec_dict_from_proto(request.spec)
        resolved = await self._lifecycle.plan(data, request.inherit)
        return pb.PlanJobResponse(plan=convert.plan_to_proto(resolved.plan, resolved.start))

    async def GetJob(  # noqa: N802
        self, request: pb.GetJobRequest, _context: Context
    ) -> pb.GetJobResponse:
        view = await self._lifecycle.get(request.job_id)
        return pb.GetJobResponse(job=convert.job_to_proto(view))

    async def ListJobs(  # noqa: N802
        self, request: pb.ListJobsRequest, _context: Context
    ) -> pb.ListJobsResponse:
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidRequestError(f"page_size: {request.page_size}: 0 to {MAX_PAGE}")
        size = request.page_size or DEFAULT_PAGE
        try:
            before = _submission(request.page_token)
            states = [convert.state_from_proto(number) for number in request.states]
        except ValueError as error:
            raise InvalidRequestError(f"page_token or states: {error}") from error
        views = await self._lifecycle.page(states, before, size + 1)
        page = views[:size]
        more = len(views) > size
        return pb.ListJobsResponse(
            jobs=[convert.job_to_proto(view) for view in page],
            next_page_token=str(page[-1].job.submission) if more else "",
        )

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, _context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        if request.cursor < 0:
            raise InvalidRequestError(f"cursor: {request.cursor}: at least 0")
        async for record in self._lifecycle.watch(request.job_id, request.cursor):
            yield convert.record_to_proto(record)

    async def StreamLogs(  # noqa: N802
        self, request: pb.StreamLogsRequest, _context: Context
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        if request.attempt < 0 or request.rank < 0:
            raise InvalidRequestError("attempt and rank: at least 0")
        await self._lifecycle.get(request.job_id)
        lines = self._lifecycle.logs(
            request.job_id,
            request.attempt or None,
            request.rank if request.HasField("rank") else None,
            request.follow,
        )
        async for line in lines:
            yield pb.StreamLogsResponse(
                attempt=line.attempt,
                rank=line.rank,
                time=convert.timestamp(line.time),
                line=line.text,
            )

    async def PauseJob(  # noqa: N802
        self, request: pb.PauseJobRequest, _context: Context
    ) -> pb.PauseJobResponse:
        view, manifest = await self._lifecycle.pause(request.job_id)
        return pb.PauseJobResponse(
            job=convert.job_to_proto(view), final_checkpoint=_final_checkpoint(view, manifest)
        )

    async def ResumeJob(  # noqa: N802
        self, request: pb.ResumeJobRequest, _context: Context
    ) -> pb.ResumeJobResponse:
        view = await self._lifecycle.resume(request.job_id)
        return pb.ResumeJobResponse(job=convert.job_to_proto(view))

    async def CancelJob(  # noqa: N802
        self, request: pb.CancelJobRequest, _context: Context
    ) -> pb.CancelJobResponse:
        view, manifest = await self._lifecycle.cancel(request.job_id)
        return pb.CancelJobResponse(
            job=convert.job_to_proto(view), final_checkpoint=_final_checkpoint(view, manifest)
        )

    async def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, _context: Context
    ) -> pb.ListCheckpointsResponse:
        found = await self._lifecycle.checkpoints(request.job_id)
        return pb.ListCheckpointsResponse(checkpoints=[self._checkpoint(each) for each in found])

    async def VerifyCheckpoint(  # noqa: N802
        self, request: pb.VerifyCheckpointRequest, _context: Context
    ) -> pb.VerifyCheckpointResponse:
        stored, problems = await self._lifecycle.verify(request.checkpoint)
        return pb.VerifyCheckpointResponse(checkpoint=self._checkpoint(stored), problems=problems)

    async def DeleteCheckpoint(  # noqa: N802
        self, request: pb.DeleteCheckpointRequest, _context: Context
    ) -> pb.DeleteCheckpointResponse:
        await self._lifecycle.delete_checkpoint(request.checkpoint)
        return pb.DeleteCheckpointResponse()

    async def GetLineage(  # noqa: N802
        self, request: pb.GetLineageRequest, _context: Context
    ) -> pb.GetLineageResponse:
        found = await self._lifecycle.lineage(request.job_id)
        return pb.GetLineageResponse(ancestors=[pb.Ancestor(**asdict(each)) for each in found])

    async def ListMetrics(  # noqa: N802
        self, request: pb.ListMetricsRequest, _context: Context
    ) -> pb.ListMetricsResponse:
        for field in ("start_step", "end_step", "max_points"):
            if (value := getattr(request, field)) < 0:
                raise InvalidRequestError(f"{field}: {value}: at least 0")
        if 0 < request.end_step < request.start_step:
            raise InvalidRequestError(f"end_step: {request.end_step}: before start_step")
        records = await self._lifecycle.metrics(
            request.job_id,
            request.start_step,
            request.end_step or None,
            request.max_points or None,
            MAX_POINTS + 1,
        )
        if len(records) > MAX_POINTS:
            raise InvalidRequestError(
                f"max_points: {request.max_points}: an answer holds at most {MAX_POINTS} points; "
                "ask for fewer, or for one range of steps after the other"
            )
        return pb.ListMetricsResponse(
            points=[convert.record_to_proto(record).point for record in records]
        )

    def _checkpoint(self, stored: Stored) -> pb.Checkpoint:
        uri = self._storage.checkpoint_uri(stored.ref)
        if stored.manifest is None:
            return pb.Checkpoint(ref=convert.ref_to_proto(stored.ref), uri=uri)
        return convert.checkpoint_to_proto(stored.manifest, uri)


def _submission(page_token: str) -> int | None:
    """The submission number that a page token is; ValueError."""
    if not page_token:
        return None
    if not re.fullmatch("[0-9]{1,18}", page_token):
        raise ValueError("not a token that this service gave out")
    return int(page_token)


def _final_checkpoint(view: JobView, manifest: Manifest | None) -> pb.FinalCheckpoint:
    if manifest is None:
        return pb.FinalCheckpoint(reason=f"no step was checkpointed: {view.job.reason}")
    return pb.FinalCheckpoint(
        checkpoint=convert.ref_to_proto(manifest.ref),
        manifest_sha256=manifest_sha256(manifest),
        reason=view.job.reason,
    )
