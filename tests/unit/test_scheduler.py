"""Which queued job starts: strict order, and a reason for each that waits."""

from service.jobs import Job
from service.scheduler import Capacity, decide, needs
from tests.fakes.control_plane import new_job


def job(number: int, cpus: int, gpus: int = 0, workers: int = 1, priority: int = 0) -> Job:
    resources = {
        "cpus_per_worker": cpus,
        "gpus_per_worker": gpus,
        "workers": {"min": workers, "max": workers + 1},
    }
    spec = {"resources": resources, "priority": priority, "batch": {"total_batch_size": 1024}}
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
