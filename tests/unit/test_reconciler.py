"""The reconciler against a scripted cluster: one step at a time, and safe to die at any line."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep import client
from everstep.v1 import everstep_pb2 as pb
from service import reconciler, server, signs
from service.errors import ClusterAwayError
from service.jobs import Desired, Job
from service.ray_cluster import HostStatus
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from tests.fakes.ray_cluster import FakeRayCluster, machine
from trainer.contract import outcome
from trainer.contract.outcome import (
    FAILED_SAVE_S,
    FINAL_SAVE_S,
    RESTART_BUDGET,
    RESTART_WINDOW_S,
    AttemptResult,
    Outcome,
)
from trainer.contract.states import JobState

COMPLETED = AttemptResult(1, Outcome.COMPLETED, "reached the horizon, step 12", 12, 12)
STOPPED = AttemptResult(1, Outcome.STOPPED, "stopped as asked after step 5", 5, 5)
LOST = AttemptResult(1, Outcome.WORKER_LOST, "the worker was killed", 3)
STORE_AWAY = AttemptResult(1, Outcome.STORE_UNAVAILABLE, "the bucket is away", 0)
FIRST = ("JOB1", 1)
SAVE_GRACE_S = signs.STOP_GRACE_S + signs.SAVE_S
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def started(plane: ControlPlane, **changes: Any) -> Job:
    """JOB1, STARTING on its first host."""
    await plane.add(new_job(1, **changes))
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.host_number) == (JobState.STARTING, 1)
    assert list(plane.cluster.known) == [FIRST]
    return job


async def running(plane: ControlPlane) -> Job:
    """JOB1, RUNNING on its first host."""
    return await plane.trains(await started(plane))


async def lost_before(plane: ControlPlane, count: int, ended: float) -> None:
    """JOB1, RUNNING on its first host, which lost workers before."""
    job = await started(plane)
    for number in range(1, count + 1):
        job = await plane.trains(job, number)
        lost = replace(LOST, attempt=number, ended_at=ended)
        plane.cluster.says(FIRST, lost)
        await plane.tick()
    await plane.trains(job, count + 1)


async def test_a_queued_job_starts_when_its_resources_are_free(plane: ControlPlane) -> None:
    await started(plane)
    await plane.add(new_job(2))
    await plane.add(new_job(3))
    await plane.tick(2)
    assert (await plane.job("JOB2")).state is JobState.STARTING
    third = await plane.job("JOB3")
    assert third.state is JobState.QUEUED
    assert third.reason.startswith("place 1 in the queue: needs 0 GPU and 2 CPU, free are 0 and 0")
    plane.cluster.ends(FIRST, COMPLETED)
    await plane.tick()
    assert (await plane.job("JOB3")).state is JobState.STARTING
    assert [config["job_id"] for config in plane.cluster.started] == ["JOB1", "JOB2", "JOB3"]


async def test_ticks_that_see_nothing_new_change_nothing(plane: ControlPlane) -> None:
    job = await running(plane)
    await plane.tick(3)
    assert await plane.job("JOB1") == job
    assert len(plane.cluster.started) == 1
    assert not plane.cluster.killed


async def test_a_host_that_is_gone_is_followed_by_one_with_a_higher_number(
    plane: ControlPlane,
) -> None:
    await running(plane)
    plane.cluster.lose(FIRST)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.host_number) == (JobState.STARTING, 2)
    assert list(plane.cluster.known) == [("JOB1", 2)]
    assert await plane.states("JOB1") == ["QUEUED", "STARTING", "STARTING"]


async def test_a_host_that_does_not_answer_is_not_given_up_for_dead(plane: ControlPlane) -> None:
    job = await running(plane)
    plane.cluster.known[FIRST] = HostStatus(*FIRST, answered=False)
    await plane.tick(2)
    assert await plane.job("JOB1") == job
    assert not plane.cluster.killed


async def test_a_completed_job_has_succeeded_and_its_host_is_gone(plane: ControlPlane) -> None:
    await running(plane)
    plane.cluster.ends(FIRST, COMPLETED)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.reason) == (JobState.SUCCEEDED, COMPLETED.message)
    assert job.ended_at is not None
    assert plane.cluster.killed == [FIRST]
    view = await plane.jobs.view("JOB1")
    assert view is not None
    assert view.attempts[0].outcome == "COMPLETED"


async def test_a_job_brought_back_at_its_horizon_has_succeeded(plane: ControlPlane) -> None:
    await started(plane)
    plane.cluster.ends(FIRST, COMPLETED)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.SUCCEEDED


async def test_an_outcome_that_would_come_again_fails_the_job_by_name(plane: ControlPlane) -> None:
    await running(plane)
    plane.cluster.ends(FIRST, AttemptResult(1, Outcome.NOT_FINITE, "step 4: loss nan", 3))
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.reason) == (JobState.FAILED, "NOT_FINITE: step 4: loss nan")
    assert plane.cluster.killed == [FIRST]
    (loss,) = plane.metrics.train_loss.collect()[0].samples  # for the alert: no point tells of it
    assert math.isnan(loss.value)
    assert loss.labels["job_id"] == "JOB1"


async def test_a_job_ends_though_its_last_words_name_a_file_in_no_utf8(
    plane: ControlPlane,
) -> None:
    await running(plane)
    words = f"[Errno 5] Input/output error: {os.fsdecode(b'caf' + bytes([233]))!s}"
    plane.cluster.ends(FIRST, AttemptResult(1, Outcome.CODE_ERROR, words, 3))
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.reason.endswith("caf?")) == (JobState.FAILED, True)


async def test_a_spent_restart_budget_fails_the_job_and_says_so(plane: ControlPlane) -> None:
    await running(plane)
    plane.cluster.ends(FIRST, LOST, budget_spent=True)
    await plane.tick()
    job = await plane.job("JOB1")
    assert job.state is JobState.FAILED
    assert job.reason == "restart budget spent; WORKER_LOST: the worker was killed"


async def test_hosts_lost_too_often_within_the_window_fail_the_job(plane: ControlPlane) -> None:
    """The budget counts over hosts, by what the database says of attempts."""
    await lost_before(plane, RESTART_BUDGET, time.time() - 60)
    plane.cluster.lose(FIRST)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.reason) == (
        JobState.FAILED,
        "restart budget spent; HOST_LOST: its host is gone",
    )
    assert len(plane.cluster.started) == 1


async def test_a_lost_host_waits_longer_each_time_and_the_next_one_knows_the_ends(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = time.time() - 1.0
    await lost_before(plane, 3, ended)
    plane.cluster.lose(FIRST)
    await plane.tick(2)
    assert len(plane.cluster.started) == 1, "the fourth loss in a row is followed by a pause"
    monkeypatch.setattr(outcome, "BACKOFF_S", (0.0,))
    await plane.tick()
    first, second = plane.cluster.started
    assert first["earlier_ends"] == []
    assert len(second["earlier_ends"]) == 4
    assert sorted(second["earlier_ends"])[:3] == [ended] * 3


async def test_ends_of_long_ago_neither_fail_a_job_nor_hold_it_up(plane: ControlPlane) -> None:
    await lost_before(plane, RESTART_BUDGET, time.time() - RESTART_WINDOW_S - 1)
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert (await plane.job("JOB1")).host_number == 2


async def test_a_host_is_not_given_up_while_its_attempt_still_reports(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await running(plane)
    plane.cluster.lose(FIRST)
    plane.reconciler.directive(job)  # a report came a moment ago
    await plane.tick(2)
    assert await plane.job("JOB1") == job
    monkeypatch.setattr(signs, "HEARD_S", 0.0)
    await plane.tick()
    assert (await plane.job("JOB1")).host_number == 2


@pytest.mark.parametrize("node_alive", [True, False])
async def test_a_restarted_service_gives_attempts_time_to_find_it_before_a_host_is_given_up(
    tmp_path: Path, node_alive: bool
) -> None:
    cluster = FakeRayCluster()
    async with control_plane(tmp_path, cluster) as before:
        job = await running(before)
    cluster.machines = [machine(1, cpus=4, alive=node_alive), machine(2, cpus=4)]
    if node_alive:
        cluster.lose(FIRST)
    known = list(cluster.known)
    async with control_plane(tmp_path, cluster) as plane:
        plane.reconciler.signs.began = time.monotonic()
        await plane.tick(2)
        assert await plane.job("JOB1") == job
        assert list(cluster.known) == known, "the cluster's word alone neither starts nor kills"
        plane.reconciler.signs.began -= 2 * signs.HEARD_S
        await plane.tick()
        assert list(cluster.known) == [("JOB1", 2)]


async def test_an_attempt_that_found_the_restarted_service_is_missed_as_soon_as_ever(
    plane: ControlPlane,
) -> None:
    job = await running(plane)
    plane.reconciler.signs.began = time.monotonic()
    plane.reconciler.directive(job)
    plane.reconciler.signs.heard["JOB1"] -= signs.HEARD_S
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert (await plane.job("JOB1")).host_number == 2


async def test_a_host_that_restarts_its_attempt_puts_the_job_back_to_starting(
    plane: ControlPlane,
) -> None:
    await running(plane)
    plane.cluster.says(FIRST, LOST)
    await plane.tick(2)
    job = await plane.job("JOB1")
    assert (job.state, job.host_number) == (JobState.STARTING, 1)
    await plane.trains(job, attempt=2)
    await plane.tick(2)  # the old result is no news
    assert (await plane.job("JOB1")).state is JobState.RUNNING


async def test_why_attempts_end_before_they_begin_is_said_once(plane: ControlPlane) -> None:
    job = await started(plane)
    plane.cluster.says(FIRST, replace(STORE_AWAY, attempt=0))
    await plane.tick(3)
    plane.cluster.says(FIRST, *[replace(STORE_AWAY, attempt=0)] * 2)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.host_number) == (JobState.STARTING, 1)
    said = "STORE_UNAVAILABLE: the bucket is away; the next attempt starts"
    assert job.reason == said
    assert (await plane.messages("JOB1")).count(said) == 1


async def test_attempts_that_lived_and_died_unheard_are_in_the_history_and_the_budget(
    plane: ControlPlane,
) -> None:
    """While the service was away."""
    await started(plane)
    lost = [replace(LOST, attempt=n, ended_at=time.time() - 60 + n) for n in (1, 2, 3)]
    plane.cluster.says(FIRST, *lost)
    await plane.tick(2)
    view = await plane.jobs.view("JOB1")
    assert view is not None
    assert [(each.number, each.outcome) for each in view.attempts] == [
        (number, "WORKER_LOST") for number in (3, 2, 1)
    ]
    assert (await plane.messages("JOB1")).count(LOST.message) == 3
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert sorted(plane.cluster.started[-1]["earlier_ends"]) == [each.ended_at for each in lost]


async def test_cancelling_a_queued_job_needs_no_cluster(plane: ControlPlane) -> None:
    plane.cluster.away = True
    await plane.add(new_job(1))
    await plane.want("JOB1", Desired.CANCELLED)
    with pytest.raises(ClusterAwayError):
        await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.CANCELLED


@pytest.mark.parametrize("begin", [started, running])
@pytest.mark.parametrize(
    ("desired", "state"),
    [(Desired.CANCELLED, JobState.CANCELLED), (Desired.PAUSED, JobState.PAUSED)],
)
async def test_an_active_job_is_stopped_through_its_host(
    plane: ControlPlane, begin: Any, desired: Desired, state: JobState
) -> None:
    job = await begin(plane)
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_UNSPECIFIED
    await plane.want("JOB1", desired)
    assert plane.reconciler.directive(await plane.job("JOB1")) == pb.DIRECTIVE_STOP
    await plane.tick(3)
    assert plane.cluster.stopped == [FIRST]  # asked once
    assert (await plane.job("JOB1")).state is job.state
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    assert (await plane.job("JOB1")).state is state
    assert plane.cluster.killed == [FIRST]


async def test_a_host_that_could_not_be_told_to_stop_is_told_again(plane: ControlPlane) -> None:
    await started(plane)
    await plane.want("JOB1", Desired.PAUSED)
    fault = plane.cluster.script("stop_host", ClusterAwayError("Ray is away for a moment"))
    with pytest.raises(ClusterAwayError):
        await plane.tick()
    assert fault.fired
    await plane.tick(2)
    assert plane.cluster.stopped == [FIRST]


async def test_a_host_that_does_not_answer_is_told_to_stop_once_it_does(
    plane: ControlPlane,
) -> None:
    await started(plane)
    answers = plane.cluster.known[FIRST]
    plane.cluster.known[FIRST] = HostStatus(*FIRST, answered=False)
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    assert not plane.cluster.stopped, "it would hold up all others for as long as it is waited for"
    plane.cluster.known[FIRST] = answers
    await plane.tick(2)
    assert plane.cluster.stopped == [FIRST]


async def test_a_job_that_can_not_be_looked_after_holds_up_no_other(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    await started(plane, spec={"priority": 5})
    plane.cluster.known[FIRST] = HostStatus(*FIRST, True, results=({"of": "another version"},))
    await plane.add(new_job(2))
    await plane.tick(2)
    assert (await plane.job("JOB2")).state is JobState.STARTING
    plane.cluster.ends(("JOB2", 1), COMPLETED)
    await plane.tick()
    assert (await plane.job("JOB2")).state is JobState.SUCCEEDED
    assert (await plane.job("JOB1")).state is JobState.STARTING
    assert "JOB1" in caplog.text


@pytest.mark.parametrize("desired", [Desired.CANCELLED, Desired.PAUSED])
async def test_stopping_a_job_whose_host_is_gone_starts_no_other(
    plane: ControlPlane, desired: Desired
) -> None:
    await running(plane)
    await plane.want("JOB1", desired)
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert (await plane.job("JOB1")).state.value == desired.value
    assert len(plane.cluster.started) == 1


@pytest.mark.parametrize("desired", [Desired.CANCELLED, Desired.PAUSED])
async def test_an_attempt_that_breaks_while_it_stops_does_not_fail_the_job(
    plane: ControlPlane, desired: Desired
) -> None:
    await running(plane)
    await plane.want("JOB1", desired)
    await plane.tick()
    plane.cluster.ends(FIRST, STORE_AWAY)
    await plane.tick()
    assert (await plane.job("JOB1")).state.value == desired.value


async def test_a_stop_taken_back_after_the_host_heard_it_queues_the_job_again(
    plane: ControlPlane,
) -> None:
    await running(plane)
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    await plane.want("JOB1", Desired.RUNNING)
    plane.cluster.ends(FIRST, LOST)  # the host starts no further attempt
    await plane.tick()
    assert await plane.states("JOB1") == ["QUEUED", "STARTING", "QUEUED", "STARTING"]


async def test_a_host_that_never_stops_is_ended_by_force(plane: ControlPlane) -> None:
    await running(plane)
    await plane.want("JOB1", Desired.CANCELLED)
    await plane.tick(2)
    assert not plane.cluster.killed
    plane.reconciler.signs.stop_grace_s = 0.0
    await plane.tick()
    job = await plane.job("JOB1")
    assert job.state is JobState.CANCELLED
    assert job.reason.startswith("stopped by force")
    assert plane.cluster.killed == [FIRST]


async def test_a_host_that_does_not_even_answer_is_ended_by_force(plane: ControlPlane) -> None:
    await running(plane)
    plane.cluster.known[FIRST] = HostStatus(*FIRST, answered=False)
    await plane.want("JOB1", Desired.CANCELLED)
    await plane.tick(2)
    assert not plane.cluster.killed
    plane.reconciler.signs.stop_grace_s = 0.0
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("asked_s_ago", "heard_s_ago", "by_force"),
    [
        (220, 0, False),  # the last checkpoint's upload: 9.7 GB at 44 MB/s
        (FINAL_SAVE_S + FAILED_SAVE_S, 1, False),
        (SAVE_GRACE_S + 1, 0, True),  # it says something, but never comes to an end
        (220, 121, True),
        (110, 220, False),  # nothing since it was asked, but that is not long ago
        (121, 220, True),
    ],
)
async def test_an_attempt_that_reports_has_time_for_its_last_checkpoint(
    plane: ControlPlane, asked_s_ago: float, heard_s_ago: float, by_force: bool
) -> None:
    job = await running(plane)
    await plane.want("JOB1", Desired.CANCELLED)
    await plane.tick()
    plane.reconciler.directive(job)
    plane.reconciler.signs.asked["JOB1"] -= asked_s_ago
    plane.reconciler.signs.heard["JOB1"] -= heard_s_ago
    await plane.tick()
    assert plane.cluster.killed == ([FIRST] if by_force else [])
    state = JobState.CANCELLED if by_force else JobState.RUNNING
    assert (await plane.job("JOB1")).state is state


@pytest.mark.parametrize(
    ("asked_s_ago", "finds_it", "up_s", "by_force"),
    [
        (10, False, 20, False),
        (121, False, 5, False),  # it may still find the new service
        (121, False, 11, True),
        (121, True, 11, False),  # it saves, as it would have with the old one
        (SAVE_GRACE_S + 1, True, 11, False),  # it heard of the stop a moment ago
        (SAVE_GRACE_S + 1, True, 121, True),
    ],
)
async def test_a_stops_grace_counts_from_when_it_was_asked_whatever_service_heard_it(
    tmp_path: Path, asked_s_ago: float, finds_it: bool, up_s: float, by_force: bool
) -> None:
    cluster = FakeRayCluster()
    async with control_plane(tmp_path, cluster) as plane:
        await running(plane)
        await plane.want("JOB1", Desired.PAUSED)
        await plane.tick(2)
        job = await plane.job("JOB1")
        assert job.stop_asked_at == pytest.approx(time.time(), abs=30)
        await plane.jobs.change(job, replace(job, stop_asked_at=job.stop_asked_at - asked_s_ago))
    async with control_plane(tmp_path, cluster) as plane:
        plane.reconciler.signs.began = time.monotonic() - up_s
        if finds_it:
            plane.reconciler.directive(await plane.job("JOB1"))
        await plane.tick(2)
        job = await plane.job("JOB1")
    assert cluster.killed == ([FIRST] if by_force else [])
    assert job.state is (JobState.PAUSED if by_force else JobState.RUNNING)
    if by_force:
        assert f"stopped by force {asked_s_ago:.0f} s after it was asked to" in job.reason


async def test_a_service_that_was_stopped_takes_its_own_silence_for_nobodys(
    plane: ControlPlane,
) -> None:
    """A frozen machine, say: the attempt saves, and finds the service again."""
    await running(plane)
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    plane.reconciler.directive(await plane.job("JOB1"))
    seen = plane.reconciler.signs
    for times in (seen.asked, seen.heard):
        times["JOB1"] -= signs.STOP_GRACE_S + 1
    seen.looked -= signs.STOP_GRACE_S + 1
    await plane.tick(2)
    assert not plane.cluster.killed
    seen.began -= 2 * signs.HEARD_S
    await plane.tick()
    assert plane.cluster.killed == [FIRST], "it did not come back"


@pytest.mark.parametrize("outcome", [Outcome.CODE_ERROR, Outcome.STOPPED])
async def test_who_reports_for_a_job_that_holds_nothing_is_told_to_stop(
    plane: ControlPlane, outcome: Outcome
) -> None:
    """A worker that outlived its host, as beyond a network that was cut."""
    await running(plane)
    plane.cluster.machines = []
    plane.cluster.ends(FIRST, AttemptResult(1, outcome, "x", 3))
    await plane.tick()
    job = await plane.job("JOB1")
    assert job.state in (JobState.FAILED, JobState.QUEUED)
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_STOP


async def test_a_wish_to_stop_is_dated_until_it_is_taken_back(plane: ControlPlane) -> None:
    await running(plane)
    assert (await plane.job("JOB1")).stop_asked_at is None
    await plane.want("JOB1", Desired.PAUSED)
    paused = (await plane.job("JOB1")).stop_asked_at
    await plane.want("JOB1", Desired.CANCELLED)
    assert (await plane.job("JOB1")).stop_asked_at == paused is not None, "it is one stop"
    await plane.add(new_job(2))
    await plane.want("JOB2", Desired.PAUSED)
    await plane.want("JOB2", Desired.RUNNING)
    assert (await plane.job("JOB2")).stop_asked_at is None


def test_whoever_waits_for_a_stop_waits_longer_than_who_does_it() -> None:
    """Trainer, service, client; and where the whole box stops: service, then Ray and the store."""
    assert FINAL_SAVE_S + FAILED_SAVE_S < SAVE_GRACE_S < client.STOP_S
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    graces = {name: parts.get("stop_grace_period", "0s") for name, parts in compose.items()}
    assert seconds(graces["service"]) > reconciler.SUSPEND_GRACE_S + server.STOP_GRACE_S
    assert seconds(graces["service"]) < seconds(graces["ray-head"])
    assert seconds(graces["service"]) < seconds(graces["seaweedfs"])


def seconds(duration: str) -> float:
    """Of a duration as compose writes it: 2m10s."""
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found is not None, duration
    return 60.0 * int(found[1] or 0) + int(found[2] or 0)


@pytest.mark.parametrize("lose_host", [True, False])
async def test_a_second_pause_has_its_own_grace(plane: ControlPlane, lose_host: bool) -> None:
    await running(plane)
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    if lose_host:
        plane.cluster.lose(FIRST)
        await plane.tick()
    await plane.want("JOB1", Desired.RUNNING)
    await plane.tick(2)
    job = await plane.job("JOB1")
    assert job.holds_resources
    await plane.want("JOB1", Desired.PAUSED)
    plane.reconciler.signs.stop_grace_s = 0.0  # the first pause's grace is long over
    await plane.tick()
    assert (await plane.job("JOB1")).state is job.state
    assert plane.cluster.stopped == [FIRST, ("JOB1", job.host_number)]
    assert not plane.cluster.killed


async def test_a_paused_job_is_queued_again_when_resumed(plane: ControlPlane) -> None:
    await running(plane)
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    await plane.want("JOB1", Desired.RUNNING)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.host_number) == (JobState.STARTING, 2)
    entered = ["QUEUED", "STARTING", "PAUSED", "QUEUED", "STARTING"]
    assert await plane.states("JOB1") == entered


async def test_a_job_paused_before_it_ran_waits_aside(plane: ControlPlane) -> None:
    await plane.add(new_job(1))
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.PAUSED
    assert not plane.cluster.started
    await plane.want("JOB1", Desired.CANCELLED)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.CANCELLED


async def test_a_suspended_service_queues_what_runs_and_starts_nothing(
    plane: ControlPlane,
) -> None:
    job = await running(plane)
    await plane.add(new_job(2))
    suspending = asyncio.create_task(plane.reconciler.suspend())
    await asyncio.sleep(0)
    await plane.tick()
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_STOP
    assert plane.cluster.stopped == [FIRST]
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    await asyncio.wait_for(suspending, 5)
    assert (await plane.job("JOB1")).state is JobState.QUEUED
    assert (await plane.job("JOB2")).state is JobState.QUEUED
    assert len(plane.cluster.started) == 1


URGENT = {"priority": 5, "resources": {"cpus_per_worker": 4}}


async def preempted(plane: ControlPlane) -> Job:
    """JOB1, RUNNING and asked to make way for JOB2."""
    job = await plane.trains(await started(plane, spec={"preemptible": True}))
    await plane.add(new_job(2, spec=URGENT))
    await plane.tick()
    assert (await plane.job("JOB2")).reason == "place 1 in the queue: JOB1 makes way for it"
    return job


async def test_a_job_makes_way_with_a_checkpoint_and_goes_on_later_by_itself(
    plane: ControlPlane,
) -> None:
    job = await preempted(plane)
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_STOP
    await plane.tick(3)
    assert plane.cluster.stopped == [FIRST], "asked once"
    assert await plane.job("JOB1") == job, "it runs until it has stopped"
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    first, second = await plane.job("JOB1"), await plane.job("JOB2")
    assert (first.state, second.state) == (JobState.QUEUED, JobState.STARTING)
    told = [message for message in await plane.messages("JOB1") if "preempted" in message]
    assert told == [f"preempted by job JOB2: {STOPPED.message}"]
    await plane.tick(2)
    assert (await plane.job("JOB1")).reason.startswith("place 1 in the queue")
    plane.cluster.ends(("JOB2", 1), COMPLETED)
    await plane.tick()
    again = await plane.job("JOB1")
    assert (again.state, again.host_number) == (JobState.STARTING, 2)
    assert plane.reconciler.directive(again) == pb.DIRECTIVE_UNSPECIFIED


async def test_a_restarted_service_has_the_same_job_make_way(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        await preempted(plane)
        cluster = plane.cluster
    async with control_plane(tmp_path, cluster) as plane:
        await plane.tick(2)
        assert cluster.stopped == [FIRST]
        cluster.ends(FIRST, STOPPED)
        await plane.tick()
        assert (await plane.job("JOB1")).state is JobState.QUEUED
        assert (await plane.job("JOB2")).state is JobState.STARTING


@pytest.mark.parametrize("desired", [Desired.CANCELLED, Desired.PAUSED])
async def test_a_users_wish_outranks_a_preemption(plane: ControlPlane, desired: Desired) -> None:
    await preempted(plane)
    await plane.want("JOB1", desired)
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    assert (await plane.job("JOB1")).state.value == desired.value


async def test_a_job_that_breaks_while_it_makes_way_is_queued(plane: ControlPlane) -> None:
    await preempted(plane)
    await plane.tick()
    plane.cluster.ends(FIRST, LOST)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.QUEUED


async def test_a_job_whose_host_is_lost_while_it_makes_way_starts_no_other(
    plane: ControlPlane,
) -> None:
    await preempted(plane)
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.QUEUED
    assert [config["job_id"] for config in plane.cluster.started] == ["JOB1", "JOB2"]


async def test_foreign_and_stale_hosts_are_killed(plane: ControlPlane) -> None:
    await running(plane)
    plane.cluster.known[("NOBODY", 1)] = HostStatus("NOBODY", 1, answered=True)
    plane.cluster.known[("JOB1", 7)] = HostStatus("JOB1", 7, answered=False)
    await plane.tick()
    assert set(plane.cluster.killed) == {("NOBODY", 1), ("JOB1", 7)}
    assert list(plane.cluster.known) == [FIRST]


@pytest.mark.parametrize("method", ["nodes", "hosts"])
async def test_a_cluster_that_is_away_changes_nothing(plane: ControlPlane, method: str) -> None:
    job = await running(plane)
    plane.cluster.lose(FIRST)
    fault = plane.cluster.script(method, ClusterAwayError("scripted"))
    with pytest.raises(ClusterAwayError):
        await plane.tick()
    assert fault.fired
    assert await plane.job("JOB1") == job
    assert len(plane.cluster.started) == 1


class DiedError(BaseException):
    """Where the service's process would have died."""


async def started_and_paused(plane: ControlPlane) -> None:
    await plane.tick()
    await plane.trains(await plane.job("JOB1"))
    await plane.want("JOB1", Desired.PAUSED)
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["start_host", "kill_host", "stop_host"])
async def test_a_crash_at_any_call_to_the_cluster_is_made_good_by_the_next_service(
    tmp_path: Path, method: str, after: bool
) -> None:
    async with control_plane(tmp_path) as plane:
        cluster = plane.cluster
        await plane.add(new_job(1))
        fault = cluster.script(method, DiedError(), after)
        with pytest.raises(DiedError):
            await started_and_paused(plane)
        assert fault.fired
    async with control_plane(tmp_path, cluster) as plane:
        await plane.tick(2)
        job = await plane.job("JOB1")
        assert len(cluster.known) <= 1
        if method == "start_host":
            assert job.state is JobState.STARTING
            # A number that was given out costs nothing; a host that was started is the one.
            assert list(cluster.known) == [("JOB1", job.host_number)]
            assert job.host_number == (1 if after else 2)
            return
        if method == "stop_host":
            cluster.ends(FIRST, STOPPED)
            await plane.tick()
        assert (await plane.job("JOB1")).state is JobState.PAUSED
        assert not cluster.known
        assert len(cluster.started) == 1


async def test_a_restarted_service_leaves_a_running_job_alone(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        job = await running(plane)
        cluster = plane.cluster
    async with control_plane(tmp_path, cluster) as plane:
        await plane.tick(3)
        assert await plane.job("JOB1") == job
        assert len(cluster.started) == 1
        assert not cluster.killed
        assert not cluster.stopped


async def test_what_is_queued_says_its_place_and_that_the_cluster_does_not_answer(
    plane: ControlPlane,
) -> None:
    await running(plane)
    for job in (new_job(2), new_job(3, spec={"priority": 1}), new_job(4)):
        await plane.add(job)
    await plane.want("JOB4", Desired.PAUSED)
    told = {f"JOB{number}": await plane.messages(f"JOB{number}") for number in (1, 2, 3)}
    plane.cluster.away = True
    loop = asyncio.create_task(plane.reconciler.run())
    try:
        async with asyncio.timeout(20):
            while (await plane.job("JOB2")).reason == "waits to be scheduled":
                await asyncio.sleep(0.01)
    finally:
        loop.cancel()
    away = "in the queue: the cluster does not answer"
    assert (await plane.job("JOB3")).reason == f"place 1 {away}"
    assert (await plane.job("JOB2")).reason == f"place 2 {away}"
    assert (await plane.job("JOB4")).reason == "paused while it waited"
    assert (await plane.job("JOB1")).reason == "trains"
    assert told == {job_id: await plane.messages(job_id) for job_id in told}, "no events"
    plane.cluster.away = False
    await plane.tick(2)
    assert {(await plane.job(each)).state for each in ("JOB2", "JOB3")} == {
        JobState.QUEUED,
        JobState.STARTING,
    }


async def test_places_that_change_are_told_and_write_nothing(plane: ControlPlane) -> None:
    """Whoever waits behind ten thousand others must not cost a write a tick."""
    await started(plane)
    for number in (2, 3, 4):
        await plane.add(new_job(number))
    await plane.tick(2)
    waits = await plane.job("JOB4")
    assert waits.reason == "place 2 in the queue, behind job JOB3"
    plane.cluster.ends(FIRST, COMPLETED)
    await plane.tick(2)
    closer = await plane.job("JOB4")
    assert closer.reason.startswith("place 1 in the queue: needs 0 GPU and 2 CPU")
    assert closer.version == waits.version == 0
    (listed,) = [view.job for view in await plane.lifecycle.page([JobState.QUEUED], None, 10)]
    assert listed == closer == (await plane.lifecycle.get("JOB4")).job


async def test_a_job_set_aside_for_the_clusters_restart_keeps_its_reason(
    plane: ControlPlane,
) -> None:
    await plane.add(new_job(1))
    plane.reconciler._suspending = True
    plane.cluster.away = True
    await plane.reconciler._look()
    assert (await plane.job("JOB1")).reason == "waits to be scheduled"


async def test_the_loop_outlives_its_failures(plane: ControlPlane) -> None:
    away = plane.cluster.script("nodes", ClusterAwayError("scripted"))
    bug = plane.cluster.script("hosts", RuntimeError("scripted"))
    await plane.add(new_job(1))
    loop = asyncio.create_task(plane.reconciler.run())
    try:
        async with asyncio.timeout(20):
            while not plane.cluster.started:
                plane.reconciler.wake()
                await asyncio.sleep(0.01)
    finally:
        loop.cancel()
    assert away.fired
    assert bug.fired


@pytest.mark.parametrize("turns", range(6))
async def test_an_end_that_comes_beside_a_wake_is_not_lost(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    looked = asyncio.Event()

    async def look() -> None:
        looked.set()

    monkeypatch.setattr(plane.reconciler, "_look", look)
    monkeypatch.setattr("service.reconciler.GATHER_S", 0.0)
    loop = asyncio.create_task(plane.reconciler.run())
    await looked.wait()
    await asyncio.sleep(0.05)  # it waits now
    plane.reconciler.wake()
    for _ in range(turns):
        await asyncio.sleep(0)
    loop.cancel()
    done, _ = await asyncio.wait([loop], timeout=5)
    assert done, "it goes on"
