"""The API as a client meets it: a real server on loopback, storage in a folder, a scripted Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service.interceptors import Gate
from service.jobs import Desired
from service.reports import RunServicer
from service.server import Server
from service.servicer import TrainingServicer
from tests.fakes.control_plane import TINY, ControlPlane, changed, control_plane
from tests.fakes.ray_cluster import FakeRayCluster
from trainer.contract.credential import AttemptIdentity, attempt_credential, host_key
from trainer.contract.outcome import AttemptResult, Outcome

ADMIN = "the-admin's"
SECRET = bytes(range(32))
FILLED = {
    "SubmitJob", "PlanJob", "GetJob", "ListJobs", "WatchJob", "PauseJob", "ResumeJob", "CancelJob",
    "ListCheckpoints",
}  # fmt: skip
TRAINING = pb.DESCRIPTOR.services_by_name["TrainingService"]
RUN = pb.DESCRIPTOR.services_by_name["RunService"]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def credential(job_id: str, attempt: int = 1, host: int = 1) -> str:
    identity = AttemptIdentity(job_id, host, attempt)
    return attempt_credential(host_key(SECRET, job_id, host), identity)


@dataclass
class Api:
    """A served control plane and a channel to it."""

    plane: ControlPlane
    channel: grpc.aio.Channel
    training: Any

    async def call(self, method: str, request: Any, token: str | None = ADMIN) -> Any:
        metadata = bearer(token) if token is not None else ()
        return await getattr(self.training, method)(request, metadata=metadata, timeout=20)

    async def refused(
        self, method: str, request: Any, token: str | None = ADMIN
    ) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, request, token)
        return caught.value

    async def submit(self, request_id: str = "", **sections: Any) -> pb.SubmitJobResponse:
        spec = dict_to_proto(changed(TINY, **sections))
        return await self.call("SubmitJob", pb.SubmitJobRequest(spec=spec, request_id=request_id))

    async def raw(self, method: MethodDescriptor, token: str | None) -> list[Any]:
        """Call any method of the descriptor with one empty request; every response."""
        stub = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, True): self.channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        service = method.containing_service.full_name
        call: Callable[..., Any] = stub(
            f"/{service}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        request = GetMessageClass(method.input_type)()
        metadata = bearer(token) if token is not None else ()
        argument = iter([request]) if method.client_streaming else request
        called = call(argument, metadata=metadata, timeout=20)
        if method.server_streaming:
            return [response async for response in called]
        return [await called]

    async def report(self, token: str, requests: list[pb.ReportRequest]) -> list[Any]:
        stub = rpc.RunServiceStub(self.channel)
        call = stub.Report(iter(requests), metadata=bearer(token), timeout=20)
        return [response async for response in call]


@asynccontextmanager
async def served(folder: Path, cluster: FakeRayCluster | None = None) -> AsyncIterator[Api]:
    async with control_plane(folder, cluster) as plane:
        server = Server(
            Gate(ADMIN, SECRET, plane.metrics),
            TrainingServicer(plane.lifecycle, plane.storage),
            RunServicer(plane.jobs, plane.records, plane.metrics, plane.reconciler.directive),
        )
        port = await server.start("127.0.0.1:0")
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Api(plane, channel, rpc.TrainingServiceStub(channel))
        finally:
            await server.stop()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


def details(error: grpc.aio.AioRpcError, kind: type[Any]) -> Any:
    """The google.rpc detail of a kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


def reason(error: grpc.aio.AioRpcError) -> str:
    info = details(error, error_details_pb2.ErrorInfo)
    assert info.domain == "everstep"
    return info.reason


def hello(job_id: str, attempt: int = 1) -> pb.ReportRequest:
    return pb.ReportRequest(hello=pb.Hello(job_id=job_id, attempt=attempt))


def points(*steps: int) -> pb.ReportRequest:
    entries = [
        pb.ReportEntry(sequence=step, point=pb.MetricPoint(step=step, step_s=0.5)) for step in steps
    ]
    return pb.ReportRequest(entries=entries)


async def test_a_submitted_job_comes_back_whole_with_its_plan(api: Api) -> None:
    made = await api.submit("R")
    assert made.job.state == pb.JOB_STATE_QUEUED
    assert made.plan.spec == made.job.spec
    assert made.plan.parameters_total == sum(each.count for each in made.plan.parameters)
    assert made.plan.grad_accum_steps == 2
    again = await api.submit("R")
    assert again.job == made.job
    found = await api.call("GetJob", pb.GetJobRequest(job_id=made.job.id))
    assert found.job == made.job
    assert made.job.spec.optimizer.HasField("matrix_lr")  # every default written out


async def test_validating_and_planning_create_nothing(api: Api) -> None:
    spec = dict_to_proto(TINY)
    only = await api.call("SubmitJob", pb.SubmitJobRequest(spec=spec, validate_only=True))
    assert not only.HasField("job")
    planned = await api.call("PlanJob", pb.PlanJobRequest(spec=spec))
    assert planned.plan == only.plan
    assert not (await api.call("ListJobs", pb.ListJobsRequest())).jobs


async def test_pages_hold_every_job_once_newest_first(api: Api) -> None:
    made = [(await api.submit()).job.id for _ in range(5)]
    seen: list[str] = []
    token = ""
    sizes = []
    while True:
        page = await api.call("ListJobs", pb.ListJobsRequest(page_size=2, page_token=token))
        sizes.append(len(page.jobs))
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert sizes == [2, 2, 1]
    assert seen == made[::-1]
    queued = pb.ListJobsRequest(states=[pb.JOB_STATE_QUEUED])
    assert len((await api.call("ListJobs", queued)).jobs) == 5
    running = pb.ListJobsRequest(states=[pb.JOB_STATE_RUNNING, pb.JOB_STATE_PAUSED])
    assert not (await api.call("ListJobs", running)).jobs


async def test_a_watch_goes_on_from_its_cursor_across_attempts_to_the_end(api: Api) -> None:
    job_id = (await api.submit()).job.id

    async def watch(cursor: int) -> list[pb.WatchJobResponse]:
        request = pb.WatchJobRequest(job_id=job_id, cursor=cursor)
        call = api.training.WatchJob(request, metadata=bearer(ADMIN), timeout=30)
        return [record async for record in call]

    watching = asyncio.create_task(watch(0))
    await api.plane.tick()
    answers = await api.report(credential(job_id), [hello(job_id), points(1, 2), points(2, 3)])
    assert [answer.acknowledged_sequence for answer in answers] == [0, 2, 3]
    api.plane.cluster.says((job_id, 1), AttemptResult(1, Outcome.WORKER_LOST, "killed", 3))
    await api.plane.tick()
    await api.report(credential(job_id, 2), [hello(job_id, 2), points(1, 2)])
    end = AttemptResult(2, Outcome.COMPLETED, "done", 12)
    api.plane.cluster.ends((job_id, 1), AttemptResult(1, Outcome.WORKER_LOST, "killed", 3), end)
    await api.plane.tick()
    records = await asyncio.wait_for(watching, 20)
    assert [record.cursor for record in records] == list(range(1, len(records) + 1))
    told = [
        pb.JobState.Name(record.event.state).removeprefix("JOB_STATE_")
        for record in records
        if record.event.kind == pb.EVENT_KIND_STATE_CHANGED
    ]
    assert told == ["QUEUED", "STARTING", "RUNNING", "STARTING", "RUNNING", "SUCCEEDED"]
    steps = [(r.attempt, r.point.step) for r in records if r.HasField("point")]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert await watch(4) == records[4:]
    job = (await api.call("GetJob", pb.GetJobRequest(job_id=job_id))).job
    assert [attempt.outcome for attempt in job.attempts] == ["COMPLETED", "WORKER_LOST"]
    assert job.latest.step == 2


async def test_a_running_jobs_watch_hears_what_comes_and_can_be_left(api: Api) -> None:
    job_id = (await api.submit()).job.id
    call = api.training.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=bearer(ADMIN))
    first = await call.read()
    assert first.event.state == pb.JOB_STATE_QUEUED
    waiting = asyncio.ensure_future(call.read())
    await api.plane.tick()
    assert (await asyncio.wait_for(waiting, 10)).event.state == pb.JOB_STATE_STARTING
    call.cancel()
    assert (await api.call("GetJob", pb.GetJobRequest(job_id=job_id))).job.id == job_id


async def test_a_cancelled_job_says_why_it_left_no_checkpoint(api: Api) -> None:
    job_id = (await api.submit()).job.id
    request = pb.CancelJobRequest(job_id=job_id)
    cancelling = asyncio.create_task(api.call("CancelJob", request))
    while (await api.plane.job(job_id)).desired is not Desired.CANCELLED:
        await asyncio.sleep(0.01)
    await api.plane.tick()
    answer = await asyncio.wait_for(cancelling, 10)
    assert answer.job.state == pb.JOB_STATE_CANCELLED
    assert not answer.final_checkpoint.HasField("checkpoint")
    assert answer.final_checkpoint.reason.startswith("no step was checkpointed")
    assert (await api.call("CancelJob", request)).job == answer.job
    refusal = await api.refused("PauseJob", pb.PauseJobRequest(job_id=job_id))
    assert refusal.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(refusal) == "PRECONDITION_FAILED"


async def test_a_job_without_checkpoints_lists_none(api: Api) -> None:
    job_id = (await api.submit()).job.id
    request = pb.ListCheckpointsRequest(job_id=job_id)
    assert not (await api.call("ListCheckpoints", request)).checkpoints


async def test_health_and_reflection_need_no_token(api: Api) -> None:
    health = health_pb2_grpc.HealthStub(api.channel)
    for name in ("", TRAINING.full_name, RUN.full_name):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([asked]), timeout=10):
        names = {service.name for service in answer.list_services_response.service}
        assert {TRAINING.full_name, RUN.full_name, "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("token", [None, "", "wrong", ADMIN[:-1], credential("JOB")])
async def test_training_service_is_for_the_admin_alone(api: Api, token: str | None) -> None:
    for method in TRAINING.methods:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.raw(method, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
        assert reason(caught.value) == "UNAUTHENTICATED"


async def test_what_is_not_built_yet_says_so(api: Api) -> None:
    for method in TRAINING.methods:
        if method.name in FILLED:
            continue
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.raw(method, ADMIN)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, method.name


@pytest.mark.parametrize("token", ["", ADMIN, "evr1.JOB.1.1.00"])
async def test_run_service_takes_no_token_but_an_attempts(api: Api, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.report(token, [hello("JOB")])
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_attempt_speaks_for_itself_alone(api: Api) -> None:
    mine, other = [(await api.submit()).job.id for _ in range(2)]
    cases = [
        (credential(mine), [hello(other)], grpc.StatusCode.PERMISSION_DENIED),
        (credential(mine), [hello(mine, 2)], grpc.StatusCode.PERMISSION_DENIED),
        (credential(mine), [points(1)], grpc.StatusCode.INVALID_ARGUMENT),
        (credential("NOBODY"), [hello("NOBODY")], grpc.StatusCode.NOT_FOUND),
    ]
    for token, requests, code in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.report(token, requests)
        assert caught.value.code() is code
    assert len(await api.plane.records.read(other, 0, 10)) == 1


async def test_an_attempt_that_was_superseded_is_told_to_stop(api: Api) -> None:
    job_id = (await api.submit()).job.id
    await api.report(credential(job_id, 2, host=2), [hello(job_id, 2)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.report(credential(job_id, 1), [hello(job_id, 1)])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) == "STALE_ATTEMPT"


async def test_the_answer_to_a_report_carries_the_wish_to_stop(api: Api) -> None:
    job_id = (await api.submit()).job.id
    await api.plane.tick()
    (answer,) = await api.report(credential(job_id), [hello(job_id)])
    assert answer.directive == pb.DIRECTIVE_UNSPECIFIED
    await api.plane.want(job_id, Desired.PAUSED)
    (answer,) = await api.report(credential(job_id), [hello(job_id)])
    assert answer.directive == pb.DIRECTIVE_STOP


async def test_a_refused_spec_carries_every_violation(api: Api) -> None:
    sections = {"model": {"depth": 0}, "batch": {"device_batch_size": -1}, "priority": 5000}
    spec = dict_to_proto(changed(TINY, **sections))
    error = await api.refused("SubmitJob", pb.SubmitJobRequest(spec=spec))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = details(error, error_details_pb2.BadRequest)
    found = {each.field: each.description for each in bad.field_violations}
    assert set(found) == {"model.depth", "batch.device_batch_size", "priority"}
    assert found["priority"].startswith("5000: ")


async def test_a_spec_that_is_wrong_everywhere_still_gets_its_answer(api: Api) -> None:
    spec = pb.JobSpec(name="x" * 3000)

    def spoil(message: Any) -> int:
        count = 0
        for field in message.DESCRIPTOR.fields:
            if field.message_type is not None:
                count += spoil(getattr(message, field.name))
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_DOUBLE):
                setattr(message, field.name, -(2**31))
                count += 1
            elif field.cpp_type == field.CPPTYPE_STRING:
                setattr(message, field.name, "?" * 2000)
                count += field.name != "validation"
        return count

    wrong = spoil(spec)
    spec.data.validation = "last"
    for _ in range(5):
        error = await api.refused("PlanJob", pb.PlanJobRequest(spec=spec))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
        bad = details(error, error_details_pb2.BadRequest)
        assert len(bad.field_violations) == wrong


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("GetJob", pb.GetJobRequest(job_id="NOBODY"), "NOT_FOUND"),
        ("GetJob", pb.GetJobRequest(job_id="\0"), "NOT_FOUND"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(job_id="a/b"), "NOT_FOUND"),
        ("ResumeJob", pb.ResumeJobRequest(), "NOT_FOUND"),
        ("ListJobs", pb.ListJobsRequest(page_size=501), "INVALID_ARGUMENT"),
        ("ListJobs", pb.ListJobsRequest(page_size=-1), "INVALID_ARGUMENT"),
        ("ListJobs", pb.ListJobsRequest(page_token="x"), "INVALID_ARGUMENT"),
        ("ListJobs", pb.ListJobsRequest(page_token="9" * 30), "INVALID_ARGUMENT"),
        ("ListJobs", pb.ListJobsRequest(page_token="9" * 5000), "INVALID_ARGUMENT"),
        ("ListJobs", pb.ListJobsRequest(states=[0]), "INVALID_ARGUMENT"),  # type: ignore[list-item]
        ("ListJobs", pb.ListJobsRequest(states=[99]), "INVALID_ARGUMENT"),  # type: ignore[list-item]
        ("SubmitJob", pb.SubmitJobRequest(request_id="x" * 129), "INVALID_ARGUMENT"),
    ],
)
async def test_a_wrong_request_is_the_callers_fault(
    api: Api, method: str, request_: Any, code: str
) -> None:
    assert (await api.refused(method, request_)).code().name == code


async def test_a_wrong_cursor_or_job_ends_a_watch(api: Api) -> None:
    job_id = (await api.submit()).job.id
    cases = [
        (pb.WatchJobRequest(job_id=job_id, cursor=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.WatchJobRequest(job_id="NOBODY"), grpc.StatusCode.NOT_FOUND),
    ]
    for request, code in cases:
        call = api.training.WatchJob(request, metadata=bearer(ADMIN), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [record async for record in call]
        assert caught.value.code() is code


async def test_a_request_id_used_for_something_else_is_refused(api: Api) -> None:
    await api.submit("R")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.submit("R", priority=1)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert reason(caught.value) == "REQUEST_ID_REUSED"


async def test_what_breaks_inside_stays_inside(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_job_id: str) -> None:
        raise RuntimeError("the admin's password is swordfish")

    monkeypatch.setattr(api.plane.lifecycle, "get", broken)
    error = await api.refused("GetJob", pb.GetJobRequest(job_id="x"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "swordfish" not in f"{error.details()}{error.trailing_metadata()}"
    number = (error.details() or "").split("number ")[1].split()[0]
    assert f"internal error {number}" in caplog.text
    assert "swordfish" in caplog.text


async def test_every_call_is_counted_with_its_code(api: Api) -> None:
    await api.call("ListJobs", pb.ListJobsRequest())
    await api.refused("GetJob", pb.GetJobRequest(job_id="x"))
    with pytest.raises(grpc.aio.AioRpcError):
        await api.report(ADMIN, [])
    counted = {
        (sample.labels["method"].rpartition("/")[2], sample.labels["code"]): sample.value
        for metric in api.plane.metrics.rpcs.collect()
        for sample in metric.samples
        if sample.name == "everstep_rpcs_total"
    }
    assert counted == {
        ("ListJobs", "OK"): 1.0,
        ("GetJob", "NOT_FOUND"): 1.0,
        ("Report", "UNAUTHENTICATED"): 1.0,
    }
