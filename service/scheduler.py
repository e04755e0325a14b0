"""Which queued job gets which resources, and who makes way for it. A pure function of a snapshot.

Strict order: priority first, then submission. A job that fits never overtakes one before it that
waits for others to end, so nobody starves. What the whole cluster can't hold is refused at
submission; if the cluster has shrunk since, or the spec waits for nodes, it waits for the cluster
to grow, out of others' way.

Invariant: a job makes way only for one of higher priority, only where its spec allows it, and only
where that lets the other start; so no two jobs can take turns at it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from service.jobs import Job
from service.placement import Capacity
from trainer.contract.spec import ResourcesSpec


@dataclass(frozen=True)
class Decision:
    """What to start now, why the others wait (job id to reason), and who makes way for whom."""

    start: tuple[Job, ...]
    waiting: dict[str, str]
    preempt: tuple[Job, ...] = ()
    preempted_by: Job | None = None


def needs(resources: ResourcesSpec) -> Capacity:
    """What a job takes when it runs on its smallest number of workers."""
    workers = resources.workers.min
    return Capacity(workers * resources.gpus_per_worker, workers * resources.cpus_per_worker)


def decide(
    queued: Sequence[Job],
    holding: Sequence[Job],
    total: Capacity,
    leaving: Collection[str] = frozenset(),
) -> Decision:
    """Start jobs in order until one does not fit; see who could make way for that one.

    Args:
        queued: jobs that want to run and hold nothing.
        holding: jobs that hold resources.
        total: what the cluster has.
        leaving: ids of those among holding that are about to give back what they hold.
    """
    free = total
    for job in holding:
        free = free.minus(needs(job.spec.resources))
    start: list[Job] = []
    waiting: dict[str, str] = {}
    blocked_by: Job | None = None
    order = sorted(queued, key=lambda job: (-job.spec.priority, job.submission))
    for place, job in enumerate(order, start=1):
        need = needs(job.spec.resources)
        if not total.holds(need):
            # What can't run until the cluster grows back must not keep others from running.
            waiting[job.id] = (
                f"needs {need.gpus} GPU and {need.cpus} CPU, the cluster now has only "
                f"{total.gpus} and {total.cpus}"
            )
        elif blocked_by is not None:
            waiting[job.id] = f"place {place} in the queue, behind job {blocked_by.id}"
        elif free.holds(need):
            start.append(job)
            free = free.minus(need)
        else:
            blocked_by = job
            waiting[job.id] = (
                f"place {place} in the queue: needs {need.gpus} GPU and {need.cpus} CPU, "
                f"free are {max(free.gpus, 0)} and {max(free.cpus, 0)} "
                f"of {total.gpus} and {total.cpus}"
            )
    if blocked_by is None:
        return Decision(tuple(start), waiting)
    preempt = _making_way(blocked_by, holding, free, leaving)
    if preempt:
        named = ", ".join(job.id for job in preempt)
        waiting[blocked_by.id] = f"place {1 + len(start)} in the queue: {named} makes way for it"
    return Decision(tuple(start), waiting, preempt, blocked_by if preempt else None)


def _making_way(
    job: Job, holding: Sequence[Job], free: Capacity, leaving: Collection[str]
) -> tuple[Job, ...]:
    """Those who must stop so that a job can start: the lowest priority first, then the youngest.

    Nobody where what is about to be free is enough, or where nobody who may be asked has enough.
    """
    need = needs(job.spec.resources)
    for each in holding:
        if each.id in leaving:
            free = free.plus(needs(each.spec.resources))
    may_be_asked = [
        each
        for each in holding
        if each.spec.preemptible
        and each.spec.priority < job.spec.priority
        and each.id not in leaving
    ]
    asked: list[Job] = []
    for each in sorted(may_be_asked, key=lambda each: (each.spec.priority, -each.submission)):
        if free.holds(need):
            break
        asked.append(each)
        free = free.plus(needs(each.spec.resources))
    if not free.holds(need):
        return ()
    for each in reversed(asked.copy()):  # the most important first: who isn't needed goes on
        without = free.minus(needs(each.spec.resources))
        if without.holds(need):
            asked.remove(each)
            free = without
    return tuple(asked)
