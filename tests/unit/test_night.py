"""A night of four jobs on four GPUs, and more in the small hours: who has how many of them, when.

Once by the scheduler alone, with pauses between changes, and once by the reconciler over a scripted
cluster, with none; both check that no GPU is idle that a job may use, and that order is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from service.jobs import Job
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from tests.fakes.ray_cluster import machine
from tests.fakes.simulation import Simulation
from trainer.contract.outcome import AttemptResult, Outcome
from trainer.contract.states import JobState

FOUR = machine(1, gpus=4, cpus=16)
SECOND = machine(2, gpus=2, cpus=8)
ENDLESS = 10**9


def job(number: int, low: int, high: int, policy: str, cooldown_s: int, **more: Any) -> Job:
    workers = {"min": low, "max": high, "policy": policy, "cooldown_s": cooldown_s}
    spec = {
        "resources": {"gpus_per_worker": 1, "cpus_per_worker": 1, "workers": workers},
        "batch": {"device_batch_size": 1, "total_batch_size": 64 * 12},
        **more,
    }
    return new_job(number, spec=spec, submission=number)


def four(cooldown_s: int) -> list[Job]:
    return [
        job(1, 1, 4, "elastic", cooldown_s),
        job(2, 1, 2, "grow", cooldown_s),
        job(3, 2, 2, "fixed", cooldown_s, priority=1),
        job(4, 1, 6, "elastic", cooldown_s, priority=-1),
    ]


# What happens before which round: a job comes, a job's work is done, machines change.
NIGHT: dict[int, tuple[str, Any]] = {
    0: ("submit", 1),
    3: ("submit", 2),
    6: ("submit", 3),
    9: ("submit", 4),
    12: ("end", 3),
    18: ("nodes", [FOUR, SECOND]),
    24: ("nodes", [FOUR, replace(SECOND, draining=True)]),
    27: ("nodes", [FOUR, replace(SECOND, alive=False)]),
    30: ("end", 1),
    36: ("end", 2),
}
# By round: how many GPUs each job has from then on. What it takes until a stop is done is a round.
AT_ONCE = {
    0: {1: 4},
    4: {1: 3, 2: 1},  # the elastic one gives one back for its equal
    7: {1: 1, 2: 1, 3: 2},  # and two for its better
    12: {1: 1, 2: 1},
    13: {1: 3, 2: 1},  # in order; job 4 is not before them
    19: {1: 4, 2: 2},  # a second box: 6 GPUs
    25: {1: 3, 2: 1},  # which drains
    30: {2: 1, 4: 2},
    31: {2: 2, 4: 2},
    36: {4: 2},
    37: {4: 4},
}
# The same night where a job rests five rounds between two changes.
WITH_PAUSES = {
    0: {1: 4},
    4: {1: 3, 2: 1},
    10: {1: 1, 2: 1, 3: 2},  # it has given back a moment ago
    12: {1: 1, 2: 1, 4: 1},  # and may not grow yet: so the last in order has a GPU
    13: {1: 1, 2: 2, 4: 1},
    19: {1: 3, 2: 2, 4: 1},
    25: {1: 1, 2: 2, 4: 1},
    30: {2: 2, 4: 1},
    31: {2: 2, 4: 2},
    36: {4: 2},
    37: {4: 4},
}
ROUNDS = 42


def simulated(cooldown_s: int, round_s: float) -> list[dict[int, int]]:
    """Who holds how many GPUs after each round."""
    sim = Simulation([FOUR], round_s=round_s)
    jobs = {each.submission: each for each in four(cooldown_s)}
    told = []
    for number in range(ROUNDS):
        match NIGHT.get(number):
            case ("submit", which):
                sim.submit(jobs[which], ENDLESS)
            case ("end", which):
                sim.left[jobs[which].id] = 0
            case ("nodes", nodes):
                sim.nodes = nodes
        sim.round()
        told.append({each.submission: each.workers for each in sim.holding})
    return told


def changes(told: list[dict[int, int]]) -> dict[int, dict[int, int]]:
    """Only the rounds in which something is other than before."""
    found: dict[int, dict[int, int]] = {}
    for number, held in enumerate(told):
        held = dict(sorted(held.items()))
        if not found or [*found.values()][-1] != held:
            found[number] = held
    return found


def test_no_gpu_is_idle_that_a_job_may_use_and_order_is_kept() -> None:
    assert changes(simulated(cooldown_s=0, round_s=60)) == AT_ONCE
    assert changes(simulated(cooldown_s=300, round_s=60)) == WITH_PAUSES


async def next_round(plane: ControlPlane, done: set[str], attempts: dict[str, int]) -> None:
    """Trainers do what they were told, then the service looks once."""
    for job in await plane.jobs.unfinished():
        key = (job.id, job.host_number)
        number = attempts.get(job.id, 0)
        if job.state is JobState.STARTING:
            attempts[job.id] = number = number + 1
            await plane.trains(job, number)
        if job.id in done:
            plane.cluster.ends(key, AttemptResult(number, Outcome.COMPLETED, "done", 12, 12))
        elif job.id in plane.reconciler._stopping:
            plane.cluster.ends(key, AttemptResult(number, Outcome.STOPPED, "stopped", 5, 5))
    await plane.tick()


async def test_the_reconciler_brings_the_same_night_about(tmp_path: Path) -> None:
    told, done, attempts = [], set(), {}
    jobs = {each.submission: each for each in four(cooldown_s=0)}
    async with control_plane(tmp_path) as plane:
        plane.cluster.machines = [FOUR]
        for number in range(ROUNDS):
            match NIGHT.get(number):
                case ("submit", which):
                    await plane.add(jobs[which])
                case ("end", which):
                    done.add(jobs[which].id)
                case ("nodes", nodes):
                    plane.cluster.machines = nodes
                    for node in nodes:
                        if node.draining:
                            await plane.upkeep.drain(node, "admin")
            await next_round(plane, done, attempts)
            found = await plane.jobs.unfinished()
            told.append({j.submission: len(j.placement) for j in found if j.holds_resources})
            for node in plane.cluster.machines:
                held = [place for j in found for place in j.placement if place == node.id]
                assert len(held) <= node.gpus
        assert changes(told) == AT_ONCE
        assert max(attempts.values()) > 5, "many resizes, and none costs a restart"
        assert all(each["earlier_ends"] == [] for each in plane.cluster.started)
