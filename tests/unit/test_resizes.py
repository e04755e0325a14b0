"""A job's workers change in number while it runs: a stop with a checkpoint, then another host."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everstep.v1 import everstep_pb2 as pb
from service import signs
from service.jobs import Desired, Job
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from tests.fakes.ray_cluster import FakeRayCluster, machine
from trainer.contract.outcome import RESTART_BUDGET, AttemptResult, Outcome
from trainer.contract.states import JobState

COMPLETED = AttemptResult(1, Outcome.COMPLETED, "reached the horizon, step 12", 12, 12)
STOPPED = AttemptResult(1, Outcome.STOPPED, "stopped as asked after step 5", 5, 5)
LOST = AttemptResult(1, Outcome.WORKER_LOST, "the worker was killed", 3)
FIRST, SECOND = ("JOB1", 1), ("JOB1", 2)
GROWN = "resized from 1 to 2 workers: there is room for more; stopped as asked after step 5"


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


def ranged(number: int, policy: str = "grow", low: int = 1, high: int = 2, **more: Any) -> Job:
    """A job on 2 CPUs a worker; the fake's one machine has 4."""
    workers = {"min": low, "max": high, "policy": policy, "cooldown_s": 60}
    return new_job(number, spec={"resources": {"workers": workers}, **more})


async def runs(plane: ControlPlane, job: Job, cpus: int = 4) -> Job:
    """The job, RUNNING on its first host, where there were so many CPUs; then there are 4."""
    plane.cluster.machines = [machine(1, cpus=cpus)]
    await plane.add(job)
    await plane.tick()
    running = await plane.trains(await plane.job(job.id))
    plane.cluster.machines = [machine(1, cpus=4)]
    return running


def series(plane: ControlPlane, job: Job) -> float:
    return plane.metrics.workers.labels(job_id=job.id, job_name=job.spec.name)._value.get()


async def growing(plane: ControlPlane, policy: str = "grow") -> Job:
    """JOB1, RUNNING on one worker and told to stop for two."""
    job = await runs(plane, ranged(1, policy), cpus=2)
    assert (job.workers, series(plane, job)) == (1, 1)
    await plane.tick()
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_STOP
    plane.reconciler.signs.heard.clear()
    return job


async def test_a_job_takes_what_becomes_free_with_a_checkpoint_and_says_so(
    plane: ControlPlane,
) -> None:
    job = await growing(plane)
    await plane.tick(3)
    assert plane.cluster.stopped == [FIRST], "asked once"
    assert await plane.job("JOB1") == job, "it trains until it has stopped"
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    grown = await plane.job("JOB1")
    assert (grown.state, grown.host_number, grown.workers) == (JobState.STARTING, 2, 2)
    assert grown.reason == GROWN
    assert plane.cluster.started[-1]["placement"] == ("node1", "node1")
    assert plane.cluster.started[-1]["earlier_ends"] == [], "it costs no restart"
    assert list(plane.cluster.known) == [SECOND]
    assert series(plane, job) == 2
    assert await plane.states("JOB1") == ["QUEUED", "STARTING", "STARTING"]
    assert plane.reconciler.directive(grown) == pb.DIRECTIVE_UNSPECIFIED


async def test_a_job_that_was_resized_rests(plane: ControlPlane) -> None:
    await growing(plane, "elastic")
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    job = await plane.trains(await plane.job("JOB1"), 2)
    await plane.add(ranged(2, "fixed", high=1))
    await plane.tick()
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_UNSPECIFIED
    assert job.resized_at is not None
    rested = await plane.jobs.change(job, replace(job, resized_at=time.time() - 61))
    assert rested is not None
    await plane.tick()
    assert plane.reconciler.directive(rested) == pb.DIRECTIVE_STOP
    assert (await plane.job("JOB2")).reason == "place 1 in the queue: JOB1 makes way for it"


async def test_an_elastic_job_gives_back_and_the_queued_one_starts_at_once(
    plane: ControlPlane,
) -> None:
    job = await runs(plane, ranged(1, "elastic"))
    assert job.workers == 2
    await plane.add(ranged(2, "elastic"))
    await plane.tick()
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    first, second = await plane.job("JOB1"), await plane.job("JOB2")
    assert (first.state, first.workers) == (JobState.STARTING, 1)
    assert first.reason.startswith("resized from 2 to 1 workers: job JOB2 can start")
    assert (second.state, second.workers) == (JobState.STARTING, 1)
    assert second.reason == "its resources are free; 1 worker starts"


async def test_a_job_whose_places_vanish_while_it_stops_takes_fewer_or_is_queued(
    plane: ControlPlane,
) -> None:
    await growing(plane)
    plane.cluster.ends(FIRST, STOPPED)
    plane.cluster.machines = [machine(1, cpus=2)]
    await plane.tick()
    same = await plane.job("JOB1")
    assert (same.state, same.workers) == (JobState.STARTING, 1)
    assert same.resized_at is not None, "it was stopped for it: it rests before it is again"
    assert await plane.jobs.change(same, replace(same, resized_at=1.0))
    await plane.trains(same, 2)
    plane.cluster.machines = [machine(1, cpus=4)]
    await plane.tick()
    plane.cluster.ends(SECOND, replace(STOPPED, attempt=2))
    plane.cluster.machines = [machine(1, cpus=1)]
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.placement) == (JobState.QUEUED, ())
    assert job.reason == "place 1 in the queue: with 1 worker it needs 2 CPU, the cluster has 1"
    assert any("there is no place for it now" in text for text in await plane.messages("JOB1"))
    assert series(plane, job) == 0


@pytest.mark.parametrize("desired", [Desired.CANCELLED, Desired.PAUSED])
async def test_a_users_wish_outranks_a_resize(plane: ControlPlane, desired: Desired) -> None:
    await growing(plane)
    await plane.want("JOB1", desired)
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    assert (await plane.job("JOB1")).state.value == desired.value


async def test_a_paused_job_starts_with_what_is_free_when_it_is_resumed(
    plane: ControlPlane,
) -> None:
    job = await runs(plane, ranged(1, "fixed"), cpus=2)
    await plane.tick()
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_UNSPECIFIED, "it keeps its number"
    plane.reconciler.signs.heard.clear()
    await plane.want("JOB1", Desired.PAUSED)
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    await plane.want("JOB1", Desired.RUNNING)
    await plane.tick()
    assert (await plane.job("JOB1")).workers == 2


async def test_a_service_that_goes_down_queues_a_job_that_it_was_resizing(
    plane: ControlPlane,
) -> None:
    await growing(plane)
    plane.reconciler._suspending = True
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    assert (await plane.job("JOB1")).state is JobState.QUEUED


async def test_a_job_that_does_not_stop_in_time_goes_on_in_its_new_place_by_force(
    plane: ControlPlane,
) -> None:
    await growing(plane)
    await plane.tick()
    plane.reconciler.signs.stop_grace_s = 0.0
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.workers) == (JobState.STARTING, 2)
    assert "stopped by force" in job.reason
    assert list(plane.cluster.known) == [SECOND]


async def test_a_job_that_moves_has_time_to_store_its_last_checkpoint(plane: ControlPlane) -> None:
    await growing(plane)
    await plane.tick()
    plane.reconciler.directive(await plane.job("JOB1"))
    plane.reconciler.signs.asked["JOB1"] -= 220  # 9.7 GB at 44 MB/s
    await plane.tick()
    assert not plane.cluster.killed
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    job = await plane.job("JOB1")
    assert (job.state, job.workers) == (JobState.STARTING, 2)
    assert "stopped as asked" in job.reason


async def test_a_job_that_breaks_or_loses_its_host_while_it_stops_is_resized_all_the_same(
    plane: ControlPlane,
) -> None:
    await growing(plane)
    plane.cluster.lose(FIRST)
    await plane.tick()
    assert (await plane.job("JOB1")).workers == 2


TWO = [machine(1, cpus=2), machine(2, cpus=2)]


async def spread(plane: ControlPlane, policy: str) -> Job:
    """JOB1, RUNNING with a worker on each of two machines."""
    plane.cluster.machines = list(TWO)
    await plane.add(ranged(1, policy))
    await plane.tick()
    job = await plane.trains(await plane.job("JOB1"))
    assert set(job.placement) == {"node1", "node2"}
    return job


@pytest.mark.parametrize("host_lives", [True, False])
@pytest.mark.parametrize("policy", ["grow", "elastic"])
async def test_after_a_lost_node_a_job_goes_on_with_what_is_left(
    plane: ControlPlane, policy: str, host_lives: bool
) -> None:
    await spread(plane, policy)
    plane.cluster.machines[1] = replace(TWO[1], alive=False)
    plane.cluster.says(FIRST, LOST)
    if not host_lives:
        plane.cluster.lose(FIRST)
    await plane.tick(2)
    job = await plane.job("JOB1")
    assert (job.state, job.host_number, job.placement) == (JobState.STARTING, 2, ("node1",))
    assert job.reason.startswith("resized from 2 to 1 workers: ")
    assert list(plane.cluster.known) == [SECOND]
    ended = "the worker was killed" if host_lives else "its host is gone"
    assert ended in await plane.messages("JOB1"), "how its attempt ended is told"


async def test_after_a_lost_node_a_fixed_job_waits_for_its_place_back(plane: ControlPlane) -> None:
    await spread(plane, "fixed")
    plane.cluster.machines[1] = replace(TWO[1], alive=False)
    plane.cluster.says(FIRST, LOST)
    await plane.tick(2)
    job = await plane.job("JOB1")
    assert (job.state, job.workers, job.placement) == (JobState.QUEUED, 2, ())
    assert job.reason == "place 1 in the queue: with 2 workers it needs 4 CPU, the cluster has 2"
    plane.cluster.machines.append(machine(3, cpus=2))
    await plane.tick()
    assert set((await plane.job("JOB1")).placement) == {"node1", "node3"}


async def test_a_worker_that_still_reports_keeps_its_host_whatever_is_said_of_its_node(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await spread(plane, "grow")
    plane.cluster.machines[1] = replace(TWO[1], alive=False)
    plane.reconciler.directive(job)
    await plane.tick()
    assert list(plane.cluster.known) == [FIRST]
    monkeypatch.setattr(signs, "HEARD_S", 0.0)
    await plane.tick()
    assert list(plane.cluster.known) == [SECOND]


@pytest.mark.parametrize("stopped", [False, True], ids=["drained", "being stopped"])
@pytest.mark.parametrize(("policy", "state"), [("grow", "STARTING"), ("fixed", "QUEUED")])
async def test_a_job_leaves_a_draining_node_with_a_checkpoint(
    plane: ControlPlane, policy: str, state: str, stopped: bool
) -> None:
    job = await spread(plane, policy)
    if stopped:  # as Ray tells of a box that goes down
        plane.cluster.machines = [replace(TWO[0], draining=True), *TWO[1:]]
    else:
        await plane.upkeep.drain(TWO[0], "admin")
    await plane.tick()
    assert plane.reconciler.directive(job) == pb.DIRECTIVE_STOP
    await plane.tick()
    assert list(plane.cluster.known) == [FIRST], "its workers live: they are asked"
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()
    left = await plane.job("JOB1")
    assert left.state == state
    assert left.placement == (("node2",) if policy == "grow" else ())
    assert any(
        "1 of its workers lost, or must leave, their node" in text
        for text in await plane.messages("JOB1")
    )


class DiedError(BaseException):
    """Where the service's process would have died."""


async def stopped_for_growth(plane: ControlPlane) -> None:
    await plane.tick()
    plane.cluster.ends(FIRST, STOPPED)
    await plane.tick()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["start_host", "kill_host", "stop_host"])
async def test_a_crash_at_any_call_of_a_resize_is_made_good_by_the_next_service(
    tmp_path: Path, method: str, after: bool
) -> None:
    async with control_plane(tmp_path) as plane:
        cluster: FakeRayCluster = plane.cluster
        await growing(plane)
        fault = cluster.script(method, DiedError(), after)
        with pytest.raises(DiedError):
            await stopped_for_growth(plane)
        assert fault.fired
    async with control_plane(tmp_path, cluster) as plane:
        if method == "stop_host":
            await plane.tick(2)  # it is decided anew
            cluster.ends(FIRST, STOPPED)
        await plane.tick(3)
        job = await plane.job("JOB1")
        assert (job.state, job.workers) == (JobState.STARTING, 2)
        assert list(cluster.known) == [("JOB1", job.host_number)]
        assert cluster.started[-1]["placement"] == ("node1", "node1")


async def test_a_job_stopped_for_a_resize_by_a_service_that_died_is_queued_and_goes_on(
    tmp_path: Path,
) -> None:
    async with control_plane(tmp_path) as plane:
        cluster = plane.cluster
        await growing(plane)
        await plane.tick()
    cluster.ends(FIRST, STOPPED)
    async with control_plane(tmp_path, cluster) as plane:
        await plane.tick()
        job = await plane.job("JOB1")
        assert (job.state, job.workers, job.host_number) == (JobState.STARTING, 2, 2)
        assert await plane.states("JOB1") == ["QUEUED", "STARTING", "QUEUED", "STARTING"]


async def test_any_number_of_resizes_spends_no_restarts(plane: ControlPlane) -> None:
    await runs(plane, ranged(1, "grow"), cpus=2)
    for number in range(1, RESTART_BUDGET + 5):
        job = await plane.job("JOB1")
        on_one = replace(job, placement=("node1",), workers=1, resized_at=None)
        assert await plane.jobs.change(job, on_one)
        await plane.tick()
        plane.cluster.ends(("JOB1", number), replace(STOPPED, attempt=number))
        await plane.tick()
        job = await plane.trains(await plane.job("JOB1"), number + 1)
        assert (job.host_number, job.workers) == (number + 1, 2)
        assert plane.cluster.started[-1]["earlier_ends"] == []
