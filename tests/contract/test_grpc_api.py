"""The API as a client meets it: a real server on loopback, storage in a folder, a scripted Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from service.jobs import Desired
from tests.fakes.api import (
    ADMIN,
    Api,
    bearer,
    credential,
    hello,
    points,
    reason,
    served,
)
from tests.fakes.control_plane import TINY
from trainer.contract.outcome import AttemptResult, Outcome


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


async def test_a_submitted_job_comes_back_whole_with_its_plan(api: Api) -> None:
    made = await api.submit("R")
    assert made.job.state == pb.JOB_STATE_QUEUED
    assert made.plan.spec == made.job.spec
    assert made.plan.parameters_total == sum(each.count for each in made.plan.parameters)
    assert made.plan.grad_accum_steps == 2
    again = await api.submit("R")
    found = await api.call("GetJob", pb.GetJobRequest(job_id=made.job.id))
    waited = [each.job.goodput.queue_s for each in (made, again, found)]
    assert waited == sorted(waited)  # the time goes on, and nothing else
    for each in (made, again, found):
        each.job.ClearField("goodput")
    assert again.job == found.job == made.job
    assert made.job.spec.optimizer.HasField("matrix_lr")  # every default written out


async def test_validating_and_planning_create_nothing(api: Api) -> None:
    spec = dict_to_proto(TINY)
    only = await api.call("SubmitJob", pb.SubmitJobRequest(spec=spec, validate_only=True))
    assert not only.HasField("job")
    planned = await api.call("PlanJob", pb.PlanJobRequest(spec=spec))
    assert planned.plan == only.plan
    assert not (await api.call("ListJobs", pb.ListJobsRequest())).jobs


async def test_pages_hold_every_job_once_newest_first(api: Api) -> None:
    made = [(await api.submit()).job.id for _ in range(5)]
    seen: list[str] = []
    token = ""
    sizes = []
    while True:
        page = await api.call("ListJobs", pb.ListJobsRequest(page_size=2, page_token=token))
        sizes.append(len(page.jobs))
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert sizes == [2, 2, 1]
    assert seen == made[::-1]
    queued = pb.ListJobsRequest(states=[pb.JOB_STATE_QUEUED])
    assert len((await api.call("ListJobs", queued)).jobs) == 5
    running = pb.ListJobsRequest(states=[pb.JOB_STATE_RUNNING, pb.JOB_STATE_PAUSED])
    assert not (await api.call("ListJobs", running)).jobs


async def test_a_watch_goes_on_from_its_cursor_across_attempts_to_the_end(api: Api) -> None:
    job_id = (await api.submit()).job.id

    async def watch(cursor: int) -> list[pb.WatchJobResponse]:
        request = pb.WatchJobRequest(job_id=job_id, cursor=cursor)
        call = api.training.WatchJob(request, metadata=bearer(ADMIN), timeout=30)
        return [record async for record in call]

    watching = asyncio.create_task(watch(0))
    await api.plane.tick()
    answers = await api.report(credential(job_id), [hello(job_id), points(1, 2), points(2, 3)])
    assert [answer.acknowledged_sequence for answer in answers] == [0, 2, 3]
    api.plane.cluster.says((job_id, 1), AttemptResult(1, Outcome.WORKER_LOST, "killed", 3))
    await api.plane.tick()
    # Of the second attempt's points the trainer had to drop one.
    answers = await api.report(credential(job_id, 2), [hello(job_id, 2), points(1), points(1, 3)])
    assert [answer.acknowledged_sequence for answer in answers] == [0, 1, 3]
    end = AttemptResult(2, Outcome.COMPLETED, "done", 12)
    api.plane.cluster.ends((job_id, 1), AttemptResult(1, Outcome.WORKER_LOST, "killed", 3), end)
    await api.plane.tick()
    records = await asyncio.wait_for(watching, 20)
    assert [record.cursor for record in records] == list(range(1, len(records) + 1))
    told = [
        pb.JobState.Name(record.event.state).removeprefix("JOB_STATE_")
        for record in records
        if record.event.kind == pb.EVENT_KIND_STATE_CHANGED
    ]
    assert told == ["QUEUED", "STARTING", "RUNNING", "STARTING", "RUNNING", "SUCCEEDED"]
    steps = [(r.attempt, r.point.step) for r in records if r.HasField("point")]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3)]
    assert await watch(4) == records[4:]
    job = (await api.call("GetJob", pb.GetJobRequest(job_id=job_id))).job
    assert [attempt.outcome for attempt in job.attempts] == ["COMPLETED", "WORKER_LOST"]
    assert job.latest.step == 3


async def test_a_running_jobs_watch_hears_what_comes_and_can_be_left(api: Api) -> None:
    job_id = (await api.submit()).job.id
    call = api.training.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=bearer(ADMIN))
    first = await call.read()
    assert first.event.state == pb.JOB_STATE_QUEUED
    waiting = asyncio.ensure_future(call.read())
    await api.plane.tick()
    assert (await asyncio.wait_for(waiting, 10)).event.state == pb.JOB_STATE_STARTING
    call.cancel()
    assert (await api.call("GetJob", pb.GetJobRequest(job_id=job_id))).job.id == job_id


async def test_a_cancelled_job_says_why_it_left_no_checkpoint(api: Api) -> None:
    job_id = (await api.submit()).job.id
    request = pb.CancelJobRequest(job_id=job_id)
    cancelling = asyncio.create_task(api.call("CancelJob", request))
    while (await api.plane.job(job_id)).desired is not Desired.CANCELLED:
        await asyncio.sleep(0.01)
    await api.plane.tick()
    answer = await asyncio.wait_for(cancelling, 10)
    assert answer.job.state == pb.JOB_STATE_CANCELLED
    assert not answer.final_checkpoint.HasField("checkpoint")
    assert answer.final_checkpoint.reason.startswith("no step was checkpointed")
    assert (await api.call("CancelJob", request)).job == answer.job
    refusal = await api.refused("PauseJob", pb.PauseJobRequest(job_id=job_id))
    assert refusal.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(refusal) == "PRECONDITION_FAILED"


async def test_a_job_without_checkpoints_lists_none(api: Api) -> None:
    job_id = (await api.submit()).job.id
    request = pb.ListCheckpointsRequest(job_id=job_id)
    assert not (await api.call("ListCheckpoints", request)).checkpoints


async def test_when_the_newest_attempt_began_is_shown_and_its_second_word_moves_nothing(
    api: Api,
) -> None:
    job_id = (await api.submit()).job.id
    await api.plane.tick()

    async def shown_after(attempt: int) -> float:
        await api.report(credential(job_id, attempt), [hello(job_id, attempt)])
        (family,) = api.plane.metrics.attempt_started.collect()
        (sample,) = family.samples
        return sample.value

    first = await shown_after(1)
    assert await shown_after(1) == first
    assert await shown_after(2) > first
