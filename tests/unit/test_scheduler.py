"""Which queued job starts: strict order, and a reason for each that waits."""

from dataclasses import replace
from typing import Any

import pytest

from service import scheduler
from service.jobs import Job
from service.placement import Node
from service.scheduler import Decision, Move, decide, settle, shortfall
from tests.fakes.control_plane import new_job
from tests.fakes.ray_cluster import machine
from trainer.contract.states import JobState


def job(
    number: int,
    cpus: int,
    gpus: int = 0,
    workers: int = 1,
    priority: int = 0,
    preemptible: bool = False,
) -> Job:
    resources = {
        "cpus_per_worker": cpus,
        "gpus_per_worker": gpus,
        "workers": {"min": workers, "max": workers},
    }
    spec = {
        "resources": resources,
        "priority": priority,
        "preemptible": preemptible,
        "batch": {"total_batch_size": 1024},
    }
    return new_job(number, spec=spec, submission=number)


def ids(moves: tuple[Move, ...]) -> list[str]:
    return [move.job.id for move in moves]


def cluster(gpus: int, cpus: int) -> list[Node]:
    return [machine(1, gpus, cpus)]


def test_jobs_start_in_order_of_submission_while_they_fit() -> None:
    queued = [job(3, 1), job(1, 2), job(2, 2)]
    decision = decide(queued, [], cluster(0, 4))
    assert ids(decision.start) == ["JOB1", "JOB2"]
    assert decision.waiting == {
        "JOB3": "place 3 in the queue: needs 0 GPU and 1 CPU, free are 0 and 0 of 0 and 4"
    }


def test_priority_comes_before_submission() -> None:
    decision = decide([job(1, 4), job(2, 4, priority=5)], [], cluster(0, 4))
    assert ids(decision.start) == ["JOB2"]


def test_a_small_job_never_overtakes_a_large_one_that_waits() -> None:
    decision = decide([job(1, 4), job(2, 1)], [job(9, 1)], cluster(0, 4))
    assert decision.start == ()
    assert decision.waiting["JOB2"] == "place 2 in the queue, behind job JOB1"


def test_a_decision_looks_at_nobody_behind_the_first_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Job] = []
    monkeypatch.setattr(
        scheduler, "numbers_of", lambda job: looked.append(job) or job.spec.possible_workers
    )
    queued = [job(number, 1, priority=number % 3) for number in range(1, 1001)]
    decision = decide(queued, [], cluster(0, 4))
    assert len(looked) < 20
    assert len(decision.waiting) == 996
    assert len(looked) < 20, "also counting them needs no reason"
    last = decision.waiting["JOB999"]
    assert last == "place 1000 in the queue, behind job JOB14"


def test_gpus_and_cpus_both_count() -> None:
    assert decide([job(1, 1, gpus=1)], [], cluster(gpus=0, cpus=9)).start == ()
    assert decide([job(1, 2, gpus=1)], [], cluster(gpus=9, cpus=1)).start == ()
    assert ids(decide([job(1, 1, gpus=1)], [], cluster(1, 1)).start) == ["JOB1"]


def test_nothing_starts_where_more_is_held_than_there_is() -> None:
    decision = decide([job(1, 1)], [job(8, 4), job(9, 4)], cluster(0, 4))
    assert decision.start == ()
    assert "free are 0 and 0 of 0 and 4" in decision.waiting["JOB1"]


def lesser(number: int, cpus: int, priority: int = 0) -> Job:
    """A running job that makes way."""
    return job(number, cpus, priority=priority, preemptible=True)


def test_the_lowest_priority_and_then_the_youngest_makes_way_and_the_job_says_so() -> None:
    urgent = job(9, 2, priority=5)
    decision = decide([urgent], [lesser(1, 2), lesser(2, 2), lesser(3, 2, 1)], cluster(0, 6))
    assert ids(decision.stop) == ["JOB2"]
    assert [move.reason for move in decision.stop] == ["preempted by job JOB9"]
    assert decision.stop[0].job.placement == ()
    assert decision.start == ()
    assert decision.waiting["JOB9"] == "place 1 in the queue: JOB2 makes way for it"


def test_as_few_as_let_the_job_start_make_way() -> None:
    holding = [lesser(1, 1), lesser(2, 1), lesser(3, 4, 1)]
    assert ids(decide([job(9, 4, priority=5)], holding, cluster(0, 6)).stop) == ["JOB3"]
    both = decide([job(9, 2, priority=5)], holding, cluster(0, 6))
    assert ids(both.stop) == ["JOB2", "JOB1"]


def test_nobody_makes_way_unasked_for_an_equal_or_in_vain() -> None:
    urgent = job(9, 4, priority=5)
    for holding in (
        [job(1, 4)],  # its spec doesn't allow it
        [lesser(1, 4, priority=5)],
        [lesser(1, 4, priority=6)],
        [lesser(1, 2), job(2, 2)],  # half of what is needed helps nobody
    ):
        decision = decide([urgent], holding, cluster(0, 4))
        assert decision.stop == ()


def test_nobody_else_is_asked_while_one_is_leaving() -> None:
    holding = [lesser(1, 4), lesser(2, 4)]
    queued = [job(9, 4, priority=5)]
    assert ids(decide(queued, holding, cluster(0, 8)).stop) == ["JOB2"]
    assert decide(queued, holding, cluster(0, 8), {"JOB2": ()}).stop == ()
    assert decide(queued, holding, cluster(0, 8), {"JOB1": ()}).stop == ()


def test_only_the_first_that_waits_has_others_make_way_for_it() -> None:
    queued = [job(8, 8, priority=9), job(9, 4, priority=5)]
    decision = decide(queued, [lesser(1, 4), job(2, 4)], cluster(0, 8))
    assert decision.stop == ()


def elastic(number: int, least: int, most: int, policy: str = "elastic", **more: Any) -> Job:
    """A job of one GPU and CPU a worker; its step has 8 micro-batches."""
    workers = {"min": least, "max": most, "policy": policy, "cooldown_s": 60}
    spec = {
        "resources": {"gpus_per_worker": 1, "cpus_per_worker": 1, "workers": workers},
        "batch": {"total_batch_size": 128 * more.pop("micro", 8)},
        "priority": more.pop("priority", 0),
        "preemptible": more.pop("preemptible", False),
    }
    return new_job(number, spec=spec, submission=number, **more)


def trains(job: Job, *placement: str, resized_at: float | None = None) -> Job:
    """The same, RUNNING on these nodes."""
    return replace(
        job,
        state=JobState.RUNNING,
        placement=placement,
        workers=len(placement),
        resized_at=resized_at,
    )


def numbers(moves: tuple[Move, ...]) -> dict[str, int]:
    """How many workers each gets."""
    return {move.job.id: len(move.job.placement) for move in moves}


FOUR = cluster(4, 16)
ON = ("node1",) * 4


@pytest.mark.parametrize(("free", "workers"), [(1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize("policy", ["fixed", "grow", "elastic"])
def test_a_job_starts_on_the_largest_number_that_is_free_and_divides_a_step(
    policy: str, free: int, workers: int
) -> None:
    (move,) = decide([elastic(1, 1, 6, policy)], [], cluster(free, 16)).start
    assert len(move.job.placement) == move.job.workers == workers
    said = "(3 have room, but a step divides only among 1, 2, 4)" in move.reason
    assert said == (free == 3)


def test_a_fixed_job_keeps_the_number_that_it_began_with() -> None:
    job = elastic(1, 1, 4, "fixed")
    assert numbers(decide([replace(job, workers=2)], [], FOUR).start) == {"JOB1": 2}
    assert decide([], [trains(job, *ON[:2])], FOUR).stop == ()
    waits = decide([replace(job, workers=2), elastic(2, 1, 1)], [], cluster(1, 4))
    assert numbers(waits.start) == {"JOB2": 1}, "it waits for its place out of others' way"
    lacks = "with 2 workers it needs 2 GPU, the cluster has 1"
    assert waits.waiting["JOB1"] == f"place 1 in the queue: {lacks}"


@pytest.mark.parametrize("policy", ["grow", "elastic"])
def test_a_running_job_takes_what_becomes_free_once_it_has_rested(policy: str) -> None:
    job = elastic(1, 1, 4, policy)
    grown = decide([], [trains(job, "node1")], FOUR).stop
    assert numbers(grown) == {"JOB1": 4}
    assert grown[0].reason == "there is room for more"
    assert decide([], [trains(job, "node1")], cluster(1, 4)).stop == ()
    assert decide([], [trains(job, "node1", resized_at=100)], FOUR, now=159.9).stop == ()
    assert decide([], [trains(job, "node1", resized_at=100)], FOUR, now=160.0).stop != ()
    starting = replace(trains(job, "node1"), state=JobState.STARTING)
    assert decide([], [starting], FOUR).stop == (), "it has nothing to checkpoint yet"


def test_a_job_that_is_about_to_grow_keeps_the_places_that_it_grows_into() -> None:
    holding = [trains(elastic(1, 1, 4, "grow"), "node1"), trains(elastic(2, 1, 2, "grow"), "node1")]
    leaving = {"JOB1": ON[:2]}
    assert numbers(decide([], holding, FOUR, leaving).stop) == {"JOB2": 2}
    assert decide([], holding, cluster(3, 16), leaving).stop == ()


def test_an_elastic_job_shrinks_as_little_as_lets_a_queued_one_start() -> None:
    running = trains(elastic(1, 1, 4), *ON)
    decision = decide([elastic(2, 1, 4)], [running], FOUR)
    assert numbers(decision.stop) == {"JOB1": 2}
    assert decision.stop[0].reason == "job JOB2 can start"
    assert decision.waiting == {"JOB2": "place 1 in the queue: JOB1 makes way for it"}
    assert numbers(decide([elastic(2, 3, 4)], [running], FOUR).stop) == {}, "4 need all"
    assert numbers(decide([elastic(2, 2, 2)], [running], FOUR).stop) == {"JOB1": 2}


@pytest.mark.parametrize(
    ("queued", "holding"),
    [
        (elastic(9, 1, 1), trains(elastic(1, 1, 4, priority=1), *ON)),  # of higher priority
        (elastic(9, 1, 1), trains(elastic(1, 1, 4, "grow"), *ON)),  # gives nothing back
        (elastic(9, 1, 1), trains(elastic(1, 4, 4), *ON)),  # has its least
        (elastic(9, 4, 4), trains(elastic(1, 1, 4), *ON)),  # it would not help
        (elastic(9, 1, 1), trains(elastic(1, 1, 4), *ON, resized_at=1)),  # a moment ago
    ],
)
def test_nobody_shrinks_in_vain(queued: Job, holding: Job) -> None:
    assert decide([queued], [holding], FOUR, now=2).stop == ()


def test_fewer_workers_come_before_none() -> None:
    first = trains(elastic(1, 1, 2, preemptible=True), "node1", "node1")
    other = trains(elastic(2, 2, 2, preemptible=True), "node1", "node1")
    urgent = elastic(9, 1, 1, priority=5)
    assert numbers(decide([urgent], [first, other], FOUR).stop) == {"JOB1": 1}
    urgent = elastic(9, 3, 3, "fixed", priority=5, micro=6)
    assert numbers(decide([urgent], [first, other], FOUR).stop) == {"JOB1": 1, "JOB2": 0}


def test_nothing_grows_into_what_a_job_before_it_waits_for_unless_it_gives_it_back() -> None:
    holding = [trains(elastic(1, 1, 1, "fixed"), "node1")]
    grows = trains(elastic(2, 1, 4, "grow"), "node1")
    gives = trains(elastic(3, 1, 4), "node1")
    waits = elastic(9, 4, 4, "fixed")
    assert decide([waits], [*holding, grows], FOUR).stop == ()
    assert numbers(decide([waits], [*holding, gives], FOUR).stop) == {"JOB3": 2}
    lower = elastic(9, 4, 4, "fixed", priority=-1)
    assert numbers(decide([lower], [*holding, grows], FOUR).stop) == {"JOB2": 2}


def test_what_others_make_free_for_a_job_nobody_else_grows_into() -> None:
    holding = [trains(elastic(1, 1, 1, "fixed", preemptible=True), "node1")]
    gives = trains(elastic(3, 1, 2, priority=5), "node1")
    urgent = elastic(9, 2, 2, "fixed", priority=5)
    decision = decide([urgent], [*holding, gives], cluster(3, 16))
    assert numbers(decision.stop) == {"JOB1": 0}


def test_what_a_higher_priority_grows_into_is_not_counted_on_by_a_lower_one() -> None:
    grows = trains(elastic(1, 1, 2, "grow", priority=5), "node1")
    lowest = trains(elastic(2, 1, 1, "fixed", priority=-1, preemptible=True), "node1")
    decision = decide([elastic(9, 2, 2, "fixed")], [grows, lowest], FOUR)
    assert numbers(decision.stop) == {"JOB1": 2, "JOB2": 0}


def test_queued_jobs_come_before_growth_of_their_priority_and_after_that_of_a_higher_one() -> None:
    running = trains(elastic(1, 1, 4), "node1")
    assert numbers(decide([elastic(9, 1, 1)], [running], FOUR).start) == {"JOB9": 1}
    lower = decide([elastic(9, 1, 1, priority=-1)], [running], FOUR)
    assert (numbers(lower.stop), lower.start) == ({"JOB1": 4}, ())
    both = decide([elastic(8, 1, 4), elastic(9, 1, 2)], [], FOUR)
    assert numbers(both.start) == {"JOB8": 2, "JOB9": 2}, "neither is to shrink at once"


def two_nodes(second: dict[str, bool]) -> list[Node]:
    return [machine(1, 2, 8), machine(2, 2, 8, **second)]


@pytest.mark.parametrize("second", [{"draining": True}, {"alive": False}])
def test_a_job_leaves_a_node_that_goes_with_as_many_workers_as_there_is_room_for(
    second: dict[str, bool],
) -> None:
    nodes = two_nodes(second)
    spread = trains(elastic(1, 1, 4, "grow"), "node1", "node1", "node2", "node2", resized_at=1)
    (move,) = decide([], [spread], nodes, now=2).stop
    assert move.job.placement == ("node1", "node1")
    assert move.reason == "2 of its workers lost, or must leave, their node"
    fixed = trains(elastic(1, 1, 4, "fixed"), "node1", "node2")
    assert decide([], [fixed], nodes).stop[0].job.placement == ("node1", "node1")
    other = trains(elastic(2, 1, 1, "fixed"), "node1")
    (move,) = decide([], [fixed, other], nodes).stop
    assert (move.job.placement, move.job.workers) == ((), 2), "it waits for two places"
    assert decide([], [spread], nodes, {"JOB1": ()}).stop == ()


def test_a_worker_must_fit_on_one_node() -> None:
    nodes = [machine(1, 1, 2), machine(2, 1, 2)]
    wide = job(1, cpus=4, gpus=1)
    assert shortfall(wide.spec.resources, 1, nodes) == {
        "cpus_per_worker": "a worker must fit on one node, the largest has 2 CPU"
    }
    decision = decide([wide, job(2, cpus=2, gpus=1)], [], nodes)
    assert ids(decision.start) == ["JOB2"]
    assert "must fit on one node" in decision.waiting["JOB1"]
    crossed = [machine(1, 0, 8), machine(2, 2, 1), machine(3, 1, 2)]
    assert shortfall(job(1, cpus=2, gpus=1).spec.resources, 2, crossed) == {
        "workers.min": (
            "2 workers of 1 GPU and 2 CPU, each on one node: the cluster has places for 1"
        )
    }
    assert set(shortfall(wide.spec.resources, 3, nodes)) == {"gpus_per_worker", "cpus_per_worker"}


def test_a_stopped_job_goes_on_where_it_was_told_or_in_the_next_best_place() -> None:
    nodes = two_nodes({})
    told = trains(elastic(1, 1, 4, "grow"), "node1", "node1", "node2", "node2")
    assert settle(told, [], nodes) == told
    other = trains(elastic(2, 1, 1), "node2")
    moved = settle(told, [other], nodes)
    assert moved is not None
    assert moved.placement == ("node1", "node1")
    assert moved.workers == 2
    fixed = replace(told, spec=elastic(1, 1, 4, "fixed").spec)
    assert settle(fixed, [other], nodes) is None
    assert settle(told, [trains(elastic(3, 2, 2), *ON)], nodes[:1]) is None


def test_a_job_of_an_older_service_takes_its_least_number_of_places_somewhere() -> None:
    old = replace(elastic(1, 2, 2, "fixed"), state=JobState.RUNNING, workers=2)
    decision: Decision = decide([elastic(2, 1, 4)], [old], FOUR)
    assert numbers(decision.start) == {"JOB2": 2}
