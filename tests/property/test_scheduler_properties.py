"""For any queue and cluster: nothing is oversubscribed, order is strict, nobody starves.

And who makes way does so for a higher priority only, and only where that helps.
"""

from hypothesis import given
from hypothesis import strategies as st

from service.jobs import Job
from service.placement import Capacity
from service.scheduler import decide, needs
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
                "preemptible": draw(st.booleans()),
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


@given(jobs(1), jobs(100), capacities, st.sets(st.integers(100, 105)))
def test_preemption_only_helps(
    queued: list[Job], holding: list[Job], total: Capacity, numbers: set[int]
) -> None:
    leaving = {f"JOB{number}" for number in numbers}
    decision = decide(queued, holding, total, leaving)
    assert (decision.preempted_by is None) == (not decision.preempt)
    if decision.preempted_by is None:
        return
    first = decision.preempted_by
    assert first == next(
        job
        for job in in_order(queued)
        if job.id in decision.waiting and total.holds(needs(job.spec.resources))
    )
    for job in decision.preempt:
        assert job in holding
        assert job.spec.preemptible
        assert job.spec.priority < first.spec.priority
        assert job.id not in leaving
    gone = leaving | {job.id for job in decision.preempt}

    def fits_without(some: set[str]) -> bool:
        rest = [job for job in holding if job.id not in some]
        return total.holds(total_of([*rest, *decision.start, first]))

    assert fits_without(gone), "it can start once they are gone"
    for job in decision.preempt:
        assert not fits_without(gone - {job.id}), "nobody stops in vain"


@given(jobs(1), st.lists(st.integers(1, 6), min_size=6, max_size=6), capacities)
def test_jobs_that_come_run_and_make_way_all_end(
    coming: list[Job], lengths: list[int], total: Capacity
) -> None:
    """Rounds: one job comes, those asked to make way have done so, the running ones progress."""
    left = {job.id: lengths[job.submission - 1] for job in coming}
    coming = [job for job in coming if total.holds(needs(job.spec.resources))]
    queued: list[Job] = []
    holding: list[Job] = []
    leaving: set[str] = set()
    asked = 0
    for _ in range(200):
        if coming:
            queued.append(coming.pop())
        queued += [job for job in holding if job.id in leaving]
        holding = [job for job in holding if job.id not in leaving]
        decision = decide(queued, holding, total)
        leaving = {job.id for job in decision.preempt}
        asked += len(leaving)
        queued = [job for job in queued if job not in decision.start]
        holding += decision.start
        assert total.holds(total_of(holding))
        for job in holding:
            left[job.id] -= 1
        holding = [job for job in holding if left[job.id] > 0]
        leaving &= {job.id for job in holding}
        if not (coming or queued or holding):
            break
    assert [*coming, *queued, *holding] == [], "everybody ended"
    assert asked <= 6 * 6, "nobody takes turns"
