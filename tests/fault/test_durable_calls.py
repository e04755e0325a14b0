"""kill -9 of the service at any moment under calls of every kind that changes something.

The real gRPC server, stores and reconciler in a process of their own, over a scripted cluster.
What was answered is there afterwards; what was not may be there, whole, or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from tests.fakes.api import ADMIN, bearer, credential, hello, points
from tests.fakes.control_plane import TINY, changed
from tests.fault.seeds import drawn

ROOT = Path(__file__).parents[2]
KILLS = 6
CALLERS = 4
LONGEST_S = 0.05  # from the answer that is counted to the kill
SERVICE = """
import asyncio, sys
from pathlib import Path
from tests.fakes.api import served

async def main() -> None:
    async with served(Path(sys.argv[1])) as api:
        reconciling = asyncio.create_task(api.plane.reconciler.run())
        print(api.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        reconciling.cancel()

asyncio.run(main())
"""


@dataclass
class Known:
    """What callers were told of a job. asked: of the call that was under way when it was killed."""

    job_id: str
    request: pb.SubmitJobRequest
    priority: int = 0
    desired: int = pb.JOB_STATE_RUNNING
    step: int = 0  # acknowledged points are 1 to this
    events: int = 0  # that its acknowledged calls left: submitted, asked
    asked: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def service(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address and process, which is dead afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the service starts on what the kill left"
        try:
            yield address, process
        finally:
            process.kill()


class Callers:
    """Some clients at once, each with jobs of its own. counted: how many answers came."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.jobs: list[list[Known]] = [[] for _ in range(CALLERS)]
        self.submitted: list[pb.SubmitJobRequest] = []
        self.under_way: list[pb.SubmitJobRequest] = []
        self.counted = 0

    async def run(self, address: str, enough: int) -> None:
        """Call until `enough` answers came."""
        until = self.counted + enough
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.gather(*(self._one(channel, own, until) for own in self.jobs))

    async def _one(self, channel: grpc.aio.Channel, own: list[Known], until: int) -> None:
        stub, metadata = rpc.TrainingServiceStub(channel), bearer(ADMIN)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while self.counted < until:
                kind = self.draw.choice(["submit", "priority", "stop", "report"])
                if kind == "submit" or not own:
                    await self._submit(stub, own)
                else:
                    known = self.draw.choice(own)
                    await getattr(self, f"_{kind}")(stub, channel, known, metadata)
                    known.asked.clear()
                self.counted += 1

    async def _submit(self, stub: Any, own: list[Known]) -> None:
        request = pb.SubmitJobRequest(
            spec=dict_to_proto(changed(TINY, resources={"cpus_per_worker": 4})),
            request_id=f"request-{len(self.submitted)}",
        )
        self.submitted.append(request)
        self.under_way.append(request)
        answer = await stub.SubmitJob(request, metadata=bearer(ADMIN))
        self.under_way.remove(request)
        own.append(Known(answer.job.id, request, events=1))

    async def _priority(self, stub: Any, _channel: Any, known: Known, metadata: Any) -> None:
        known.asked = {"priority": self.draw.randint(-9, 9)}
        priority = known.asked["priority"]
        await stub.UpdateJob(
            pb.UpdateJobRequest(job_id=known.job_id, priority=priority), metadata=metadata
        )
        known.events += priority != known.priority
        known.priority = priority

    async def _stop(self, stub: Any, _channel: Any, known: Known, metadata: Any) -> None:
        """Asks for it only, as one who doesn't wait does: what was seen of it afterwards counts."""
        pauses = known.desired == pb.JOB_STATE_RUNNING
        known.asked = {"desired": pb.JOB_STATE_PAUSED if pauses else pb.JOB_STATE_RUNNING}
        if pauses:
            asked = stub.PauseJob(pb.PauseJobRequest(job_id=known.job_id), metadata=metadata)
            get = pb.GetJobRequest(job_id=known.job_id)
            while not asked.done():
                if (await stub.GetJob(get, metadata=metadata)).job.desired_state != known.desired:
                    break
            asked.cancel()
        else:
            await stub.ResumeJob(pb.ResumeJobRequest(job_id=known.job_id), metadata=metadata)
        known.events += 1
        known.desired = known.asked["desired"]

    async def _report(self, _stub: Any, channel: Any, known: Known, _metadata: Any) -> None:
        more = self.draw.randint(1, 20)
        call = rpc.RunServiceStub(channel).Report(metadata=bearer(credential(known.job_id)))
        await call.write(hello(known.job_id))
        before = (await call.read()).acknowledged_sequence
        await call.write(points(*range(before + 1, before + more + 1)))
        known.step = (await call.read()).acknowledged_sequence
        assert known.step == before + more
        await call.done_writing()


async def check(folder: Path, address: str, callers: Callers) -> None:
    """Nothing that was answered is lost, and what was not is whole where it is there."""
    metadata = bearer(ADMIN)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = rpc.TrainingServiceStub(channel)
        for known in [job for own in callers.jobs for job in own]:
            again = await stub.SubmitJob(known.request, metadata=metadata)
            assert again.job.id == known.job_id, "the same request is the same job"
            job = again.job
            assert job.spec.priority in {known.priority, known.asked.get("priority")}
            assert job.desired_state in {known.desired, known.asked.get("desired")}
            listed = pb.ListMetricsRequest(job_id=job.id)
            found = [p.step for p in (await stub.ListMetrics(listed, metadata=metadata)).points]
            assert found == list(range(1, len(found) + 1)), "each point once"
            assert len(found) >= known.step, "points that were acknowledged"
            cursors, told = stream(folder, job.id)
            assert cursors == list(range(1, len(cursors) + 1)), "no record lost or doubled"
            assert told >= known.events
            assert told <= known.events + len(known.asked)
            # From here on what was found counts.
            known.priority, known.desired = job.spec.priority, job.desired_state
            known.step, known.events = len(found), told
            known.asked.clear()
        for request in callers.under_way:  # asked again, as a client does
            answer = await stub.SubmitJob(request, metadata=metadata)
            twice = await stub.SubmitJob(request, metadata=metadata)
            assert twice.job.id == answer.job.id
            callers.jobs[0].append(Known(answer.job.id, request, events=1))
        callers.under_way.clear()


def stream(folder: Path, job_id: str) -> tuple[list[int], int]:
    """The cursors of a job's stream so far, and how many of its events a caller asked for."""
    query = "SELECT cursor, body FROM records WHERE job_id = ? ORDER BY cursor"
    with contextlib.closing(sqlite3.connect(folder / "everstep.db")) as database:
        found = database.execute(query, (job_id,)).fetchall()
    asked = 0
    for cursor, body in found:
        kind = pb.WatchJobResponse.FromString(body).event.kind
        asked += cursor == 1 or kind == pb.EVENT_KIND_REQUESTED
    return [cursor for cursor, _ in found], asked


async def test_no_answered_call_is_lost_by_kills_of_the_service(tmp_path: Path) -> None:
    callers = Callers(drawn("durable calls"))
    for _ in range(KILLS):
        before = callers.counted
        with service(tmp_path) as (address, process):
            await check(tmp_path, address, callers)
            calling = asyncio.create_task(callers.run(address, 10**6))
            enough = before + callers.draw.randint(1, 60)
            async with asyncio.timeout(60):
                while callers.counted < enough:
                    await asyncio.sleep(0)
            await asyncio.sleep(callers.draw.uniform(0, LONGEST_S))
            process.kill()
            assert process.wait(20) == -9, "the kill fired"
            await asyncio.wait_for(calling, 20)
    with contextlib.closing(sqlite3.connect(tmp_path / "everstep.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with service(tmp_path) as (address, _):
        await check(tmp_path, address, callers)
    jobs = [job for own in callers.jobs for job in own]
    assert len(jobs) > KILLS, "calls were answered between kills"
    assert any(job.step for job in jobs)
    assert any(job.priority for job in jobs)
    print(f"{callers.counted} answers over {KILLS} kills, {len(jobs)} jobs")
