"""Which queued job gets which resources. A pure function of a snapshot.

Strict order: priority first, then submission. A job that fits never overtakes one before it that
waits for others to end, so nobody starves. What the whole cluster can't hold is refused at
submission; if the cluster has shrunk since, it waits for it to grow, out of others' way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.jobs import Job
from trainer.contract.spec import ResourcesSpec


@dataclass(frozen=True)
class Capacity:
    """GPUs and CPUs, of a cluster or of what is left of it."""

    gpus: int
    cpus: int

    def minus(self, need: Capacity) -> Capacity:
        """What is left; may be negative where more is held than there is."""
        return Capacity(self.gpus - need.gpus, self.cpus - need.cpus)

    def holds(self, need: Capacity) -> bool:
        """Whether need fits in this."""
        return need.gpus <= self.gpus and need.cpus <= self.cpus


@dataclass(frozen=True)
class Decision:
    """What to start now, and why the others wait (job id to reason)."""

    start: tuple[Job, ...]
    waiting: dict[str, str]


def needs(resources: ResourcesSpec) -> Capacity:
    """What a job takes when it runs on its smallest number of workers."""
    workers = resources.workers.min
    return Capacity(workers * resources.gpus_per_worker, workers * resources.cpus_per_worker)


def decide(queued: Sequence[Job], holding: Sequence[Job], total: Capacity) -> Decision:
    """Start jobs in order until one does not fit.

    Args:
        queued: jobs that want to run and hold nothing.
        holding: jobs that hold resources.
        total: what the cluster has.
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
    return Decision(tuple(start), waiting)
