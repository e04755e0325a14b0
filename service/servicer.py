"""TrainingService's handlers: decode, call a use case, encode. Nothing is decided here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import grpc

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service import convert
from service.access import actor
from service.cluster import Cluster
from service.deletions import Deletions
from service.errors import BusyError, InvalidRequestError, ServiceError, require
from service.jobs import JobView
from service.lifecycle import Left, Lifecycle, request_digest
from service.planning import Resolved
from service.sampling import DEFAULT_TOKENS, Sampler, SampleWish
from service.storage import Storage, Stored, manifest_sha256
from service.tokens import Tokens
from service.transfers import Transfers
from service.updates import Updates
from service.uploads import Announced, Uploads

DEFAULT_PAGE = 50
MAX_PAGE = 500
MAX_REQUEST_ID = 128
PROGRESS_BYTES = 8 << 20  # how often an upload hears how far it is
UPLOAD_IDLE_S = 60.0  # between two pieces, from a slow disk over a slow line
MAX_POINTS = 5_000  # of one answer: within the 4 MiB that any client takes, at 700 bytes each
MAX_SPEC_BYTES = 64 << 10  # one with every field at its longest is a tenth of it

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(rpc.TrainingServiceServicer):  # type: ignore[misc]
    """See the .proto for what each call promises."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        storage: Storage,
        uploads: Uploads,
        sampler: Sampler,
        transfers: Transfers,
        tokens: Tokens,
        updates: Updates,
        deletions: Deletions,
        cluster: Cluster,
    ) -> None:
        self._lifecycle = lifecycle
        self._storage = storage
        self._uploads = uploads
        self._sampler = sampler
        self._transfers = transfers
        self._tokens = tokens
        self._updates = updates
        self._deletions = deletions
        self._cluster = cluster

    async def SubmitJob(  # noqa: N802 - gRPC's name
        self, request: pb.SubmitJobRequest, _context: Context
    ) -> pb.SubmitJobResponse:
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidRequestError(f"request_id: at most {MAX_REQUEST_ID} characters")
        data = _spec(request.spec)
        if request.validate_only:
            resolved = await self._lifecycle.plan(data, request.inherit)
            plan = plan_to_proto(resolved)
            return pb.SubmitJobResponse(plan=plan)
        digest = request_digest(request.SerializeToString(deterministic=True))
        view, made = await self._lifecycle.submit(
            data, request.inherit, request.request_id, digest, actor()
        )
        return pb.SubmitJobResponse(
            job=convert.job_to_proto(view),
            plan=plan_to_proto(made) if made else None,
        )

    async def PlanJob(  # noqa: N802
        self, request: pb.PlanJobRequest, _context: Context
    ) -> pb.PlanJobResponse:
        data = _spec(request.spec)
        resolved = await self._lifecycle.plan(data, request.inherit, request.device)
        plan = plan_to_proto(resolved)
        return pb.PlanJobResponse(plan=plan)

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
            states = {convert.state_from_proto(number) for number in set(request.states)}
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
        view, left = await self._lifecycle.pause(request.job_id, actor())
        return pb.PauseJobResponse(
            job=convert.job_to_proto(view), final_checkpoint=_final_checkpoint(view, left)
        )

    async def ResumeJob(  # noqa: N802
        self, request: pb.ResumeJobRequest, _context: Context
    ) -> pb.ResumeJobResponse:
        view = await self._lifecycle.resume(request.job_id, actor())
        return pb.ResumeJobResponse(job=convert.job_to_proto(view))

    async def CancelJob(  # noqa: N802
        self, request: pb.CancelJobRequest, _context: Context
    ) -> pb.CancelJobResponse:
        view, left = await self._lifecycle.cancel(request.job_id, actor())
        return pb.CancelJobResponse(
            job=convert.job_to_proto(view), final_checkpoint=_final_checkpoint(view, left)
        )

    async def UpdateJob(  # noqa: N802
        self, request: pb.UpdateJobRequest, _context: Context
    ) -> pb.UpdateJobResponse:
        priority = request.priority if request.HasField("priority") else None
        retention = {field.name: value for field, value in request.retention.ListFields()}
        view = await self._updates.update(request.job_id, priority, retention, actor())
        return pb.UpdateJobResponse(job=convert.job_to_proto(view))

    async def DeleteJob(  # noqa: N802
        self, request: pb.DeleteJobRequest, _context: Context
    ) -> pb.DeleteJobResponse:
        await self._deletions.delete(request.job_id, request.delete_checkpoints, actor())
        return pb.DeleteJobResponse()

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
        await self._lifecycle.delete_checkpoint(request.checkpoint, actor())
        return pb.DeleteCheckpointResponse()

    async def ImportCheckpoint(  # noqa: N802
        self, request: pb.ImportCheckpointRequest, _context: Context
    ) -> pb.ImportCheckpointResponse:
        data = _spec(request.spec)
        manifest = await self._transfers.bring(request.source, data, actor())
        return pb.ImportCheckpointResponse(
            checkpoint=self._checkpoint(Stored(manifest.ref, manifest))
        )

    async def ExportCheckpoint(  # noqa: N802
        self, request: pb.ExportCheckpointRequest, _context: Context
    ) -> pb.ExportCheckpointResponse:
        files = await self._transfers.export(
            request.checkpoint, request.target, request.format, actor()
        )
        return pb.ExportCheckpointResponse(files=files)

    async def GetLineage(  # noqa: N802
        self, request: pb.GetLineageRequest, _context: Context
    ) -> pb.GetLineageResponse:
        found, forks = await self._lifecycle.lineage(request.job_id)
        return pb.GetLineageResponse(
            ancestors=[convert.ancestor_to_proto(each) for each in found],
            forks=[pb.Fork(**asdict(each)) for each in forks],
        )

    async def CompareJobs(  # noqa: N802
        self, request: pb.CompareJobsRequest, _context: Context
    ) -> pb.CompareJobsResponse:
        return await self._lifecycle.compare(list(request.job_ids))

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
        # Beside other calls, which 5,000 points would hold up for 20 ms.
        return await asyncio.to_thread(
            lambda: pb.ListMetricsResponse(
                points=[convert.record_to_proto(record).point for record in records]
            )
        )

    async def PutFile(  # noqa: N802
        self, requests: AsyncIterator[pb.PutFileRequest], _context: Context
    ) -> AsyncIterator[pb.PutFileResponse]:
        first = await anext(requests, None)
        if first is None or not first.HasField("file"):
            raise InvalidRequestError("file: must be announced before its data")
        file = first.file
        announced = Announced(file.folder, file.name, file.size_bytes, file.sha256, file.overwrite)
        async with self._uploads.receive(announced) as upload:
            yield pb.PutFileResponse(present=upload.present, uri=upload.uri)
            if upload.present:
                return
            said = 0
            async for request in _promptly(requests):
                await upload.write(request.data)
                if upload.received_bytes - said >= PROGRESS_BYTES:
                    said = upload.received_bytes
                    yield pb.PutFileResponse(stored_bytes=said, uri=upload.uri)
        yield pb.PutFileResponse(present=True, stored_bytes=upload.received_bytes, uri=upload.uri)

    async def CreateToken(  # noqa: N802
        self, request: pb.CreateTokenRequest, _context: Context
    ) -> pb.CreateTokenResponse:
        role = convert.role_from_proto(request.role)
        token, secret = await self._tokens.create(request.name, role, actor())
        return pb.CreateTokenResponse(token=convert.token_to_proto(token), secret=secret)

    async def ListTokens(  # noqa: N802
        self, _request: pb.ListTokensRequest, _context: Context
    ) -> pb.ListTokensResponse:
        found = await self._tokens.all()
        return pb.ListTokensResponse(tokens=[convert.token_to_proto(token) for token in found])

    async def RevokeToken(  # noqa: N802
        self, request: pb.RevokeTokenRequest, _context: Context
    ) -> pb.RevokeTokenResponse:
        token = await self._tokens.revoke(request.name, actor())
        return pb.RevokeTokenResponse(token=convert.token_to_proto(token))

    async def GetCluster(  # noqa: N802
        self, _request: pb.GetClusterRequest, _context: Context
    ) -> pb.GetClusterResponse:
        return await self._cluster.look()

    async def DrainNode(  # noqa: N802
        self, request: pb.DrainNodeRequest, _context: Context
    ) -> pb.DrainNodeResponse:
        if request.undo:
            await self._cluster.undrain(request.node_id, actor())
            return pb.DrainNodeResponse()
        return pb.DrainNodeResponse(job_ids=await self._cluster.drain(request.node_id, actor()))

    async def SampleCheckpoint(  # noqa: N802
        self, request: pb.SampleCheckpointRequest, _context: Context
    ) -> AsyncIterator[pb.SampleCheckpointResponse]:
        wish = SampleWish(
            prompt=request.prompt,
            max_tokens=request.max_tokens or DEFAULT_TOKENS,
            temperature=request.temperature,
            top_k=request.top_k,
            seed=request.seed,
        )
        async with aclosing(self._sampler.sample(request.checkpoint, wish)) as texts:
            async for text in texts:
                yield pb.SampleCheckpointResponse(text=text)

    def _checkpoint(self, stored: Stored) -> pb.Checkpoint:
        uri = self._storage.checkpoint_uri(stored.ref)
        if stored.manifest is None:
            return pb.Checkpoint(ref=convert.ref_to_proto(stored.ref), uri=uri)
        return convert.checkpoint_to_proto(stored.manifest, uri)


async def _promptly(requests: AsyncIterator[pb.PutFileRequest]) -> AsyncIterator[pb.PutFileRequest]:
    """Requests as they come; BusyError where none does, for others wait for the place."""
    while True:
        try:
            async with asyncio.timeout(UPLOAD_IDLE_S):
                request = await anext(requests, None)
        except TimeoutError:
            raise BusyError(f"data: none came for {UPLOAD_IDLE_S:.0f} s; send it again") from None
        if request is None:
            return
        yield request


def _spec(spec: pb.JobSpec) -> dict[str, Any]:
    """A request's spec, as far as it was given."""
    size = spec.ByteSize()
    require(size <= MAX_SPEC_BYTES, f"spec: {size} bytes: at most {MAX_SPEC_BYTES}")
    return convert.spec_dict_from_proto(spec)


def plan_to_proto(resolved: Resolved) -> pb.Plan:
    """What was resolved and planned, as PlanJob answers it."""
    ancestors = [convert.ancestor_to_proto(each) for each in resolved.ancestors]
    return convert.plan_to_proto(resolved.plan, convert.ref_to_proto(resolved.start), ancestors)


def _submission(page_token: str) -> int | None:
    """The submission number that a page token is; ValueError."""
    if not page_token:
        return None
    if not re.fullmatch("[0-9]{1,18}", page_token):
        raise ValueError("not a token that this service gave out")
    return int(page_token)


def _final_checkpoint(view: JobView, left: Left) -> pb.FinalCheckpoint:
    if left is None:
        return pb.FinalCheckpoint(reason=f"no step was checkpointed: {view.job.reason}")
    if isinstance(left, ServiceError):
        known = view.progress.checkpoint
        return pb.FinalCheckpoint(
            checkpoint=convert.ref_to_proto(known) if known else None,
            reason=f"{view.job.reason}; what the store has of it can't be read now: {left}",
        )
    return pb.FinalCheckpoint(
        checkpoint=convert.ref_to_proto(left.ref),
        manifest_sha256=manifest_sha256(left),
        reason=view.job.reason,
    )
