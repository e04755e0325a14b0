"""Who may call what, and how every refusal reads: a real server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from service.jobs import Desired
from tests.fakes.api import (
    ADMIN,
    RUN,
    TRAINING,
    Api,
    bearer,
    credential,
    details,
    hello,
    points,
    reason,
    served,
)
from tests.fakes.control_plane import TINY, changed

SPEC = "INVALID_ARGUMENT"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


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
async def test_training_service_is_for_tokens_of_its_own(api: Api, token: str | None) -> None:
    for method in TRAINING.methods:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.raw(method, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
        assert reason(caught.value) == "UNAUTHENTICATED"


async def test_every_call_of_the_api_is_filled(api: Api) -> None:
    codes = {}
    for method in TRAINING.methods:
        try:
            await api.raw(method, ADMIN)
        except grpc.aio.AioRpcError as error:
            codes[method.name] = error.code()
    assert grpc.StatusCode.UNIMPLEMENTED not in codes.values(), codes


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
        ("ImportCheckpoint", pb.ImportCheckpointRequest(source="nanochat:/\0@5"), SPEC),
        ("ImportCheckpoint", pb.ImportCheckpointRequest(source="/x@" + "9" * 5000), SPEC),
        ("ExportCheckpoint", pb.ExportCheckpointRequest(checkpoint="J@5", target="file:/\0"), SPEC),
        ("ExportCheckpoint", pb.ExportCheckpointRequest(checkpoint="J@5", target="é" * 9000), SPEC),
        ("GetJob", pb.GetJobRequest(job_id="x" * 100_000), "NOT_FOUND"),
        ("GetJob", pb.GetJobRequest(job_id="é" * 100_000), "NOT_FOUND"),
    ],
)
async def test_a_wrong_request_is_the_callers_fault(
    api: Api, method: str, request_: Any, code: str
) -> None:
    error = await api.refused(method, request_)
    assert error.code().name == code
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details


async def test_a_filter_of_millions_of_states_is_one_of_five(api: Api) -> None:
    job_id = (await api.submit()).job.id
    request = pb.ListJobsRequest(states=[pb.JOB_STATE_QUEUED, pb.JOB_STATE_FAILED] * 2_000_000)
    async with asyncio.timeout(5):
        assert [job.id for job in (await api.call("ListJobs", request)).jobs] == [job_id]


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

    def counted() -> dict[tuple[str, str], float]:
        return {
            (sample.labels["method"].rpartition("/")[2], sample.labels["code"]): sample.value
            for metric in api.plane.metrics.rpcs.collect()
            for sample in metric.samples
            if sample.name == "everstep_rpcs_total"
        }

    # A call is counted when it has ended here, which its caller may learn a moment earlier.
    async with asyncio.timeout(10):
        while sum(counted().values()) < 3:
            await asyncio.sleep(0.01)
    assert counted() == {
        ("ListJobs", "OK"): 1.0,
        ("GetJob", "NOT_FOUND"): 1.0,
        ("Report", "UNAUTHENTICATED"): 1.0,
    }
