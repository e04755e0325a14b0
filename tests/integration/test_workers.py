"""Several workers of one job: plain data parallelism over logical GPUs, by gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep import Client
from everstep.v1 import everstep_pb2 as pb
from tests.stack import (
    SMALL_JOB,
    Stack,
    is_alive,
    running_stack,
    wait_for_checkpoint,
    wait_for_state,
    wait_until,
)

ROOT = Path(__file__).parents[2]
STEPS = 30
STALL_FLOOR_S = 8.0


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose Ray has two GPUs that this box doesn't have."""
    state = tmp_path_factory.mktemp("gpus")
    with running_stack(state, ray_gpus=2, stall_floor_s=STALL_FLOOR_S) as stack:
        yield stack


def spec(workers: int) -> dict[str, object]:
    resources = {
        "workers": {"min": workers, "max": workers},
        "gpus_per_worker": 1,
        "cpus_per_worker": 1,
    }
    return {**SMALL_JOB, "schedule": {"num_iterations": STEPS}, "resources": resources}


def run(client: Client, workers: int) -> tuple[pb.Job, list[pb.MetricPoint]]:
    job = client.submit(spec(workers)).job
    job = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
    return job, [r.point for r in client.watch(job.id) if r.HasField("point")]


def test_a_foreign_client_submits_watches_and_cancels_by_reflection(gpus: Stack) -> None:
    def call(method: str, **request: object) -> list[dict[str, Any]]:
        """examples/buf-curl, as a person would; every message of the answer."""
        done = subprocess.run(
            [ROOT / "examples/buf-curl", method, json.dumps(request)],
            env={
                **os.environ,
                "EVERSTEP_STATE": str(gpus.state),
                "BUF": str(Path(sys.executable).with_name("buf")),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        found, decoder, text = [], json.JSONDecoder(), done.stdout.strip()
        while text:
            message, end = decoder.raw_decode(text)
            found.append(message)
            text = text[end:].lstrip()
        return found

    endless = {**spec(1), "schedule": {"num_iterations": 1_000_000}, "compile": "COMPILE_OFF"}
    endless["precision"] = {"compute": "COMPUTE_FP32"}
    (submitted,) = call("SubmitJob", spec=endless, request_id="by hand")
    job_id = submitted["job"]["id"]
    with gpus.client() as client:
        wait_until(lambda: client.get(job_id).step > 0, 240, "its first step")
    (cancelled,) = call("CancelJob", job_id=job_id)
    assert cancelled["job"]["state"] == "JOB_STATE_CANCELLED"
    records = call("WatchJob", job_id=job_id)
    assert any("point" in record for record in records)
    assert records[-1]["event"]["state"] == "JOB_STATE_CANCELLED"


def test_the_doctor_finds_a_running_service_well(gpus: Stack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "everstep.cli", "doctor", "--state", gpus.state, "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, found
    assert (found["ray"]["state"], found["store"]["state"]) == ("ok", "ok")
    assert "2 GPUs" in found["ray"]["found"]
    assert "our service runs" in found["grpc port"]["found"]


def test_two_workers_train_what_one_does(gpus: Stack) -> None:
    with gpus.client() as client:
        plan = client.plan(spec(2))
        assert plan.grad_accum_steps == 1
        one, alone = run(client, 1)
        two, together = run(client, 2)
        assert len(alone) == len(together) == STEPS
        # The same tokens in the same order; sums of gradients differ by rounding alone.
        for a, b in zip(alone, together, strict=True):
            assert (a.step, a.tokens) == (b.step, b.tokens)
            assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert two.validation_bpb == pytest.approx(one.validation_bpb, rel=1e-4)
        # A checkpoint of two workers is one of one: the job goes on with either.
        changes = {
            "start": {"from": f"{two.id}@latest"},
            "schedule": {"num_iterations": STEPS + 5},
            "resources": spec(1)["resources"],
        }
        continued = client.submit(changes, inherit=True).job
        done = wait_for_state(client, continued.id, pb.JOB_STATE_SUCCEEDED)
        assert done.attempts[0].start_step == STEPS


def test_a_rank_that_stands_still_is_told_and_the_job_goes_on(gpus: Stack) -> None:
    """A stopped rank 1 keeps rank 0 in a sum: rank 0's watchdog says where, and a restart heals."""
    endless = {**spec(2), "schedule": {"num_iterations": 1_000_000}}
    with gpus.client() as client:
        job = client.submit(endless).job
        reached = wait_for_checkpoint(client, job.id, 20)
        said = (r.line for r in client.logs(job.id, attempt=1, rank=1, follow=True))
        pid = next(line for line in said if "rank 1 of 2" in line).rpartition("process ")[2]
        last = psutil.Process(int(pid))
        last.send_signal(signal.SIGSTOP)
        wait_until(lambda: len(client.get(job.id).attempts) == 2, 120, "another attempt")
        newest, stalled = client.get(job.id).attempts
        assert stalled.outcome == "STALLED"
        assert newest.start_step >= reached.checkpoint.step
        wait_for_checkpoint(client, job.id, newest.start_step + 20)
        client.cancel(job.id)
        messages = [r.event.message for r in client.watch(job.id) if r.HasField("event")]
    (where,) = [message for message in messages if "rank 0 is at" in message]
    assert "sum_at_owner_" in where
    assert not is_alive(last)


def test_more_workers_than_gpus_are_refused(gpus: Stack) -> None:
    with gpus.client() as client, pytest.raises(Exception, match="needs 4 GPU, the cluster has 2"):
        client.plan({**spec(4), "batch": {"device_batch_size": 2, "total_batch_size": 1024}})
