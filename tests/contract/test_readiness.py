"""What health says of a service whose disk is full, whose reconciler is gone, or that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from everstep.v1 import everstep_pb2 as pb
from service import readiness
from service.readiness import look_after
from tests.fakes.api import TRAINING, Api, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WAIT_S = 20.0


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setattr(readiness, "LOOK_EVERY_S", 0.02)
    async with served(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def looked_after(api: Api, reconciling: asyncio.Task[None]) -> AsyncIterator[Any]:
    """What health says while somebody looks: a function that waits for the next change."""
    plane = api.plane
    looking = asyncio.create_task(
        look_after(plane.database, plane.jobs, plane.metrics, api.server, reconciling)
    )
    stub = health_pb2_grpc.HealthStub(api.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=TRAINING.full_name))

    async def told() -> int:
        return int((await asyncio.wait_for(watch.read(), WAIT_S)).status)

    try:
        yield told
    finally:
        watch.cancel()
        for task in (looking, reconciling):
            task.cancel()
        await asyncio.gather(looking, reconciling, return_exceptions=True)


@contextlib.contextmanager
def no_room_after(path: Path) -> Iterator[None]:
    """No file of this process grows past the size of that one, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_service_whose_disk_is_full_is_not_ready_until_there_is_room(
    api: Api, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = (await api.submit()).job.id
    async with looked_after(api, asyncio.create_task(api.plane.reconciler.run())) as told:
        assert await told() == SERVING
        with no_room_after(tmp_path / "everstep.db-wal"):
            assert await told() == NOT_SERVING
            request = pb.GetJobRequest(job_id=job_id)
            assert (await api.call("GetJob", request)).job.id == job_id, "reading goes on"
        assert await told() == SERVING
    assert "the service is not ready" in caplog.text


async def test_a_service_whose_writes_hang_is_not_ready_until_they_go_on(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(readiness, "LATE_S", 0.1)
    async with looked_after(api, asyncio.create_task(api.plane.reconciler.run())) as told:
        assert await told() == SERVING
        async with api.plane.database.write():
            assert await told() == NOT_SERVING
        assert await told() == SERVING
    assert "its database is silent" in caplog.text


async def test_a_cluster_that_is_away_leaves_it_ready(api: Api) -> None:
    api.plane.cluster.away = True
    async with looked_after(api, asyncio.create_task(api.plane.reconciler.run())) as told:
        assert await told() == SERVING
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(told(), 0.3)  # fifteen looks


async def test_a_service_whose_reconciler_has_ended_is_not_ready(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    breaks = asyncio.Event()

    async def broken() -> None:
        await breaks.wait()
        raise ValueError("a line that no tick outlives")

    async with looked_after(api, asyncio.create_task(broken())) as told:
        assert await told() == SERVING
        breaks.set()
        assert await told() == NOT_SERVING
    assert "a line that no tick outlives" in caplog.text


async def test_a_service_that_leaves_says_so_for_good_and_answers_on(api: Api) -> None:
    async with looked_after(api, asyncio.create_task(api.plane.reconciler.run())) as told:
        assert await told() == SERVING
        await api.server.leave()
        assert await told() == NOT_SERVING
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(told(), 0.3)  # fifteen looks
        await api.call("ListJobs", pb.ListJobsRequest())
