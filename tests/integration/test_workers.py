"""Several workers of one job, as many as have room: over logical GPUs, by gloo on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep import Client
from everstep.errors import EverstepError
from everstep.v1 import everstep_pb2 as pb
from service.parts import MARK
from tests.stack import (
    SMALL_JOB,
    WAIT_S,
    Stack,
    is_alive,
    running_stack,
    wait_for_an_empty_ray,
    wait_for_checkpoint,
    wait_for_state,
    wait_until,
)
from trainer.contract.memory import ALLOCATOR

ROOT = Path(__file__).parents[2]
STEPS = 70
STALL_FLOOR_S = 8.0
STOP_GRACE_S = 20.0
# Ray tells GPUs that it was told of from cards that it has found.
BACKEND = "nccl" if any(Path("/dev").glob("nvidia[0-9]*")) else "gloo"


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose Ray has two GPUs that this box doesn't have."""
    state = tmp_path_factory.mktemp("gpus")
    settings = {"stall_floor_s": STALL_FLOOR_S, "stop_grace_s": STOP_GRACE_S}
    with running_stack(state, ray_gpus=2, **settings) as stack:
        yield stack


def spec(workers: int) -> dict[str, Any]:
    resources = {
        "workers": {"min": workers, "max": workers},
        "gpus_per_worker": 1,
        "cpus_per_worker": 1,
    }
    batch = {"device_batch_size": 4, "total_batch_size": 4096}  # steps long enough to catch
    schedule = {"num_iterations": STEPS}
    return {**SMALL_JOB, "batch": batch, "schedule": schedule, "resources": resources}


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


def points(client: Client, job_id: str) -> dict[int, pb.MetricPoint]:
    return {r.point.step: r.point for r in client.watch(job_id) if r.HasField("point")}


def test_a_job_that_grows_and_shrinks_trains_what_one_worker_does(gpus: Stack) -> None:
    """Two GPUs: alone has one until it ends; then the job grows; then for another it shrinks."""
    workers = {"min": 1, "max": 2, "policy": "elastic", "cooldown_s": 0}
    elastic = {**spec(1), "resources": {**spec(1)["resources"], "workers": workers}}
    with gpus.client() as client:
        plan = client.plan(elastic)
        assert [(each.workers, each.grad_accum_steps) for each in plan.workers] == [(1, 8), (2, 4)]
        alone = client.submit(spec(1)).job
        wait_until(lambda: trains(client.get(alone.id), 1), WAIT_S, "the first job's first step")
        job = client.submit(elastic).job  # so it is far from its end when the other one ends
        wait_for_state(client, alone.id, pb.JOB_STATE_SUCCEEDED)
        wait_until(lambda: trains(client.get(job.id), 2), WAIT_S, "its growth")
        grown = client.get(job.id)
        assert grown.workers == 2
        place = grown.attempts[0].start_step
        # From the state that it grew at, on one worker; there is no place for it but the job's.
        other = client.submit({**spec(1), "start": {"from": f"{job.id}@{place}"}}).job
        wait_until(lambda: trains(client.get(job.id), 3), WAIT_S, "its giving back")
        assert client.get(job.id).workers == 1
        done = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
        wait_for_state(client, other.id, pb.JOB_STATE_SUCCEEDED)
        told = [r.event.message for r in client.watch(job.id) if "resized" in r.event.message]
        assert told[0].startswith("resized from 1 to 2 workers: there is room for more; stopped")
        assert told[1].startswith(f"resized from 2 to 1 workers: job {other.id} can start; stopped")
        assert {attempt.outcome for attempt in done.attempts} == {"STOPPED", "COMPLETED"}
        one, many, same = (points(client, each.id) for each in (alone, job, other))
        bits = [client.get(each.id).validation_bpb for each in (alone, job, other)]
    assert list(many) == list(one) == list(range(1, STEPS + 1)), "no step is lost or done twice"
    assert [p.tokens for p in many.values()] == [p.tokens for p in one.values()]
    for step, point in many.items():  # the same tokens in the same order
        assert point.loss == pytest.approx(one[step].loss, rel=1e-5)
    before, after = range(1, place + 1), range(place + 1, place + 3)
    assert [many[n].loss for n in before] == [one[n].loss for n in before], "to the bit"
    for step in after:  # from the same state two workers do what one does
        assert many[step].loss == pytest.approx(same[step].loss, rel=1e-6)
        assert many[step].gradient_norm == pytest.approx(same[step].gradient_norm, rel=1e-6)
    assert bits == pytest.approx([bits[0]] * 3, rel=1e-5)


def trains(job: pb.Job, attempt: int) -> bool:
    """Whether that attempt has begun and trains; fails where the job is done before."""
    assert job.state not in (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED), job
    return len(job.attempts) >= attempt and job.state == pb.JOB_STATE_RUNNING


def test_a_rank_that_stands_still_is_told_and_the_job_goes_on(gpus: Stack) -> None:
    """A stopped rank 1 keeps rank 0 in a sum: rank 0's watchdog says where, and a restart heals."""
    endless = {**spec(2), "schedule": {"num_iterations": 1_000_000}}
    with gpus.client() as client:
        job = client.submit(endless).job
        reached = wait_for_checkpoint(client, job.id, 20)
        assert f"ranks speak {BACKEND}" in log_of(gpus.ray_process("ray::AttemptHost"))
        said = (r.line for r in client.logs(job.id, attempt=1, rank=1, follow=True))
        pid = next(line for line in said if "rank 1 of 2" in line).rpartition("process ")[2]
        last = psutil.Process(int(pid))
        assert last.environ()["PYTORCH_CUDA_ALLOC_CONF"] == ALLOCATOR, "before torch is loaded"
        last.send_signal(signal.SIGSTOP)
        wait_until(lambda: len(client.get(job.id).attempts) == 2, 120, "another attempt")
        newest, stalled = client.get(job.id).attempts
        assert stalled.outcome == "STALLED"
        assert newest.start_step >= reached.checkpoint.step
        wait_for_checkpoint(client, job.id, newest.start_step + 20)
        client.cancel(job.id)
        messages = [r.event.message for r in client.watch(job.id) if r.HasField("event")]
    (where,) = [message for message in messages if "rank 0 is at" in message]
    assert "torch/distributed" in where, "in whichever of a step's sums and answers it was"
    assert not is_alive(last)


def test_what_a_rank_wrote_last_is_kept_when_rays_files_are_gone(gpus: Stack) -> None:
    """Rank 1 speaks as C++ does, with a secret, and aborts; every rank's words are readable."""
    endless = {**spec(2), "schedule": {"num_iterations": 1_000_000}}
    secret = gpus.wiring["s3_secret_key"]
    with gpus.client() as client:
        job = client.submit(endless).job
        wait_for_checkpoint(client, job.id, 20)
        said = (r.line for r in client.logs(job.id, attempt=1, rank=1, follow=True))
        pid = next(line for line in said if "rank 1 of 2" in line).rpartition("process ")[2]
        with Path(f"/proc/{pid}/fd/2").open("a") as standard_error:
            standard_error.write(f"NCCL WARN as scripted, with {secret}\n")
        os.kill(int(pid), signal.SIGABRT)
        wait_until(lambda: len(client.get(job.id).attempts) == 2, 120, "another attempt")
        start = client.get(job.id).attempts[0].start_step
        wait_for_checkpoint(client, job.id, start + 20)
        logs = logs_of(gpus.ray_process("ray::AttemptHost"))
        client.cancel(job.id)
        files = [*logs.glob("worker-*"), *logs.glob("train/*")]
        assert files
        for path in files:
            path.unlink()
        lines = list(client.logs(job.id))
    by_rank: dict[tuple[int, int], list[str]] = {}
    for line in lines:
        by_rank.setdefault((line.attempt, line.rank), []).append(line.line)
    assert sorted(by_rank) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for (attempt, rank), texts in by_rank.items():
        assert any(f"rank {rank} of 2, attempt {attempt} at" in text for text in texts)
    last = by_rank[1, 1]
    assert "NCCL WARN as scripted, with ***" in last
    assert any("Fatal Python error: Aborted" in text for text in last)
    assert any("trainer/loop.py" in text for text in last), "where it was"
    assert not any(secret in line.line for line in lines)


def test_of_ranks_that_never_belonged_to_an_attempt_the_log_says_why(gpus: Stack) -> None:
    """What they look for first is gone from the bucket by the time they start."""
    with gpus.client() as client:
        job = client.submit(spec(2)).job
        gpus.s3().delete_object(Bucket="everstep", Key=f"jobs/{job.id}/spec.json")
        failed = wait_for_state(client, job.id, pb.JOB_STATE_FAILED)
        assert len(failed.attempts) == 0
        wait_until(lambda: not keepers(gpus), 30, "the keepers' end")
        lines = list(client.logs(job.id))
    assert {line.attempt for line in lines} == {0}
    # Whoever fails first may end the other before it has a word.
    text = "\n".join(line.line for line in lines)
    assert "the attempt failed" in text
    assert "spec.json does not exist" in text


def test_a_trainer_that_does_not_answer_is_stopped_by_force_and_nothing_stays(
    gpus: Stack,
) -> None:
    """Its grace counts from the request, which another service took."""
    endless = {**spec(2), "schedule": {"num_iterations": 1_000_000}}
    with gpus.client() as client:
        job = client.submit(endless).job
        wait_for_checkpoint(client, job.id, 20)
        ranks = [
            each
            for title, found in gpus.titles().items()
            if title.startswith("ray::RayTrainWorker")
            for each in found
        ]
        assert len(ranks) == 2
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        asking = threading.Thread(target=lambda: cancelled(client, job.id), daemon=True)
        asked = time.monotonic()
        asking.start()
        desired = pb.JOB_STATE_CANCELLED
        wait_until(lambda: client.get(job.id).desired_state == desired, 20, "the wish")
        time.sleep(STOP_GRACE_S / 2 - (time.monotonic() - asked))
        gpus.kill_service()
        gpus.start()
    with gpus.client() as client:
        answer = client.cancel(job.id)
        took = time.monotonic() - asked
        assert answer.job.state == pb.JOB_STATE_CANCELLED
        found = re.search("stopped by force ([0-9]+) s after it was asked to", answer.job.reason)
        assert found, answer.job.reason
        assert STOP_GRACE_S <= int(found[1]) <= took + 1
        assert answer.final_checkpoint.checkpoint == client.checkpoints(job.id)[0].ref
        wait_for_an_empty_ray(gpus)
        assert not any(is_alive(rank) for rank in ranks)
        wait_until(lambda: not keepers(gpus), 30, "the keepers' end")
        lines = [line.line for line in client.logs(job.id, attempt=1)]
    assert all(any(f"rank {n} of 2" in line for line in lines) for n in (0, 1))


def cancelled(client: Client, job_id: str) -> None:
    """Cancel; the service that was asked may be gone before it answers."""
    with contextlib.suppress(EverstepError):
        client.cancel(job_id)


def keepers(stack: Stack) -> list[psutil.Process]:
    """Processes beside ranks, in whatever session."""
    mark, found = f"{stack.state.resolve()}/parts:ray", []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and "trainer.keeper" in process.cmdline():
                found.append(process)
    return found


def logs_of(process: psutil.Process) -> Path:
    """Where a process of Ray's, and all others on its box, log."""
    return Path(process.environ()["TMPDIR"]) / "ray" / "session_latest" / "logs"


def log_of(process: psutil.Process) -> str:
    """What a process of Ray's has logged."""
    (path,) = logs_of(process).glob(f"worker-*-{process.pid}.err")
    return path.read_text()


def test_more_workers_than_gpus_are_refused(gpus: Stack) -> None:
    with gpus.client() as client, pytest.raises(Exception, match="needs 4 GPU, the cluster has 2"):
        client.plan(spec(4))
