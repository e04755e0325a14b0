"""What the control plane costs at size: `python -m benchmarks.scale`. No Ray, no GPU.

Real SQLite, the real scheduler, store, ledger and metrics, in one process. Prints one line a
figure; docs/scale.md says what each is the limit of. CPU seconds, so that other work on the machine
counts little; where the disk is waited for, wall seconds.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.cluster import Cluster
from service.jobs import Attempt, Job
from service.metrics import Metrics
from service.placement import Node
from service.scheduler import decide
from service.store import Database, DrainStore, JobStore, RecordStore
from service.upkeep import Upkeep
from tests.fakes.control_plane import new_job
from trainer.contract.states import JobState

GPUS_A_NODE = 8
JOBS = 1000
POINTS = 2000


def cpu_ms(call: Callable[[], object], times: int = 20) -> float:
    """Milliseconds of CPU of one call, the mean of some."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times * 1e3


def box(number: int) -> Node:
    return Node(f"node{number}", f"10.0.{number // 250}.{number % 250}", GPUS_A_NODE, 64)


def gpu_job(number: int, workers: int, **changes: object) -> Job:
    """A job of so many GPUs."""
    resources = {
        "workers": {"min": workers, "max": workers},
        "gpus_per_worker": 1,
        "cpus_per_worker": 2,
    }
    batch = {"device_batch_size": 1, "total_batch_size": 64 * workers}
    spec = {"resources": resources, "batch": batch}
    return new_job(number, spec=spec, submission=number, **changes)


def decisions() -> None:
    """One tick's decision, on a cluster that is full."""
    for gpus in (8, 64, 1024):
        nodes = [box(n) for n in range(gpus // GPUS_A_NODE)]
        full = [
            replace(gpu_job(n, 8, state=JobState.RUNNING), placement=(node.id,) * 8, workers=8)
            for n, node in enumerate(nodes)
        ]
        for waiting in (10, JOBS):
            queued = [gpu_job(10_000 + n, 8) for n in range(waiting)]
            cost = cpu_ms(lambda: decide(queued, full, nodes), 3)  # noqa: B023 - called at once
            print(f"decision, {gpus} GPUs full, {waiting} jobs queued: {cost:.1f} ms of CPU")
        whole = [gpu_job(1, gpus)]
        cost = cpu_ms(lambda: decide(whole, [], nodes), 5)  # noqa: B023 - called at once
        print(f"decision, one job of {gpus} GPUs onto an empty cluster: {cost:.1f} ms of CPU")


def point(step: int) -> pb.MetricPoint:
    """Of usual size."""
    made = pb.MetricPoint(step=step, loss=3.0, step_s=1.0, tokens_per_s=1e5, tokens=step * 65536)
    for group in ("lm_head", "wte", "value_embeds", "resid", "x0", "smear", "m1", "m2", "m3"):
        made.groups.add(group=group, learning_rate=1e-3, momentum=0.9, weight_decay=0.1)
    return made


async def store(folder: Path) -> None:
    """A thousand jobs that are not final: what each report, look and scrape costs."""
    database = await Database.open(folder / "everstep.db")
    jobs, records = JobStore(database), RecordStore(database)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in range(JOBS):
        job = new_job(number)
        await jobs.insert(job, events.state_changed(job, time.time()))
        begun = Attempt(job.id, 1, time.time(), 0)
        await records.begin_attempt(begun, events.attempt_started(1, 0, time.time()))
        await records.append(job.id, [events.point_record(point(1), time.time(), 1)])
        metrics.observe_point(job, point(1))
    began, cpu = time.perf_counter(), time.process_time()
    for step in range(2, 2 + POINTS // 2):
        pair = [events.point_record(point(step + each), time.time(), 1) for each in (0, 1)]
        numbered = [(2 * step - 3 + each, record) for each, record in enumerate(pair)]
        await records.append_reported("JOB0", 1, numbered)
    wall_ms = (time.perf_counter() - began) / (POINTS // 2) * 1e3
    busy_ms = (time.process_time() - cpu) / (POINTS // 2) * 1e3
    print(f"a report of two points: {wall_ms:.2f} ms, {busy_ms:.2f} ms of CPU")
    cpu = time.process_time()
    for _ in range(5):
        metrics.set_accounts(await jobs.accounts(metrics.accounted))
    print(f"accounts of {JOBS} jobs, every 2 s: {(time.process_time() - cpu) / 5 * 1e3:.0f} ms CPU")
    cpu = time.process_time()
    text = generate_latest(registry)
    busy_ms = (time.process_time() - cpu) * 1e3
    print(f"a scrape of {JOBS} jobs: {busy_ms:.0f} ms CPU, {len(text) / JOBS / 1e3:.1f} kB a job")
    job = (await jobs.unfinished())[0]
    busy_s = 0.0
    for number in range(5):
        changed = await jobs.change(job, replace(job, reason=str(number)))
        assert changed is not None
        job, cpu = changed, time.process_time()
        await jobs.unfinished()
        busy_s += time.process_time() - cpu
    print(f"all {JOBS} jobs read after one changed: {busy_s / 5 * 1e3:.0f} ms CPU")
    upkeep = Upkeep(DrainStore(database))
    nodes = upkeep.mark([box(n) for n in range(128)])
    told = (lambda: nodes, time.time)
    cluster = Cluster(jobs, records, *told, metrics.samples, upkeep, lambda: None, lambda job: job)
    cpu = time.process_time()
    answer = await cluster.look()
    busy_ms = (time.process_time() - cpu) * 1e3
    print(f"GetCluster, 128 nodes, {JOBS} jobs: {busy_ms:.0f} ms CPU, {answer.ByteSize():,} bytes")
    await database.close()
    size = (folder / "everstep.db").stat().st_size
    print(f"the database: {size / 1e6:.1f} MB with {JOBS} jobs and {JOBS + POINTS} points")


def main() -> None:
    """Print all figures."""
    decisions()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(store(Path(folder)))


if __name__ == "__main__":
    main()
