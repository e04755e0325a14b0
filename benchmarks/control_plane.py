"""Latency of the control plane while a job trains: `python -m benchmarks.control_plane`.

Talks to the service that runs in ./.everstep (or EVERSTEP_ADDRESS), which should be training; makes
CALLS of each kind, one after another, and submits nothing. Prints median and p99 in milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from everstep import Client
from everstep.v1 import everstep_pb2 as pb

CALLS = 300


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Median and 99th percentile of CALLS calls, in milliseconds."""
    times_ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - began) * 1000)
    return statistics.median(times_ms), statistics.quantiles(times_ms, n=100)[98]


def main() -> None:
    """Print a table."""
    with Client() as client:
        job = next(iter(client.list()))
        training = client.get(job.id).state == pb.JOB_STATE_RUNNING
        print(f"newest job {job.id}: {pb.JobState.Name(job.state)}, training: {training}")
        calls: dict[str, Callable[[], object]] = {
            "GetJob": lambda: client.get(job.id),
            "ListJobs": lambda: list(client.list()),
            "PlanJob": lambda: client.plan(job.spec),
            "ListCheckpoints": lambda: client.checkpoints(job.id),
        }
        for name, call in calls.items():
            median_ms, p99_ms = measure(call)
            print(f"{name:<16} median {median_ms:7.2f} ms   p99 {p99_ms:7.2f} ms   ({CALLS} calls)")


if __name__ == "__main__":
    main()
