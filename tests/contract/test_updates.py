"""UpdateJob as a client meets it: what changes, when, and what is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from everstep.v1 import everstep_pb2 as pb
from service.jobs import Desired
from tests.fakes.api import Api, served
from tests.fakes.checkpoints import save
from tests.fakes.ray_cluster import FakeRayCluster, machine
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention, prune, retention_in_force

SPECS = Retention(keep_last=10, keep_every_steps=10_000, keep_best=True)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


async def update(api: Api, job_id: str, **fields: Any) -> pb.Job:
    answer = await api.call("UpdateJob", pb.UpdateJobRequest(job_id=job_id, **fields))
    job: pb.Job = answer.job
    return job


async def requests(api: Api, job_id: str) -> list[tuple[str, str]]:
    """What was asked of the job and by whom."""
    records = await api.plane.records.read(job_id, 0, 1000)
    found = [pb.WatchJobResponse.FromString(record.body).event for record in records]
    return [(e.message, e.actor) for e in found if e.kind == pb.EVENT_KIND_REQUESTED]


async def test_a_new_priority_counts_at_the_next_scheduling_decision(api: Api) -> None:
    cluster: FakeRayCluster = api.plane.cluster
    first, second = [(await api.submit()).job.id for _ in range(2)]
    assert (await update(api, second, priority=5)).spec.priority == 5
    cpus = 2  # room for one
    cluster.machines = [machine(1, cpus=cpus)]
    await api.plane.tick()
    states = [(await api.plane.job(job_id)).state for job_id in (first, second)]
    assert states == ["QUEUED", "STARTING"]
    assert await requests(api, second) == [("change priority from 0 to 5", "admin")]


async def test_retention_reaches_the_trainer_and_the_spec_in_the_bucket_stays(api: Api) -> None:
    job_id = (await api.submit()).job.id
    repository = CheckpointRepository(api.plane.store, job_id)
    before = repository.document()
    assert retention_in_force(repository, SPECS) == SPECS
    keep = pb.CheckpointSpec(keep_last=2, keep_best=False, keep_every_steps=0)
    job = await update(api, job_id, retention=keep)
    assert (job.spec.checkpoint.keep_last, job.spec.checkpoint.keep_best) == (2, False)
    assert retention_in_force(repository, SPECS) == Retention(2, 0, False)
    assert repository.document() == before, "manifests carry its digest"
    assert (await requests(api, job_id))[0][0] == (
        "change keep_last from 10 to 2, keep_every_steps from 10000 to 0, "
        "keep_best from True to False"
    )


async def test_what_is_in_force_decides_what_is_deleted(api: Api, tmp_path: Path) -> None:
    job_id = (await api.submit()).job.id
    repository = CheckpointRepository(api.plane.store, job_id)
    await update(api, job_id, retention=pb.CheckpointSpec(keep_last=3, keep_every_steps=20))
    repository = CheckpointRepository(api.plane.store, "JOB")
    repository.claim(None, "host")
    for step in (10, 20, 30, 40, 50):
        save(repository, tmp_path, step)
    asked = retention_in_force(CheckpointRepository(api.plane.store, job_id), SPECS)
    prune(repository, asked)
    assert [ref.step for ref in repository.current()] == [50, 40, 30, 20]


async def test_what_a_lost_answer_left_in_the_bucket_is_overwritten_by_the_next_call(
    api: Api,
) -> None:
    job_id = (await api.submit()).job.id
    repository = CheckpointRepository(api.plane.store, job_id)
    half_done = (await api.plane.job(job_id)).spec.checkpoint.model_copy(update={"keep_last": 2})
    await api.plane.storage.save_retention(job_id, half_done)  # then the service died
    assert retention_in_force(repository, SPECS).keep_last == 2
    await update(api, job_id, retention=pb.CheckpointSpec(keep_last=10))
    assert retention_in_force(repository, SPECS).keep_last == 10


async def test_the_same_again_changes_nothing_and_tells_nothing(api: Api) -> None:
    job_id = (await api.submit()).job.id
    for _ in range(2):
        await update(api, job_id, priority=3, retention=pb.CheckpointSpec(keep_last=4))
    assert len(await requests(api, job_id)) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "must be given"),
        ({"retention": pb.CheckpointSpec(every_steps=5)}, "retention.every_steps: can't change"),
        ({"retention": pb.CheckpointSpec(keep_last=1)}, "keep_last"),
        ({"priority": 5000}, "priority"),
    ],
)
async def test_what_can_not_change_is_refused(api: Api, fields: dict[str, Any], words: str) -> None:
    job_id = (await api.submit()).job.id
    error = await api.refused("UpdateJob", pb.UpdateJobRequest(job_id=job_id, **fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in (error.details() or "")
    assert await requests(api, job_id) == []


async def test_a_final_job_has_nothing_to_change(api: Api) -> None:
    job_id = (await api.submit()).job.id
    await api.plane.want(job_id, Desired.CANCELLED)
    await api.plane.tick()
    error = await api.refused("UpdateJob", pb.UpdateJobRequest(job_id=job_id, priority=1))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    unknown = await api.refused("UpdateJob", pb.UpdateJobRequest(job_id="NOBODY", priority=1))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
