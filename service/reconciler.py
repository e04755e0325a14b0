"""Moves what is towards what is wanted: the one reviver of hosts, the one starter of jobs.

Each tick reads the jobs that are not final and the hosts that Ray knows, and takes at most one step
with each job. Nothing is remembered between ticks but where a job that was told to stop goes on
then, and service.signs. So the service may die at any line: the next tick of the next service goes
on; a job that it had stopped for another number of workers is queued, and starts where there is
room.

Invariant: a job has at most one host that counts, the one with its host_number; any other is
killed. A host is given up for dead on two signs only: the cluster answers and doesn't know it, and
nothing that it started still reports, for which a service that has just begun waits longer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.errors import ClusterAwayError
from service.jobs import Desired, Job
from service.metrics import Metrics
from service.placement import Node, Placement
from service.ray_cluster import HostStatus, RayCluster
from service.scheduler import Move, decide, settle
from service.signs import Signs
from service.store import JobStore
from service.waiting import Waiting, rank
from trainer.contract.outcome import (
    RESTART_WINDOW_S,
    AttemptResult,
    Outcome,
    Policy,
    counts,
    pause_before_restart,
)
from trainer.contract.states import JobState

GATHER_S = 0.05  # from a wake to the look: several at once cost one
TICK_S = 1.0
# Between two hosts of one job, when those before are lost: a host that can't live must not be
# started every tick.
HOST_PAUSES_S = (0.0, 2.0, 10.0, 30.0, 60.0)
# When the service takes the cluster down with it: below the container's stop_grace_period. What an
# attempt has on its box's disk by then, the next one there brings to the store.
SUSPEND_GRACE_S = 90.0
log = logging.getLogger(__name__)

# What a job becomes when its attempt stopped as asked.
STOPPED_AS: dict[Desired, JobState] = {
    Desired.CANCELLED: JobState.CANCELLED,
    Desired.PAUSED: JobState.PAUSED,
    Desired.RUNNING: JobState.QUEUED,  # the cluster goes down, or somebody needs the place
}


class Reconciler:
    """Runs until cancelled. `wake` makes it look at once."""

    def __init__(
        self,
        jobs: JobStore,
        cluster: RayCluster,
        metrics: Metrics,
        host_config: Callable[[Job], dict[str, Any]],
        mark: Callable[[Iterable[Node]], tuple[Node, ...]] = tuple,
        signs: Signs | None = None,
    ) -> None:
        """host_config: what the host of a job is told. mark: which nodes may not be used."""
        self._mark = mark
        self._jobs = jobs
        self._cluster = cluster
        self._metrics = metrics
        self._host_config = host_config
        self._awake = asyncio.Event()
        self._hosts_lost: dict[str, tuple[int, float]] = {}  # job id -> how many, when the last
        self._stopping: dict[str, Move] = {}  # job id -> where it goes on once it has stopped
        self.signs = signs or Signs()
        self._waiting: Mapping[str, str] = {}
        self._suspending = False
        self.nodes: tuple[Node, ...] | None = None
        self.seen_at = 0.0  # when Ray told of them

    def wake(self) -> None:
        """Look now instead of at the next tick."""
        self._awake.set()

    def directive(self, job: Job) -> pb.Directive:
        """What the attempt of a job should be told; it reported a moment ago."""
        self.signs.hear(job.id)
        return pb.DIRECTIVE_STOP if self._stops(job) else pb.DIRECTIVE_UNSPECIFIED

    def explained(self, job: Job) -> Job:
        """The job with why it waits, where it does, by the last decision; that is kept nowhere."""
        waits = job.state is JobState.QUEUED and job.desired is Desired.RUNNING
        return replace(job, reason=self._waiting.get(job.id, job.reason)) if waits else job

    def _stops(self, job: Job) -> bool:
        """Whether its attempt should end, whatever becomes of the job then."""
        if self._suspending or not job.holds_resources:  # who reports for one that doesn't is lost
            return True
        return job.desired is not Desired.RUNNING or job.id in self._stopping

    async def run(self) -> None:
        """Tick for ever. Who wakes it is answered first."""
        while True:
            self._awake.clear()
            try:
                await self._look()
            except Exception:
                # The loop must outlive any single failure; the next tick starts from the facts.
                log.exception("a reconciliation failed")
            try:
                async with asyncio.timeout(TICK_S):  # wait_for loses a cancellation beside a wake
                    await self._awake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(GATHER_S)

    async def suspend(self) -> None:
        """Checkpoint and queue every active job, for the cluster is about to go down."""
        self._suspending = True
        self.wake()
        deadline = time.monotonic() + SUSPEND_GRACE_S
        while time.monotonic() < deadline:
            if not any(job.holds_resources for job in await self._jobs.unfinished()):
                return
            await asyncio.sleep(0.1)
        log.warning(
            "jobs did not stop within %.0f s; they go on from what their box or the store has",
            SUSPEND_GRACE_S,
        )

    async def _look(self) -> None:
        """A tick; while Ray is away, what is queued says so."""
        try:
            await self.tick()
        except ClusterAwayError as error:
            self._metrics.cluster_up.set(0)
            log.warning("%s", error)
            queued = [] if self._suspending else _queued(await self._jobs.unfinished())
            self._waiting = Waiting(queued, lambda _: ": the cluster does not answer")

    async def tick(self) -> None:
        """One look at everything; ClusterAwayError where Ray doesn't answer."""
        self.signs.look()
        jobs = await self._jobs.unfinished()
        for job in jobs:
            if not job.holds_resources:
                await self._settle_idle(job)
        self.nodes, self.seen_at = self._mark(await self._cluster.nodes()), time.time()
        hosts = await self._cluster.hosts()
        self._metrics.cluster_up.set(1)
        # Read again: a host is younger than the job that it belongs to.
        jobs = await self._jobs.unfinished()
        by_name = {(host.job_id, host.host_number): host for host in hosts}
        wanted = {(job.id, job.host_number) for job in jobs if job.holds_resources}
        for key in by_name.keys() - wanted:
            await self._cluster.kill_host(*key)
        # The most important first: where hosts are gone, places go by the order of the queue.
        for job in sorted(jobs, key=rank):
            if job.holds_resources:
                try:
                    await self._settle_active(job, by_name.get((job.id, job.host_number)))
                except ClusterAwayError:
                    raise
                except Exception:  # others must not wait for what is wrong with one
                    log.exception("job %s could not be looked after", job.id)
        await self._schedule()

    async def _settle_idle(self, job: Job) -> None:
        match job.state, job.desired:
            case _, Desired.CANCELLED:
                await self._move(job, JobState.CANCELLED, "cancelled while it held no resources")
            case JobState.QUEUED, Desired.PAUSED:
                await self._move(job, JobState.PAUSED, "paused while it waited")
            case JobState.PAUSED, Desired.RUNNING:
                await self._move(job, JobState.QUEUED, "resumed; waits to be scheduled")

    async def _settle_active(self, job: Job, host: HostStatus | None) -> None:
        if host is not None and not host.finished and self._lost_a_node(job):
            if host.answered:
                await self._note_ends(job, [AttemptResult.from_dict(each) for each in host.results])
            await self._cluster.kill_host(job.id, job.host_number)  # it would wait there for ever
            host = None
        if host is None:
            await self._without_host(job)
            return
        stopping = self._stops(job)
        if not stopping:
            self.signs.forget_stop(job.id)  # a stop that was taken back: the next has its grace
        if not host.answered:
            if stopping:
                await self._press_stop(job, answers=False)
            return
        results = [AttemptResult.from_dict(result) for result in host.results]
        failed = await self._note_ends(job, results)
        if host.finished:
            # First the state: a host whose job somebody changed meanwhile is asked again.
            await self._conclude(job, results, host.budget_spent)
        elif stopping:
            await self._press_stop(job, answers=True)
        elif failed and job.state is JobState.RUNNING:
            last = results[-1]
            reason = f"attempt {last.attempt} ended ({last.outcome}); the next one starts"
            await self._move(job, JobState.STARTING, reason)
        elif results and not results[-1].attempt and job.state is JobState.STARTING:
            last = results[-1]  # of an attempt that claimed no number nothing else tells
            told = replace(job, reason=f"{last.outcome}: {last.message}; the next attempt starts")
            if told != job:
                await self._jobs.change(job, told, events.state_changed(told, time.time()))

    async def _without_host(self, job: Job) -> None:
        """The cluster answers and doesn't know the host: it died, or was never started."""
        if self.signs.heard_lately(job.id):
            return  # its workers live, whatever the cluster says
        await self._end_lost_attempts(job)
        ends = await self._counted_ends(job)
        pause_s = pause_before_restart(ends)
        if self._stops(job):
            reason = "stopped when its host was already gone; the last committed checkpoint stands"
            await self._set_aside(job, reason)
        elif pause_s is None:
            reason = f"restart budget spent; {Outcome.HOST_LOST}: its host is gone"
            await self._move(job, JobState.FAILED, reason)
        elif time.time() >= max(ends, default=0.0) + pause_s and self._may_start_again(job):
            await self._go_on(job, job.placement, "its host is gone; another one starts")

    def _lost_a_node(self, job: Job) -> bool:
        """Whether a worker's node is gone, and no worker reports any more."""
        alive = {node.id for node in self.nodes or () if node.alive}
        return not set(job.placement) <= alive and not self.signs.heard_lately(job.id)

    def _may_start_again(self, job: Job) -> bool:
        """Whether the pause since the last lost host is over; a job that trained starts anew."""
        lost, at = self._hosts_lost.get(job.id, (0, 0.0))
        if job.state is JobState.RUNNING:
            lost = 0
        if time.monotonic() - at < HOST_PAUSES_S[min(lost, len(HOST_PAUSES_S) - 1)]:
            return False
        self._hosts_lost[job.id] = (lost + 1, time.monotonic())
        return True

    async def _end_lost_attempts(self, job: Job) -> None:
        """Attempts that nobody is left to tell of ended with their host."""
        view = await self._jobs.view(job.id)
        for attempt in view.attempts if view else ():
            if attempt.ended_at is None:
                step = view.progress.step if view else attempt.start_step
                lost = AttemptResult(attempt.number, Outcome.HOST_LOST, "its host is gone", step)
                await self._note_ends(job, [lost])

    async def _counted_ends(self, job: Job) -> list[float]:
        """When attempts of a job ended lately that its budget of restarts pays for."""
        view = await self._jobs.view(job.id)
        since = time.time() - RESTART_WINDOW_S
        return [
            attempt.ended_at
            for attempt in (view.attempts if view else ())
            if attempt.ended_at is not None
            and attempt.ended_at > since
            and counts(Outcome(attempt.outcome))
        ]

    async def _conclude(self, job: Job, results: list[AttemptResult], budget_spent: bool) -> None:
        """The host is done: so is the job, unless it was set aside."""
        self.signs.forget_stop(job.id)
        last = results[-1]
        # With restarts left, a host ends only because it was told to start no other attempt.
        told = last.policy is Policy.RESTART and (not budget_spent or self._stops(job))
        if last.outcome is Outcome.COMPLETED:
            moved = await self._move(job, JobState.SUCCEEDED, last.message, last.step)
        elif told or last.outcome is Outcome.STOPPED or job.desired is Desired.CANCELLED:
            moved = await self._set_aside(job, last.message, last.step)
        else:
            budget = "restart budget spent; " if last.policy is Policy.RESTART else ""
            reason = f"{budget}{last.outcome}: {last.message}"
            moved = await self._move(job, JobState.FAILED, reason, last.step)
        if moved:
            await self._cluster.kill_host(job.id, job.host_number)

    async def _note_ends(self, job: Job, results: list[AttemptResult]) -> bool:
        """Record how attempts ended, each once; whether the newest of them is news."""
        news = False
        for result in results:
            now = min(result.ended_at or time.time(), time.time())  # its clock may be ahead
            record = events.attempt_ended(
                result.attempt, result.outcome, result.message, result.step, now
            )
            news = await self._jobs.end_attempt(
                job.id, result.attempt, result.outcome, result.message, now, record
            )
            self._metrics.observe_end(job, result.outcome)
        return news

    async def _press_stop(self, job: Job, answers: bool) -> None:
        """The directive goes with the next report, the host starts nothing new; then by force."""
        news = self.signs.ask(job)
        if not news and (reason := self.signs.overdue(job)):
            await self._cluster.kill_host(job.id, job.host_number)
            self.signs.forget_stop(job.id)
            await self._set_aside(job, reason)
        elif answers and job.id not in self.signs.told:  # one that doesn't would hold all others up
            await self._cluster.stop_host(job.id, job.host_number)
            self.signs.told.add(job.id)

    async def _set_aside(self, job: Job, reason: str, step: int = 0) -> bool:
        """A job has stopped: it goes on elsewhere if it was stopped for that, else as desired."""
        move = self._stopping.get(job.id)
        place = self._goes_to(job)
        if move is not None and place:
            return await self._go_on(job, place, f"{move.reason}; {reason}")
        if move is not None and job.desired is Desired.RUNNING:
            reason = f"{move.reason}: {reason}"
        return await self._move(job, STOPPED_AS[job.desired], reason, step)

    def _goes_to(self, job: Job) -> Placement:
        """Where a job that was told to stop goes on at once; empty: it doesn't."""
        if self._suspending or job.desired is not Desired.RUNNING or job.id not in self._stopping:
            return ()
        return self._stopping[job.id].job.placement

    async def _go_on(self, job: Job, place: Placement, reason: str) -> bool:
        """Start a job's next host in a place, else in the next best; queue it if there is none."""
        others = [
            each
            for each in await self._jobs.unfinished()
            if each.holds_resources and each.id != job.id
        ]
        wanted = replace(job, placement=place, workers=len(place) or job.workers)
        found = settle(wanted, others, self.nodes or ())
        if found is None:
            return await self._move(job, JobState.QUEUED, f"{reason}; there is no place for it now")
        if wanted.workers != job.workers:  # whatever came of it: it was stopped for it
            found = replace(found, resized_at=time.time())
        if found.workers != job.workers:
            reason = f"resized from {job.workers} to {found.workers} workers: {reason}"
        return await self._start(found, reason)

    async def _schedule(self) -> None:
        if self._suspending or self.nodes is None:
            return
        jobs = await self._jobs.unfinished()
        queued = _queued(jobs)
        holding = [job for job in jobs if job.holds_resources]
        held = {job.id for job in holding}
        # What was told to stop does so even if the reason is gone by now: it has heard it.
        self._stopping = {key: move for key, move in self._stopping.items() if key in held}
        leaving = {job.id: self._goes_to(job) for job in holding if self._stops(job)}
        decision = decide(queued, holding, self.nodes, leaving, time.time())
        if decision.stop:
            self._stopping |= {move.job.id: move for move in decision.stop}
            self.wake()  # they hear it at the next tick, which may as well be now
        self._waiting = decision.waiting
        for move in decision.start:
            await self._start(move.job, move.reason)

    async def _start(self, job: Job, reason: str) -> bool:
        """Number the next host first, then start it: a crash in between costs one number.

        Whether it does; False where somebody else changed the job first.
        """
        self.signs.forget_stop(job.id)  # of another host
        if job.state is not JobState.STARTING:
            job = job.moved(JobState.STARTING, reason, time.time())
        numbered = replace(job, host_number=job.host_number + 1, reason=reason)
        stored = await self._jobs.change(job, numbered, events.state_changed(numbered, time.time()))
        if stored is None:
            return False
        self._stopping.pop(job.id, None)
        self._metrics.observe_workers(stored)
        ends = await self._counted_ends(stored)
        await self._cluster.start_host({**self._host_config(stored), "earlier_ends": ends})
        return True

    async def _move(self, job: Job, to: JobState, reason: str, step: int = 0) -> bool:
        """Whether the job is in its new state; False where somebody else changed it first."""
        now = time.time()
        moved = job.moved(to, reason, now)
        record = events.state_changed(moved, now, step)
        if await self._jobs.change(job, moved, record) is None:
            return False
        self._stopping.pop(job.id, None)
        self._metrics.observe_workers(moved)
        if moved.is_final:
            self._hosts_lost.pop(job.id, None)
            self.signs.forget(job.id)
            self._metrics.forget_later(job.id)
        return True


def _queued(jobs: Iterable[Job]) -> list[Job]:
    """Those among them that wait for a place."""
    return [j for j in jobs if j.state is JobState.QUEUED and j.desired is Desired.RUNNING]
