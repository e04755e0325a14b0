"""Which queued job starts: strict order, and a reason for each that waits."""

from service.jobs import Job
from service.placement import Capacity
from service.scheduler import decide, needs
from tests.fakes.control_plane import new_job


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
        "workers": {"min": workers, "max": workers + 1},
    }
    spec = {
        "resources": resources,
        "priority": priority,
        "preemptible": preemptible,
        "batch": {"total_batch_size": 1024},
    }
    return new_job(number, spec=spec, submission=number)


def ids(jobs: tuple[Job, ...]) -> list[str]:
    return [each.id for each in jobs]


def test_a_job_needs_its_smallest_number_of_workers() -> None:
    assert needs(job(1, cpus=3, gpus=1, workers=2).spec.resources) == Capacity(gpus=2, cpus=6)


def test_jobs_start_in_order_of_submission_while_they_fit() -> None:
    queued = [job(3, 1), job(1, 2), job(2, 2)]
    decision = decide(queued, [], Capacity(0, 4))
    assert ids(decision.start) == ["JOB1", "JOB2"]
    assert decision.waiting == {
        "JOB3": "place 3 in the queue: needs 0 GPU and 1 CPU, free are 0 and 0 of 0 and 4"
    }


def test_priority_comes_before_submission() -> None:
    decision = decide([job(1, 4), job(2, 4, priority=5)], [], Capacity(0, 4))
    assert ids(decision.start) == ["JOB2"]


def test_a_small_job_never_overtakes_a_large_one_that_waits() -> None:
    decision = decide([job(1, 4), job(2, 1)], [job(9, 1)], Capacity(0, 4))
    assert decision.start == ()
    assert decision.waiting["JOB2"] == "place 2 in the queue, behind job JOB1"


def test_gpus_and_cpus_both_count() -> None:
    assert decide([job(1, 1, gpus=1)], [], Capacity(gpus=0, cpus=9)).start == ()
    assert decide([job(1, 2, gpus=1)], [], Capacity(gpus=9, cpus=1)).start == ()
    assert ids(decide([job(1, 1, gpus=1)], [], Capacity(1, 1)).start) == ["JOB1"]


def test_nothing_starts_where_more_is_held_than_there_is() -> None:
    decision = decide([job(1, 1)], [job(8, 4), job(9, 4)], Capacity(0, 4))
    assert decision.start == ()
    assert "free are 0 and 0 of 0 and 4" in decision.waiting["JOB1"]


def lesser(number: int, cpus: int, priority: int = 0) -> Job:
    """A running job that makes way."""
    return job(number, cpus, priority=priority, preemptible=True)


def test_the_lowest_priority_and_then_the_youngest_makes_way_and_the_job_says_so() -> None:
    urgent = job(9, 2, priority=5)
    decision = decide([urgent], [lesser(1, 2), lesser(2, 2), lesser(3, 2, 1)], Capacity(0, 6))
    assert ids(decision.preempt) == ["JOB2"]
    assert decision.preempted_by == urgent
    assert decision.start == ()
    assert decision.waiting["JOB9"] == "place 1 in the queue: JOB2 makes way for it"


def test_as_few_as_let_the_job_start_make_way() -> None:
    holding = [lesser(1, 1), lesser(2, 1), lesser(3, 4, 1)]
    assert ids(decide([job(9, 4, priority=5)], holding, Capacity(0, 6)).preempt) == ["JOB3"]
    both = decide([job(9, 2, priority=5)], holding, Capacity(0, 6))
    assert ids(both.preempt) == ["JOB2", "JOB1"]


def test_nobody_makes_way_unasked_for_an_equal_or_in_vain() -> None:
    urgent = job(9, 4, priority=5)
    for holding in (
        [job(1, 4)],  # its spec doesn't allow it
        [lesser(1, 4, priority=5)],
        [lesser(1, 4, priority=6)],
        [lesser(1, 2), job(2, 2)],  # half of what is needed helps nobody
    ):
        decision = decide([urgent], holding, Capacity(0, 4))
        assert (decision.preempt, decision.preempted_by) == ((), None)


def test_nobody_else_is_asked_while_one_is_leaving() -> None:
    holding = [lesser(1, 4), lesser(2, 4)]
    queued = [job(9, 4, priority=5)]
    assert ids(decide(queued, holding, Capacity(0, 8)).preempt) == ["JOB2"]
    assert decide(queued, holding, Capacity(0, 8), {"JOB2"}).preempt == ()
    assert decide(queued, holding, Capacity(0, 8), {"JOB1"}).preempt == ()


def test_only_the_first_that_waits_has_others_make_way_for_it() -> None:
    queued = [job(8, 8, priority=9), job(9, 4, priority=5)]
    decision = decide(queued, [lesser(1, 4), job(2, 4)], Capacity(0, 8))
    assert decision.preempt == ()
