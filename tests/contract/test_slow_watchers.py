"""Watchers that stop reading hold neither the service nor its memory, and miss nothing later.

The watchers are a process of their own: what this one grows by is the service's.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from tests.fakes.api import ADMIN, Api, bearer, credential, hello, served

POINTS = 10_000
BATCH = 200  # points of one report, as a trainer sends them after an outage
WATCHERS = 30
ANSWER_S = 1.0
GROWTH_BYTES = 56 << 20  # each watcher has a page of records in hand
# A job of 64 ranks and 8 groups of rates.
POINT = pb.MetricPoint(
    loss=3.1,
    step_s=0.5,
    rank_busy_s=[0.1 * rank for rank in range(64)],
    groups=[
        pb.GroupValues(group=f"matrix_512x{n}", learning_rate=0.01, momentum=0.9) for n in range(8)
    ],
)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


def batch(first: int) -> pb.ReportRequest:
    entries = []
    for step in range(first, first + BATCH):
        entries.append(pb.ReportEntry(sequence=step, point=POINT))
        entries[-1].point.step = step
    return pb.ReportRequest(entries=entries)


def stall(address: str, job_id: str, pipe: Connection) -> None:
    """A process of watchers that read one record each; told so, one of them reads the rest."""
    with grpc.insecure_channel(address) as channel:
        watch = rpc.TrainingServiceStub(channel).WatchJob
        request = pb.WatchJobRequest(job_id=job_id)
        calls = [watch(request, metadata=bearer(ADMIN)) for _ in range(WATCHERS)]
        pipe.send([next(call).cursor for call in calls])
        pipe.recv()
        cursors, steps = [], [0]
        while steps[-1] < POINTS:
            record = next(calls[0])
            cursors.append(record.cursor)
            steps += [record.point.step] if record.HasField("point") else []
        pipe.send((cursors, steps))


@contextlib.asynccontextmanager
async def stalled(address: str, job_id: str) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Such a process: a function that lets one of its watchers read on."""
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    child = spawned.Process(target=stall, args=(address, job_id, theirs), daemon=True)
    child.start()
    theirs.close()
    assert await asyncio.to_thread(ours.recv) == [1] * WATCHERS

    async def rest() -> Any:
        ours.send("go on")
        return await asyncio.to_thread(ours.recv)

    try:
        yield rest
    finally:
        child.kill()
        await asyncio.to_thread(child.join)
        ours.close()


async def test_watchers_that_stop_reading_hold_nobody_up_and_miss_nothing(api: Api) -> None:
    job_id = (await api.submit(schedule={"num_iterations": POINTS})).job.id
    await api.plane.tick()
    await api.report(credential(job_id), [hello(job_id)])
    async with stalled(api.address, job_id) as rest:
        process = psutil.Process()
        before, most, slowest_s = process.memory_info().rss, 0, 0.0
        for first in range(1, POINTS + 1, BATCH):
            report = api.report(credential(job_id), [hello(job_id), batch(first)])
            reporting = asyncio.create_task(report)
            begin = time.monotonic()
            await api.call("GetJob", pb.GetJobRequest(job_id=job_id))
            slowest_s = max(slowest_s, time.monotonic() - begin)
            assert (await reporting)[-1].acknowledged_sequence == first + BATCH - 1
            most = max(most, process.memory_info().rss - before)
        whole = POINTS * POINT.ByteSize() * WATCHERS
        print(f"slowest {slowest_s:.3f} s, grew {most >> 20} of {whole >> 20} MiB")
        assert slowest_s < ANSWER_S
        assert most < GROWTH_BYTES < whole / 4, "the points wait in the database, once"
        cursors, steps = await asyncio.wait_for(rest(), 60)
    assert cursors == list(range(2, len(cursors) + 2))
    assert steps == list(range(POINTS + 1))
