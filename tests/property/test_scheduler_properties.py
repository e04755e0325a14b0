"""For any queue and cluster: nothing is oversubscribed, order is strict, nobody starves."""

from hypothesis import given
from hypothesis import strategies as st

from service.jobs import Job
from service.scheduler import Capacity, decide, needs
from tests.fakes.control_plane import new_job

resources = st.builds(
    lambda cpus, gpus, workers: {
        "cpus_per_worker": cpus,
        "gpus_per_worker": gpus,
        "workers": {"min": workers, "max": workers},
    },
    st.integers(1, 5),
    st.integers(0, 1),
    st.integers(1, 3),
)
capacities = st.builds(Capacity, st.integers(0, 6), st.integers(0, 16))


@st.composite
def jobs(draw: st.DrawFn, first: int) -> list[Job]:
    shuffled = draw(st.permutations(range(first, first + draw(st.integers(0, 6)))))
    return [
        new_job(
            number,
            submission=number,
            spec={
                "priority": draw(st.integers(-2, 2)),
                "resources": draw(resources),
                "batch": {"total_batch_size": 3072},
            },
        )
        for number in shuffled
    ]


def total_of(some: list[Job]) -> Capacity:
    each = [needs(job.spec.resources) for job in some]
    return Capacity(sum(n.gpus for n in each), sum(n.cpus for n in each))


def in_order(some: list[Job]) -> list[Job]:
    return sorted(some, key=lambda job: (-job.spec.priority, job.submission))


@given(jobs(1), jobs(100), capacities)
def test_order_is_strict_and_nothing_is_oversubscribed(
    queued: list[Job], holding: list[Job], total: Capacity
) -> None:
    decision = decide(queued, holding, total)
    hopeless = [job for job in queued if not total.holds(needs(job.spec.resources))]
    assert all("the cluster now has only" in decision.waiting[job.id] for job in hopeless)
    order = in_order([job for job in queued if job not in hopeless])
    started = list(decision.start)
    assert started == order[: len(started)]
    waiting = order[len(started) :]
    assert set(decision.waiting) == {job.id for job in [*waiting, *hopeless]}
    if started:
        assert total.holds(total_of(holding + started))
    if waiting:  # the next in order did not fit, or it would have started
        assert not total.holds(total_of([*holding, *order[: len(started) + 1]]))


@given(jobs(1), capacities)
def test_every_job_that_can_run_gets_its_turn_as_others_end(
    queued: list[Job], total: Capacity
) -> None:
    waiting = [job for job in queued if total.holds(needs(job.spec.resources))]
    expected, ran = in_order(waiting), []
    while waiting:
        decision = decide(waiting, [], total)
        assert decision.start, "somebody always starts on an empty cluster"
        ran += decision.start
        waiting = [job for job in waiting if job not in decision.start]
    assert ran == expected
