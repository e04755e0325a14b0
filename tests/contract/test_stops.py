"""Pause and cancel in every state of a job: the answer names the committed checkpoint, or why none.

Over gRPC and the real stores; the cluster is scripted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from everstep.v1 import everstep_pb2 as pb
from service.errors import StorageAwayError
from service.jobs import Desired
from tests.fakes.api import Api, credential, hello, served
from tests.fakes.checkpoints import manifest_for
from tests.fakes.ray_cluster import FakeRayCluster
from trainer.contract.outcome import AttemptResult, Outcome
from trainer.contract.states import JobState
from trainer.storage.documents import sha256_hex
from trainer.storage.layout import part_name
from trainer.storage.manifest import CheckpointRef, Manifest, Part
from trainer.storage.repository import CheckpointRepository

STEP = 5
STOPS = [("PauseJob", Desired.PAUSED), ("CancelJob", Desired.CANCELLED)]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


def request(method: str, job_id: str) -> Any:
    return {"PauseJob": pb.PauseJobRequest, "CancelJob": pb.CancelJobRequest}[method](job_id=job_id)


def commit(api: Api, folder: Path, job_id: str, step: int = STEP) -> Manifest:
    """What the attempt commits before it stops."""
    repository = CheckpointRepository(api.plane.store, job_id)
    claims = repository.claims()
    attempt = (claims[-1] if claims else repository.claim(None, "host")).attempt
    path = folder / "part"
    path.write_bytes(f"step {step}".encode())
    part = Part.of_file(path, part_name(0))
    manifest = manifest_for(CheckpointRef(job_id=job_id, step=step, attempt=attempt), [part])
    repository.upload_part(manifest.ref, part, path)
    repository.commit(manifest)
    return manifest


async def asked(api: Api, method: str, job_id: str, desired: Desired) -> asyncio.Task[Any]:
    """The call is under way, and its wish is durable."""
    call = asyncio.create_task(api.call(method, request(method, job_id)))
    async with asyncio.timeout(20):
        while (await api.plane.job(job_id)).desired is not desired:
            await asyncio.sleep(0.01)
    return call


async def queued(api: Api, job_id: str) -> None:
    """Nothing has happened yet."""


async def waiting(api: Api, job_id: str) -> None:
    """There is no place for it."""
    api.plane.cluster.machines = []
    await api.plane.tick()


async def starting(api: Api, job_id: str) -> None:
    await api.plane.tick()


async def running(api: Api, job_id: str) -> None:
    await api.plane.tick()
    await api.plane.trains(await api.plane.job(job_id))


async def recovering(api: Api, job_id: str) -> None:
    """An attempt was lost; its host starts the next one."""
    await running(api, job_id)
    lost = AttemptResult(1, Outcome.WORKER_LOST, "the worker was killed", 3)
    api.plane.cluster.says((job_id, 1), lost)
    await api.plane.tick()


async def hostless(api: Api, job_id: str) -> None:
    """Its host is gone, and nobody has looked since."""
    await running(api, job_id)
    api.plane.cluster.lose((job_id, 1))


HOLDING = [starting, running, recovering]


@pytest.mark.parametrize(("method", "desired"), STOPS)
@pytest.mark.parametrize("reach", [queued, waiting, hostless])
async def test_a_job_without_workers_is_stopped_at_once_and_says_why_there_is_no_checkpoint(
    api: Api, reach: Callable[[Api, str], Awaitable[None]], method: str, desired: Desired
) -> None:
    job_id = (await api.submit()).job.id
    await reach(api, job_id)
    call = await asked(api, method, job_id, desired)
    await api.plane.tick()
    answer = await asyncio.wait_for(call, 20)
    assert answer.job.state == pb.JobState.Value(f"JOB_STATE_{desired.value}")
    assert not answer.final_checkpoint.HasField("checkpoint")
    why = answer.final_checkpoint.reason
    assert why.startswith("no step was checkpointed: ")
    assert len(why) > len("no step was checkpointed: ")


@pytest.mark.parametrize(("method", "desired"), STOPS)
@pytest.mark.parametrize("reach", HOLDING)
async def test_the_answer_names_the_checkpoint_that_the_attempt_committed_last(
    api: Api,
    tmp_path: Path,
    reach: Callable[[Api, str], Awaitable[None]],
    method: str,
    desired: Desired,
) -> None:
    job_id = (await api.submit()).job.id
    await reach(api, job_id)
    call = await asked(api, method, job_id, desired)
    await api.plane.tick()
    assert not call.done()
    manifest = commit(api, tmp_path, job_id)
    message = f"stopped as asked after step {STEP}"
    api.plane.cluster.ends((job_id, 1), AttemptResult(1, Outcome.STOPPED, message, STEP, STEP))
    await api.plane.tick()
    answer = await asyncio.wait_for(call, 20)
    assert answer.final_checkpoint.checkpoint.step == STEP
    assert answer.final_checkpoint.manifest_sha256 == sha256_hex(manifest.encode())
    assert answer.final_checkpoint.reason == message
    assert not api.plane.cluster.known, "nothing of it is left in the cluster"


@pytest.mark.parametrize(("method", "desired"), STOPS)
@pytest.mark.parametrize("reach", [queued, waiting, hostless, *HOLDING])
async def test_a_service_that_restarts_amid_a_stop_gives_the_next_caller_the_answer(
    tmp_path: Path, reach: Callable[[Api, str], Awaitable[None]], method: str, desired: Desired
) -> None:
    cluster = FakeRayCluster()
    async with served(tmp_path, cluster) as api:
        job_id = (await api.submit()).job.id
        await reach(api, job_id)
        call = await asked(api, method, job_id, desired)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    async with served(tmp_path, cluster) as api:
        again = await asked(api, method, job_id, desired)
        await api.plane.tick()
        if reach in HOLDING:
            commit(api, tmp_path, job_id)
            stopped = AttemptResult(1, Outcome.STOPPED, "stopped as asked", STEP, STEP)
            cluster.ends((job_id, 1), stopped)
            await api.plane.tick()
        answer = await asyncio.wait_for(again, 20)
        assert answer.job.state == pb.JobState.Value(f"JOB_STATE_{desired.value}")
        assert answer.final_checkpoint.HasField("checkpoint") == (reach in HOLDING)
        assert answer.final_checkpoint.reason
        assert not cluster.known


@pytest.mark.parametrize(("method", "desired"), STOPS)
@pytest.mark.parametrize("reach", HOLDING)
async def test_an_attempt_that_does_not_stop_is_ended_after_the_grace_and_the_answer_says_so(
    api: Api,
    tmp_path: Path,
    reach: Callable[[Api, str], Awaitable[None]],
    method: str,
    desired: Desired,
) -> None:
    job_id = (await api.submit()).job.id
    await reach(api, job_id)
    commit(api, tmp_path, job_id, step=4)
    call = await asked(api, method, job_id, desired)
    await api.plane.tick(3)
    assert not call.done()
    api.plane.reconciler.signs.stop_grace_s = 0.0
    await api.plane.tick()
    answer = await asyncio.wait_for(call, 20)
    assert answer.final_checkpoint.checkpoint.step == 4, "the last committed one stands"
    assert answer.final_checkpoint.reason.startswith("stopped by force")
    assert not api.plane.cluster.known


async def test_a_pause_that_a_resume_overtakes_ends_at_once(api: Api) -> None:
    job_id = (await api.submit()).job.id
    await running(api, job_id)
    call = await asked(api, "PauseJob", job_id, Desired.PAUSED)
    await api.call("ResumeJob", pb.ResumeJobRequest(job_id=job_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == (
        f"job {job_id} does not become PAUSED: somebody wants it RUNNING since"
    )


async def test_a_pause_that_a_cancel_overtakes_ends_at_once_and_the_cancel_goes_on(
    api: Api,
) -> None:
    job_id = (await api.submit()).job.id
    await running(api, job_id)
    pause = await asked(api, "PauseJob", job_id, Desired.PAUSED)
    cancel = await asked(api, "CancelJob", job_id, Desired.CANCELLED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(pause, 20)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    api.plane.cluster.lose((job_id, 1))
    await api.plane.tick()
    assert (await asyncio.wait_for(cancel, 20)).job.state == pb.JOB_STATE_CANCELLED


@pytest.mark.parametrize("told", [0, 4])
@pytest.mark.parametrize(("method", "desired"), STOPS)
async def test_a_stop_at_whose_end_the_store_is_away_is_answered_and_says_so(
    api: Api, monkeypatch: pytest.MonkeyPatch, method: str, desired: Desired, told: int
) -> None:
    """With the last checkpoint that the service was told of, if any."""
    job_id = (await api.submit()).job.id
    await running(api, job_id)
    if told:
        ref = pb.CheckpointRef(job_id=job_id, step=told, attempt=1)
        event = pb.Event(kind=pb.EVENT_KIND_CHECKPOINT_COMMITTED, checkpoint=ref)
        entry = pb.ReportEntry(sequence=1, event=event)
        await api.report(credential(job_id), [hello(job_id), pb.ReportRequest(entries=[entry])])
    call = await asked(api, method, job_id, desired)
    faults = []

    async def away(_job_id: str) -> Any:
        faults.append(_job_id)
        raise StorageAwayError("scripted: the store does not answer")

    monkeypatch.setattr(api.plane.storage, "manifests", away)
    message = f"stopped as asked after step {STEP}"
    api.plane.cluster.ends((job_id, 1), AttemptResult(1, Outcome.STOPPED, message, STEP, STEP))
    await api.plane.tick()
    answer = await asyncio.wait_for(call, 20)
    assert faults == [job_id]
    assert answer.job.state == pb.JobState.Value(f"JOB_STATE_{desired.value}")
    assert answer.final_checkpoint.checkpoint.step == told
    assert not answer.final_checkpoint.manifest_sha256
    assert message in answer.final_checkpoint.reason
    assert "scripted: the store does not answer" in answer.final_checkpoint.reason


async def test_a_preempted_job_that_waits_is_paused_with_its_checkpoint(
    api: Api, tmp_path: Path
) -> None:
    job_id = (await api.submit(preemptible=True)).job.id
    await running(api, job_id)
    await api.submit(priority=5, resources={"cpus_per_worker": 4})
    await api.plane.tick(2)
    commit(api, tmp_path, job_id)
    stopped = AttemptResult(1, Outcome.STOPPED, "stopped as asked", STEP, STEP)
    api.plane.cluster.ends((job_id, 1), stopped)
    await api.plane.tick()
    assert (await api.plane.job(job_id)).state is JobState.QUEUED
    call = await asked(api, "PauseJob", job_id, Desired.PAUSED)
    await api.plane.tick()
    answer = await asyncio.wait_for(call, 20)
    assert answer.job.state == pb.JOB_STATE_PAUSED
    assert answer.final_checkpoint.checkpoint.step == STEP
