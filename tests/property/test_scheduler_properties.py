"""For any jobs and cluster: nothing is oversubscribed, order is strict, nobody starves or flaps.

Snapshots are reached as the service reaches them, round by round, while jobs come and end and nodes
join, drain and are lost; tests.fakes.simulation checks after each round what must always hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import Job
from service.placement import Node
from service.scheduler import numbers_of, shortfall
from tests.fakes.control_plane import new_job
from tests.fakes.ray_cluster import machine
from tests.fakes.simulation import Simulation, in_order

POLICIES = ("fixed", "grow", "elastic")
sizes = st.tuples(st.integers(0, 4), st.integers(0, 12))
clusters = st.lists(sizes, min_size=1, max_size=3).map(
    lambda found: [machine(n, gpus, cpus) for n, (gpus, cpus) in enumerate(found)]
)


@st.composite
def jobs(draw: st.DrawFn, most: int = 6, **fixed: Any) -> list[Job]:
    """So many jobs at most, in any order of submission."""
    found = []
    for number in range(1, 1 + draw(st.integers(1, most))):
        least = draw(st.integers(1, 3))
        workers = {
            "min": least,
            "max": least + draw(st.integers(0, 3)),
            "policy": draw(st.sampled_from(POLICIES)),
            "cooldown_s": draw(st.sampled_from([0, 100, 1000])),
        }
        spec = {
            "priority": draw(st.integers(-1, 1)),
            "preemptible": draw(st.booleans()),
            "resources": {
                "cpus_per_worker": draw(st.integers(1, 4)),
                "gpus_per_worker": draw(st.integers(0, 1)),
                "workers": workers,
            },
            "batch": {"device_batch_size": 1, "total_batch_size": 64 * 12},  # 5 doesn't divide
            **fixed,
        }
        found.append(new_job(number, spec=spec, submission=number))
    return found


def fits(job: Job, nodes: list[Node]) -> bool:
    return not shortfall(job.spec.resources, numbers_of(job)[0], nodes)


works = st.lists(st.integers(1, 12), min_size=6, max_size=6)


@settings(max_examples=200)
@given(jobs(), works, clusters)
def test_jobs_that_come_run_change_and_make_way_all_end(
    coming: list[Job], work: list[int], nodes: list[Node]
) -> None:
    """One job comes in a round. Nobody starves; what is taken from a job is taken for another."""
    sim = Simulation(nodes)
    coming = [job for job in coming if fits(job, nodes)]
    expected = {job.id for job in coming}
    for _ in range(300):
        if coming:
            job = coming.pop()
            sim.submit(job, work[job.submission - 1])
        elif not (sim.queued or sim.holding):
            break
        decision = sim.round()
        for move in decision.stop:
            lost = next(job for job in sim.holding if job.id == move.job.id)
            if len(move.job.placement) < lost.workers:
                assert any(f"{move.job.id}" in reason for reason in decision.waiting.values())
    assert set(sim.ended) == expected
    assert sim.stops <= 3 * 6 * 6, "nobody takes turns"


@settings(max_examples=200)
@given(jobs(), clusters)
def test_a_cluster_left_to_itself_comes_to_rest(some: list[Job], nodes: list[Node]) -> None:
    """Endless jobs: within a few cool-downs nothing changes any more. No two take turns."""
    sim = Simulation(nodes, round_s=1000.0)
    for job in some:
        sim.submit(job, 10**9)
        sim.round()
    changes = [sim.round() for _ in range(30)]
    assert all(not (each.start or each.stop) for each in changes[-10:])


@settings(max_examples=200)
@given(jobs(), works, clusters, st.data())
def test_nodes_that_join_drain_and_go_never_break_the_rules(
    some: list[Job], work: list[int], nodes: list[Node], data: st.DataObject
) -> None:
    sim = Simulation(list(nodes))
    for job in some:
        sim.submit(job, work[job.submission - 1])
        sim.round()
        match data.draw(st.sampled_from(["join", "drain", "lose", "nothing"])):
            case "join":
                sim.nodes.append(machine(len(sim.nodes), *data.draw(sizes)))
            case "drain":
                place = data.draw(st.integers(0, len(sim.nodes) - 1))
                sim.nodes[place] = replace(sim.nodes[place], draining=True)
            case "lose":
                place = data.draw(st.integers(0, len(sim.nodes) - 1))
                sim.nodes[place] = replace(sim.nodes[place], alive=False)
        sim.round()
    for _ in range(2):
        sim.round()
    gone = {node.id for node in sim.nodes if not node.usable}
    assert not any(set(job.placement) & gone for job in sim.holding), "all have left"
    sim.nodes += nodes if not gone else [replace(machine(90 + n, node.gpus, node.cpus))
                                         for n, node in enumerate(nodes)]  # fmt: skip
    for _ in range(300):
        if not any(fits(job, sim.nodes) for job in sim.queued) and not sim.holding:
            break
        sim.round()
    assert {job.id for job in sim.queued} == {
        job.id for job in sim.queued if not fits(job, sim.nodes)
    }


@settings(max_examples=200)
@given(jobs(resources={"gpus_per_worker": 0}, preemptible=False), works, clusters)
def test_jobs_of_one_worker_run_in_strict_order(
    some: list[Job], work: list[int], nodes: list[Node]
) -> None:
    sim = Simulation(nodes)
    fitting = [job for job in some if fits(job, nodes)]
    for job in fitting:
        sim.submit(job, work[job.submission - 1])
    began: list[str] = []
    for _ in range(300):
        began += [move.job.id for move in sim.round().start]
    assert began == [job.id for job in in_order(fitting)]
