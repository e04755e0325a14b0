"""What a caller can't overdo, and how the server begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service import interceptors, reports, server, servicer
from service.access import RULES, Other
from tests.fakes.api import ADMIN, Api, bearer, credential, hello, reason, served
from tests.fakes.control_plane import TINY, changed

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
METADATA = "169.254.169.254"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


async def test_a_message_past_the_limit_is_refused_and_the_next_is_answered(api: Api) -> None:
    request = pb.GetJobRequest(job_id="x" * (8 << 20))
    error = await api.refused("GetJob", request)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await api.call("ListJobs", pb.ListJobsRequest())


@pytest.mark.parametrize("method", ["SubmitJob", "PlanJob", "ImportCheckpoint"])
async def test_a_spec_past_the_limit_is_refused_before_it_is_read(api: Api, method: str) -> None:
    spec = pb.JobSpec(name="x" * servicer.MAX_SPEC_BYTES)
    error = await api.refused(method, getattr(pb, f"{method}Request")(spec=spec))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"at most {servicer.MAX_SPEC_BYTES}" in (error.details() or "")


async def once(request: Any) -> AsyncIterator[Any]:
    """One request of a stream that stays open."""
    yield request
    await asyncio.Event().wait()


def opened(api: Api, method: str, job_id: str) -> Any:
    """A stream that answers its first request, and then stays."""
    known: dict[str, Any] = {"metadata": bearer(ADMIN), "timeout": 20}
    match method:
        case "WatchJob":
            return api.training.WatchJob(pb.WatchJobRequest(job_id=job_id), **known)
        case "PutFile":
            content = pb.FileHeader(folder="d", name="a.parquet", size_bytes=1, sha256="0" * 64)
            return api.training.PutFile(once(pb.PutFileRequest(file=content)), **known)
        case "Report":
            known["metadata"] = bearer(credential(job_id))
            return rpc.RunServiceStub(api.channel).Report(once(hello(job_id)), **known)
        case "Watch":
            stub = health_pb2_grpc.HealthStub(api.channel)
            return stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    reflection = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    return reflection.ServerReflectionInfo(once(asked), timeout=20)


STREAMS = {
    "WatchJob": None,
    "PutFile": None,
    "Report": Other.ATTEMPT,
    "Watch": Other.OPEN,
    "ServerReflectionInfo": Other.OPEN,
}


@pytest.mark.parametrize(("method", "kind"), STREAMS.items())
async def test_so_many_streams_are_open_at_once_and_one_that_ends_makes_room(
    api: Api, monkeypatch: pytest.MonkeyPatch, method: str, kind: Other | None
) -> None:
    monkeypatch.setitem(interceptors.MAX_OPEN, kind, 2)
    job_id = (await api.submit()).job.id
    first, second = opened(api, method, job_id), opened(api, method, job_id)
    for call in (first, second):
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await opened(api, method, job_id).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "BUSY"
    assert "2 streams of such callers are open" in (caught.value.details() or "")
    others = [opened(api, each, job_id) for each in STREAMS if STREAMS[each] is not kind]
    for call in others:
        await call.read()  # they have their own room
    first.cancel()
    async with asyncio.timeout(20):
        while True:  # the server hears of the cancellation a moment later
            with contextlib.suppress(grpc.aio.AioRpcError):
                third = opened(api, method, job_id)
                await third.read()
                break
            await asyncio.sleep(0.01)
    for call in (second, third, *others):
        call.cancel()


async def test_one_token_does_not_take_the_room_of_others(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "MAX_OPEN_OF_ONE", 2)
    job_id = (await api.submit()).job.id
    wanted = pb.CreateTokenRequest(name="ci", role=pb.ROLE_READ)
    other = (await api.call("CreateToken", wanted)).secret

    def watch(token: str) -> Any:
        request = pb.WatchJobRequest(job_id=job_id)
        return api.training.WatchJob(request, metadata=bearer(token), timeout=20)

    mine = [watch(other) for _ in range(2)]
    for call in mine:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch(other).read()
    assert reason(caught.value) == "BUSY"
    for call in (theirs := watch(ADMIN), *mine):
        if call is theirs:
            await call.read()
        call.cancel()
    async with asyncio.timeout(20):
        while api.gate._open.total():  # the server hears of the cancellations a moment later
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", ["PauseJob", "CancelJob"])
async def test_so_many_calls_wait_for_a_job_at_once_and_others_are_answered(
    api: Api, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(interceptors.MAX_OPEN, interceptors.WAIT, 2)
    assert set(RULES) >= interceptors.WAITS
    job_id = (await api.submit()).job.id
    await api.plane.tick()
    request = getattr(pb, f"{method}Request")(job_id=job_id)
    waiting = [asyncio.create_task(api.call(method, request)) for _ in range(2)]
    async with asyncio.timeout(20):
        while (await api.plane.job(job_id)).desired == "RUNNING":
            await asyncio.sleep(0.01)
        while api.gate._open[interceptors.WAIT] < 2:
            await asyncio.sleep(0.01)
    error = await api.refused(method, request)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(error) == "BUSY"
    await api.call("GetJob", pb.GetJobRequest(job_id=job_id))
    api.plane.cluster.lose((job_id, 1))
    await api.plane.tick()
    for call in waiting:
        await call
    assert (await api.call(method, request)).job.id == job_id, "one that ends makes room"


async def test_an_attempt_has_a_few_streams_and_takes_nobody_elses(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MAX_STREAMS", 2)
    job_id, other = [(await api.submit()).job.id for _ in range(2)]
    kept = [opened(api, "Report", job_id) for _ in range(2)]
    for call in kept:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await opened(api, "Report", job_id).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "BUSY"
    kept.append(opened(api, "Report", other))
    await kept[-1].read()
    kept.pop(0).cancel()
    async with asyncio.timeout(20):
        while True:  # the server hears of the cancellation a moment later
            with contextlib.suppress(grpc.aio.AioRpcError):
                kept.append(opened(api, "Report", job_id))
                await kept[-1].read()
                break
            await asyncio.sleep(0.01)
    for call in kept:
        call.cancel()


@pytest.mark.parametrize("shape", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize("token", [None, ADMIN])
async def test_a_call_that_nobody_knows_is_refused_with_details(
    api: Api, shape: str, token: str | None
) -> None:
    names = ["everstep.v1.TrainingService/Nonsense", "nobody.Service/Call"]
    for name in names:
        answered = asyncio.Event()

        async def silent(until: asyncio.Event = answered) -> AsyncIterator[bytes]:
            await until.wait()  # Python's client calls a message that comes too late INTERNAL
            return
            yield

        call: Any = getattr(api.channel, shape)(f"/{name}")
        request = silent() if shape.startswith("stream") else b"anything"
        called = call(request, metadata=bearer(token) if token else (), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (called.read() if shape.endswith("stream") else called)
        answered.set()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert reason(caught.value) == "UNIMPLEMENTED"
    labels = {"method": "unknown", "code": "UNIMPLEMENTED"}
    assert api.plane.metrics.rpcs.labels(**labels)._value.get() == 2


@pytest.mark.parametrize(
    "uri",
    [
        f"http://{METADATA}/latest/meta-data",
        f"s3://{METADATA}:80/x",
        f"s3://user@{METADATA}/x",
        f"s3://bucket?endpoint=http://{METADATA}",
        "s3://[fe80::1]/x",
        "ftp://corpus/x",
        f"//{METADATA}/x",
    ],
)
async def test_no_uri_of_a_spec_names_an_endpoint(api: Api, uri: str) -> None:
    """Stores are reached where the service's own settings say, wherever a URI would point."""
    for sections in ({"data": {"source": uri}}, {"data": {"tokenizer": uri}}):
        spec = dict_to_proto(changed(TINY, **sections))
        error = await api.refused("PlanJob", pb.PlanJobRequest(spec=spec))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    spec = dict_to_proto(changed(TINY, start={"from": f"nanochat:{uri}@5"}))
    error = await api.refused("PlanJob", pb.PlanJobRequest(spec=spec))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    request = pb.ExportCheckpointRequest(checkpoint="JOB@5", target=uri)
    error = await api.refused("ExportCheckpoint", request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()


async def test_calls_that_send_nothing_are_bounded_before_anybody_is_asked_who_calls(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = dict(server.OPTIONS)["grpc.max_concurrent_streams"]
    let_in = 0
    through = interceptors.Gate.intercept_service

    async def counted(*call: Any) -> Any:
        nonlocal let_in
        let_in += 1
        return await through(*call)

    monkeypatch.setattr(interceptors.Gate, "intercept_service", counted)
    ended = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        await ended.wait()
        return
        yield

    opening: Any = api.channel.stream_unary("/everstep.v1.TrainingService/GetJob")
    calls = [opening(silent()) for _ in range(limit + 200)]
    async with asyncio.timeout(30):
        while let_in < limit:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)  # in which the others would have come
    assert let_in == limit
    for call in calls:
        call.cancel()
    ended.set()


async def test_a_page_token_outlives_the_service(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        made = [(await api.submit()).job.id for _ in range(3)]
        first = await api.call("ListJobs", pb.ListJobsRequest(page_size=1))
    async with served(tmp_path) as api:
        await api.submit()
        rest = pb.ListJobsRequest(page_size=5, page_token=first.next_page_token)
        page = await api.call("ListJobs", rest)
        assert [job.id for job in page.jobs] == made[1::-1]


async def test_a_stop_answers_what_is_under_way_and_health_says_that_it_ends(
    tmp_path: Path,
) -> None:
    async with contextlib.AsyncExitStack() as service:
        api = await service.enter_async_context(served(tmp_path))
        job_id = (await api.submit()).job.id
        watch = health_pb2_grpc.HealthStub(api.channel).Watch(
            health_pb2.HealthCheckRequest(service=""), timeout=20
        )
        assert (await watch.read()).status == SERVING
        pausing = asyncio.create_task(
            api.call("PauseJob", pb.PauseJobRequest(job_id=job_id)),
        )
        async with asyncio.timeout(20):
            while (await api.plane.job(job_id)).desired != "PAUSED":
                await asyncio.sleep(0.01)
        stopping = asyncio.create_task(api.server.stop())
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.training.ListJobs(pb.ListJobsRequest(), metadata=bearer(ADMIN), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await api.plane.tick()
        assert (await pausing).job.state == pb.JOB_STATE_PAUSED
        watch.cancel()
        await stopping
