"""The control plane under many jobs, watchers and reporters: `python -m benchmarks.control_plane`.

A service of its own in another process: real gRPC, real SQLite, the real reconciler, over a
scripted cluster instead of Ray (tests/fakes), beside a real trainer on one thread. First with 100
jobs in the store, then with 10,000. Prints latencies in milliseconds, and the service's CPU share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import sqlalchemy as sa

from everstep.specs import spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service.jobs import Job
from service.placement import Node
from service.scheduler import decide
from service.store.job_store import _job_columns
from service.store.schema import jobs, progress
from tests.fakes.api import ADMIN, Api, bearer, credential, served
from tests.fakes.attempts import Bucket, small_corpus
from tests.fakes.control_plane import TINY, changed, new_job
from trainer.contract.spec import JobSpec
from trainer.contract.states import JobState

SIZES = (100, 10_000)
CALLS = 300
SUBMISSIONS = 100
UNFINISHED = 60  # of the jobs in the store, whatever their number
REPORTERS, POINTS_PER_S, REPORT_S = 50, 10, 10
WATCHERS = 200
FLUSH_S = 0.5  # as trainers do
CATCH_UP_S = 60.0  # of the last watcher, after the last point
Measured = tuple[float, float]


def summary(times_s: list[float]) -> Measured:
    """Median and 99th percentile in milliseconds."""
    times_ms = [each * 1000 for each in times_s]
    return statistics.median(times_ms), statistics.quantiles(times_ms, n=100)[98]


async def measured(call: Callable[[int], Awaitable[object]], calls: int = CALLS) -> Measured:
    """Calls one after another, as one client makes them; those of the first tenth don't count."""
    times = []
    for number in range(calls + calls // 10):
        began = time.perf_counter()
        await call(number)
        times.append(time.perf_counter() - began)
    return summary(times[calls // 10 :])


def show(name: str, found: Measured) -> None:
    """One line of the table."""
    print(f"  {name:<34} median {found[0]:8.2f} ms   p99 {found[1]:8.2f} ms", flush=True)


async def fill(api: Api, count: int) -> None:
    """Jobs in one transaction: all but UNFINISHED have succeeded."""
    rows = []
    for number in range(count):
        final = number < count - UNFINISHED
        state = JobState.SUCCEEDED if final else JobState.RUNNING
        job = new_job(number, state=state, host_number=1, ended_at=time.time() if final else None)
        rows.append({**_job_columns(job), "version": 0})
    async with api.plane.database.write() as connection:
        await connection.execute(sa.insert(jobs), rows)
        streams = [{"job_id": row["id"], "next_cursor": 1, "step": 0} for row in rows]
        await connection.execute(sa.insert(progress), streams)


async def serve(folder: Path, count: int) -> None:
    """The service's process: says where it listens, ends with its standard input."""
    async with served(folder) as api:
        await fill(api, count)
        from service.ray_cluster import HostStatus

        for number in range(count - UNFINISHED, count):
            key = (f"JOB{number}", 1)
            api.plane.cluster.known[key] = HostStatus(*key, answered=True)
        reconciling = asyncio.create_task(api.plane.reconciler.run())
        gc.freeze()  # as the service does
        print(api.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        reconciling.cancel()


@contextlib.contextmanager
def training(folder: Path) -> Iterator[None]:
    """A trainer at work on one thread, from its first step on."""
    bucket = Bucket(folder)
    data = small_corpus(folder / "data")
    bucket.add("LOAD", data=data, schedule={"num_iterations": 1_000_000})
    words = ["--storage", bucket.uri, "--job", "LOAD", "--threads", "1"]
    words += ["--cache", str(folder / "cache")]
    command = [sys.executable, "-m", "trainer", *words]
    told = folder / "told"
    with told.open("w") as output, subprocess.Popen(command, stdout=output) as process:
        try:
            while "step " not in told.read_text():  # a start takes both cores for seconds
                assert process.poll() is None, "the trainer trains"
                time.sleep(0.1)
            yield
        finally:
            process.kill()


async def report(address: str, number: int, done: list[int]) -> None:
    """An attempt that reports for REPORT_S; done: what was acknowledged as durable."""
    job_id, sequence = f"JOB{number}", 0
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.RunServiceStub(channel).Report(metadata=bearer(credential(job_id)))
        await call.write(pb.ReportRequest(hello=pb.Hello(job_id=job_id, attempt=1)))
        await call.read()
        until = time.monotonic() + REPORT_S
        while time.monotonic() < until:
            await asyncio.sleep(FLUSH_S)
            entries = []
            for _ in range(int(POINTS_PER_S * FLUSH_S)):
                sequence += 1
                point = pb.MetricPoint(step=sequence, loss=2.0, step_s=0.1, tokens=sequence)
                entry = pb.ReportEntry(sequence=sequence, point=point)
                entry.time.FromNanoseconds(time.time_ns())
                entries.append(entry)
            await call.write(pb.ReportRequest(entries=entries))
            answer = await call.read()
            assert answer.acknowledged_sequence == sequence, "all of it is durable"
        await call.done_writing()
        done.append(sequence)


async def watch(
    address: str, job_id: str, lags_s: list[float], got: list[int], number: int
) -> None:
    """One watcher: how late points come, and how many."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = pb.WatchJobRequest(job_id=job_id)
        call = rpc.TrainingServiceStub(channel).WatchJob(request, metadata=bearer(ADMIN))
        with contextlib.suppress(asyncio.CancelledError):
            async for answer in call:
                if answer.HasField("point"):
                    got[number] += 1
                    lags_s.append(time.time() - answer.time.ToNanoseconds() / 1e9)


async def streams(address: str, service: psutil.Process, count: int) -> None:
    """REPORTERS attempts report, and WATCHERS watch one of them."""
    numbers = range(count - UNFINISHED, count - UNFINISHED + REPORTERS)
    lags: list[float] = []
    done: list[int] = []
    for watchers in (0, WATCHERS):
        lags.clear()
        done.clear()
        got = [0] * watchers
        # Attempts of jobs that reported before go on: their points are told as known.
        picked = numbers if not watchers else [numbers[-1] + 1]
        watching = [
            asyncio.create_task(watch(address, f"JOB{picked[0]}", lags, got, number))
            for number in range(watchers)
        ]
        cpu, began = sum(service.cpu_times()[:2]), time.monotonic()
        await asyncio.gather(*(report(address, number, done) for number in picked))
        share = (sum(service.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
        print(
            f"  {len(done)} jobs reporting, {watchers} watchers: {sum(done)} points, all durable;"
        )
        print(f"    the service takes {share:.0%} of one core")
        until = time.monotonic() + CATCH_UP_S
        while any(each < done[0] for each in got) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        if watchers:
            print(f"    each watcher got {min(got)} to {max(got)} of {done[0]} points;")
            show("a point's age at a watcher", summary(lags))


async def calls(address: str, service: psutil.Process, count: int) -> None:
    """What clients ask for, one after another."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = rpc.TrainingServiceStub(channel)
        metadata = bearer(ADMIN)
        spec = spec_to_proto(JobSpec.parse(changed(TINY, resources={"cpus_per_worker": 4})))

        def submit(number: int) -> Any:
            request = pb.SubmitJobRequest(spec=spec, request_id=f"{count}-{number}")
            return stub.SubmitJob(request, metadata=metadata)

        def get(number: int) -> Any:
            request = pb.GetJobRequest(job_id=f"JOB{number * 7 % count}")
            return stub.GetJob(request, metadata=metadata)

        def page(number: int) -> Any:
            return stub.ListJobs(pb.ListJobsRequest(page_size=50), metadata=metadata)

        show("GetJob", await measured(get))
        show("ListJobs, a page of 50", await measured(page))
        show("SubmitJob", await measured(submit, SUBMISSIONS))
    await streams(address, service, count)


def decisions(count: int) -> None:
    """The scheduler alone, with every job queued: far more than ever wait."""
    queued: list[Job] = [new_job(n, submission=n) for n in range(count)]
    times = []
    for _ in range(30):
        began = time.perf_counter()
        decide(queued, [], [Node("node", "127.0.0.1", gpus=0, cpus=64)])
        times.append(time.perf_counter() - began)
    show(f"a decision over {count} queued", summary(times))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.jobs))
        return
    for count in SIZES:
        with tempfile.TemporaryDirectory(prefix="everstep-bench-") as name:
            folder = Path(name)
            command = [sys.executable, "-m", "benchmarks.control_plane"]
            command += ["--serve", str(folder / "service"), "--jobs", str(count)]
            with (
                training(folder),
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                ) as service,
            ):
                assert service.stdout is not None
                address = service.stdout.readline().strip()
                print(f"{count} jobs, {UNFINISHED} of them running:", flush=True)
                asyncio.run(calls(address, psutil.Process(service.pid), count))
                assert service.stdin is not None
                service.stdin.close()
        decisions(count)


if __name__ == "__main__":
    main()
