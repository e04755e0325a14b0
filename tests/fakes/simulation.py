"""A cluster and its jobs in rounds, decided by the scheduler alone: what the reconciler would do.

In a round those told to stop have done so, who started before trains, and the scheduler decides.
After each, what must always hold is checked: see `Simulation.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from service.jobs import Job
from service.placement import Capacity, Node, Room
from service.scheduler import Decision, Move, decide, numbers_of, settle, shortfall, worker_of
from trainer.contract.spec import Sizing
from trainer.contract.states import JobState


def in_order(some: list[Job]) -> list[Job]:
    """Higher priority first, then submission."""
    return sorted(some, key=lambda job: (-job.spec.priority, job.submission))


def worker(job: Job) -> Capacity:
    """What one of its workers takes."""
    return worker_of(job.spec.resources)


@dataclass
class Simulation:
    """left: what each job has still to do, in workers times rounds."""

    nodes: list[Node]
    now: float = 0.0
    round_s: float = 60.0
    queued: list[Job] = field(default_factory=list)
    holding: list[Job] = field(default_factory=list)
    stopping: dict[str, Move] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    stops: int = 0

    def submit(self, job: Job, work: int) -> None:
        """A job comes."""
        self.queued.append(replace(job, state=JobState.QUEUED))
        self.left[job.id] = work

    def round(self) -> Decision:
        """What happens between two looks, then one look."""
        self.now += self.round_s
        self._train()
        self._stop()
        leaving = {key: move.job.placement for key, move in self.stopping.items()}
        decision = decide(self.queued, self.holding, self.nodes, leaving, self.now)
        self.stops += len(decision.stop)
        self.stopping |= {move.job.id: move for move in decision.stop}
        for move in decision.start:
            assert move.job.id in {job.id for job in self.queued}
            self.queued = [job for job in self.queued if job.id != move.job.id]
            self.holding.append(replace(move.job, state=JobState.STARTING))
        self.check(decision)
        return decision

    def _train(self) -> None:
        for job in self.holding:
            self.left[job.id] -= len(job.placement) * (job.state is JobState.RUNNING)
        done = [job for job in self.holding if self.left[job.id] <= 0]
        self.ended += [job.id for job in done]
        self.holding = [
            replace(job, state=JobState.RUNNING) for job in self.holding if job not in done
        ]
        for job in done:
            self.stopping.pop(job.id, None)

    def _stop(self) -> None:
        for key, move in self.stopping.items():
            (job,) = [each for each in self.holding if each.id == key]
            self.holding.remove(job)
            told = replace(job, placement=move.job.placement, workers=move.job.workers)
            found = settle(told, self.holding, self.nodes) if told.placement else None
            if found is None:
                self.queued.append(replace(job, state=JobState.QUEUED, placement=()))
                continue
            changed = found.workers != job.workers
            at = self.now if changed else job.resized_at
            self.holding.append(replace(found, state=JobState.STARTING, resized_at=at))
        self.stopping = {}

    def free(self) -> Room:
        """What nobody holds, and nobody is about to go to."""
        room = Room(self.nodes)
        for job in self.holding:
            room.take(worker(job), job.placement)
            if (move := self.stopping.get(job.id)) is not None:
                kept = list(job.placement)
                for node in move.job.placement:
                    if node in kept:
                        kept.remove(node)
                    else:
                        room.take(worker(job), [node])
        return room

    def waiting(self) -> list[Job]:
        """Queued jobs that the cluster could hold, in order."""
        there = self.nodes
        return in_order(
            [
                job
                for job in self.queued
                if not shortfall(job.spec.resources, numbers_of(job)[0], there)
            ]
        )

    def check(self, decision: Decision) -> None:
        """Nothing is oversubscribed, order is kept, nothing is idle that somebody may use."""
        for node in self.nodes:
            held = [job for job in self.holding for place in job.placement if place == node.id]
            assert sum(job.spec.resources.gpus_per_worker for job in held) <= node.gpus
            assert sum(job.spec.resources.cpus_per_worker for job in held) <= node.cpus
        for job in self.holding:
            assert len(job.placement) == job.workers
            assert job.workers in job.spec.possible_workers
        room, waiting = self.free(), self.waiting()
        assert {job.id for job in self.queued} == set(decision.waiting)
        started = [move.job for move in decision.start]
        for job in started:
            before = [other for other in waiting if in_order([job, other])[0] is other]
            assert before == [], "nobody is overtaken"
        about_to_start = any("makes way" in reason for reason in decision.waiting.values())
        for job in waiting[:1]:
            least = numbers_of(job)[0]
            assert room.place(worker(job), least) is None or self.stopping, "its places are idle"
        for job in self.holding:
            if not (about_to_start or self.stopping) and self.may_grow(job, waiting):
                room.give(worker(job), job.placement)
                more = [n for n in numbers_of(job) if len(job.placement) < n]
                assert all(room.place(worker(job), n) is None for n in more), "a place is idle"
                room.take(worker(job), job.placement)

    def may_grow(self, job: Job, waiting: list[Job]) -> bool:
        """Whether the rules would let it have more."""
        policy = job.spec.resources.workers.policy
        rested = (
            job.resized_at is None
            or self.now - job.resized_at >= job.spec.resources.workers.cooldown_s
        )
        blocked = any(other.spec.priority >= job.spec.priority for other in waiting)
        gives = policy is Sizing.ELASTIC or (policy is Sizing.GROW and not blocked)
        on_nodes = set(job.placement) <= room_nodes(self.nodes)
        return gives and rested and job.state is JobState.RUNNING and on_nodes


def room_nodes(nodes: list[Node]) -> set[str]:
    """Ids of those that workers may be on."""
    return {node.id for node in nodes if node.usable}
