"""Ledgers on disk: in one transaction with what they account for, and what is shown of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from everstep.v1 import everstep_pb2 as pb
from service import convert, events
from service.jobs import Attempt, Job, JobView, Progress
from service.ledger import Ledger
from service.metrics import Metrics
from service.reports import _record
from service.store import RecordStore, Thinning
from service.store.schema import progress
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from trainer.contract.outcome import AttemptResult, Outcome
from trainer.contract.spec import JobSpec
from trainer.contract.states import JobState

SUBMITTED = 1_000_000.25
KINDS = ("queue", "start", "data", "productive", "recompute", "checkpoint", "evaluation", "wait")


def told(step: int, at: float, **fields: float) -> pb.ReportEntry:
    entry = pb.ReportEntry(point=pb.MetricPoint(step=step, step_s=1.0, **fields))
    entry.time.CopyFrom(convert.timestamp(SUBMITTED + at))
    return entry


async def report(
    records: RecordStore, attempt: int, *entries: pb.ReportEntry, first: int = 1
) -> None:
    numbered = [(n, _record(entry, attempt)) for n, entry in enumerate(entries, start=first)]
    await records.append_reported("JOB1", attempt, numbered)


async def begin(records: RecordStore, number: int, step: int, at: float) -> None:
    started = events.attempt_started(number, step, SUBMITTED + at)
    await records.begin_attempt(Attempt("JOB1", number, SUBMITTED + at, step), started)


async def move(plane: ControlPlane, to: JobState, at: float) -> Job:
    job = await plane.job("JOB1")
    moved = job.moved(to, "test", SUBMITTED + at)
    changed = await plane.jobs.change(job, moved, events.state_changed(moved, SUBMITTED + at))
    assert changed is not None
    return changed


async def end(plane: ControlPlane, number: int, outcome: Outcome, step: int, at: float) -> None:
    record = events.attempt_ended(number, outcome, "", step, SUBMITTED + at)
    await plane.jobs.end_attempt("JOB1", number, outcome, "", SUBMITTED + at, record)


async def spent(plane: ControlPlane) -> dict[str, float]:
    view = await plane.jobs.view("JOB1")
    assert view is not None
    goodput = convert.job_to_proto(view).goodput
    return {kind: getattr(goodput, f"{kind}_s") for kind in KINDS}


async def test_a_life_with_a_crash_a_pause_and_restarts_of_the_service_adds_up(
    tmp_path: Path,
) -> None:
    """Thinned in between, so that what is right at the end was summed when it came."""
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1, created_at=SUBMITTED))
        await move(plane, JobState.STARTING, 30)
        await begin(plane.records, 1, 0, 40)
        points = [told(step, 49 + step, data_wait_s=0.25) for step in range(1, 101)]
        await report(plane.records, 1, *points)
        await move(plane, JobState.RUNNING, 52)
        assert await Thinning(plane.database, recent=16, per_octave=4).thin("JOB1") > 50
    async with control_plane(tmp_path) as plane:
        await end(plane, 1, Outcome.WORKER_LOST, 0, 160)
        await move(plane, JobState.STARTING, 161)
        await begin(plane.records, 2, 60, 165)
        again = [told(step, 119 + step, checkpoint_s=0.125) for step in range(61, 111)]
        await report(plane.records, 2, *again)
        await end(plane, 2, Outcome.STOPPED, 110, 235)
        await move(plane, JobState.RUNNING, 235)
        await move(plane, JobState.PAUSED, 235)
    async with control_plane(tmp_path) as plane:
        assert (await spent(plane))["wait"] == pytest.approx(time.time() - SUBMITTED - 235, abs=5)
        await move(plane, JobState.QUEUED, 500)
        done = await move(plane, JobState.CANCELLED, 520)
        found = await spent(plane)
    assert found == {
        "queue": 30 + 20,
        "start": pytest.approx(19.75 + 31 - 0.125),
        "data": 100 * 0.25,
        "productive": pytest.approx(99 * 0.75 + 10 * 0.875),
        "recompute": pytest.approx(39 * 0.875),
        "checkpoint": pytest.approx(50 * 0.125 + 6),
        "evaluation": 0,
        "wait": 500 - 235,
    }
    assert done.ended_at is not None
    assert sum(found.values()) == pytest.approx(done.ended_at - done.created_at, abs=1e-6)


async def test_the_reconciler_ends_a_job_and_its_account_at_one_moment(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1))
        await plane.tick(2)
        job = await plane.job("JOB1")
        await begin(plane.records, 1, 0, time.time() - SUBMITTED)
        plane.cluster.ends(("JOB1", 1), AttemptResult(1, Outcome.COMPLETED, "done", 12))
        await plane.tick(2)
        job = await plane.job("JOB1")
        assert job.state is JobState.SUCCEEDED
        assert job.ended_at is not None
        total = sum((await spent(plane)).values())
        assert total == pytest.approx(job.ended_at - job.created_at, abs=1e-6)


async def test_what_is_sent_again_is_counted_once(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1, created_at=SUBMITTED))
        await move(plane, JobState.STARTING, 1)
        await begin(plane.records, 1, 0, 2)
        for _ in range(2):
            await report(plane.records, 1, told(1, 10), told(2, 11), told(3, 12))
        view = await plane.jobs.view("JOB1")
        assert view is not None
        assert view.progress.ledger is not None
        assert view.progress.ledger.steps == 3
        assert (await spent(plane))["productive"] == 2


async def test_a_trainer_whose_clock_is_ahead_moves_nothing_beyond_now(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1))
        now = time.time() - SUBMITTED
        await move(plane, JobState.STARTING, now)
        await begin(plane.records, 1, 0, now)
        await report(plane.records, 1, told(1, now + 3600))
        view = await plane.jobs.view("JOB1")
        assert view is not None
        assert view.progress.ledger is not None
        assert view.progress.ledger.until <= time.time()


async def test_a_job_of_before_ledgers_is_read_once_from_its_history(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1, created_at=SUBMITTED))
        await move(plane, JobState.STARTING, 10)
        await begin(plane.records, 1, 0, 12)
        await report(plane.records, 1, told(1, 20), told(2, 21))
        before = await spent(plane)
        async with plane.database.write() as connection:
            await connection.execute(sa.update(progress).values(ledger=None))
        view = await plane.jobs.view("JOB1")
        assert view is not None
        assert not convert.job_to_proto(view).HasField("goodput")
        await report(plane.records, 1, told(3, 22), first=3)
        assert await spent(plane) == {**before, "productive": 2.0}


def series(registry: CollectorRegistry) -> int:
    return sum(len(family.samples) for family in registry.collect())


async def test_counters_of_active_jobs_go_on_where_they_were_after_a_restart(
    tmp_path: Path,
) -> None:
    labels = {"job_id": "JOB1", "job_name": "tiny"}

    def figures(registry: CollectorRegistry) -> dict[str, float | None]:
        names = {
            "goodput_seconds_total": {"kind": "productive"},
            "goodput_ratio": {},
            "tokens_total": {},
            "data_wait_seconds_total": {},
            "checkpoint_stall_seconds_total": {},
            "checkpoint_postponed_seconds_total": {},
            "restarts_total": {"cause": "WORKER_LOST"},
            "gpu_energy_joules_total": {"gpu": "0"},
            "train_loss": {},
            "step": {},
        }
        return {
            name: registry.get_sample_value(f"everstep_{name}", {**labels, **more})
            for name, more in names.items()
        }

    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1, created_at=SUBMITTED))
        await move(plane, JobState.STARTING, 10)
        await begin(plane.records, 1, 0, 12)
        entries = [told(1, 20, loss=3.0), told(2, 25, data_wait_s=0.5, loss=2.5)]
        entries[1].point.devices.add(index=0, energy_joules=300.0)
        saved = pb.Event(
            kind=pb.EVENT_KIND_CHECKPOINT_COMMITTED,
            checkpoint=pb.CheckpointRef(job_id="JOB1", step=2, attempt=1),
            checkpoint_stall_s=0.5,
            checkpoint_postponed_s=1.5,
        )
        await report(plane.records, 1, *entries, pb.ReportEntry(event=saved))
        await end(plane, 1, Outcome.WORKER_LOST, 0, 30)
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        await show(plane, metrics)
        before = figures(registry)
    assert before == {
        "goodput_seconds_total": 4.5,
        "goodput_ratio": pytest.approx(4.5 / 15),
        "tokens_total": 2 * 256,
        "data_wait_seconds_total": 0.5,
        "checkpoint_stall_seconds_total": 0.5,
        "checkpoint_postponed_seconds_total": 1.5,
        "restarts_total": 1,
        "gpu_energy_joules_total": 300,
        "train_loss": 2.5,
        "step": 2,
    }
    async with control_plane(tmp_path) as plane:
        registry = CollectorRegistry()
        await show(plane, Metrics(registry))
        assert figures(registry) == before


async def show(plane: ControlPlane, metrics: Metrics) -> None:
    """What a service does at its start, and every few seconds."""
    for job in await plane.jobs.unfinished():
        view = await plane.jobs.view(job.id)
        assert view is not None
        metrics.restore(view)
    metrics.set_accounts(await plane.jobs.accounts(metrics.accounted))


async def test_a_thousand_jobs_leave_no_series_behind(tmp_path: Path) -> None:
    """Over the real registry and store, each with everything that a job can report."""
    jobs, at_once = 1000, 50
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    async with control_plane(tmp_path) as plane:
        empty = series(registry)
        most = 0
        for first in range(0, jobs, at_once):
            batch = [await plane.add(new_job(n)) for n in range(first, first + at_once)]
            point = pb.MetricPoint(step=1, loss=2.0, step_s=0.5, mfu_ratio=0.5)
            point.groups.add(group="wte", learning_rate=0.1)
            point.devices.add(
                index=0, utilization_ratio=1, power_watts=1, temperature_celsius=1,
                energy_joules=1, throttled=True,
            )  # fmt: skip
            for job in batch:
                now = time.time()
                started = events.attempt_started(1, 0, now)
                await plane.records.begin_attempt(Attempt(job.id, 1, now, 0), started)
                await plane.records.append(job.id, [events.point_record(point, now, 1)])
                metrics.observe_point(job, point)
                for kind in pb.EventKind.values():
                    metrics.observe_event(job, pb.Event(kind=kind), now)
                lost = events.attempt_ended(1, Outcome.WORKER_LOST, "", 1, now)
                await plane.jobs.end_attempt(job.id, 1, Outcome.WORKER_LOST, "", now, lost)
            await show(plane, metrics)
            most = max(most, series(registry))
            for job in batch:
                final = job.moved(JobState.CANCELLED, "test", time.time())
                stored = events.state_changed(final, time.time())
                assert await plane.jobs.change(await plane.job(job.id), final, stored)
            metrics.set_accounts(await plane.jobs.accounts(metrics.accounted))
            for job in batch:
                metrics.forget(job.id)
            metrics.set_accounts(await plane.jobs.accounts(metrics.accounted))
        assert series(registry) == empty
        assert most - empty < at_once * 60
        restarted = CollectorRegistry()
        await show(plane, Metrics(restarted))
        assert series(restarted) == empty


async def test_a_zombie_of_a_final_job_brings_no_series_back(tmp_path: Path) -> None:
    from tests.fakes.api import credential, hello, points, served

    async with served(tmp_path) as api:
        job_id = (await api.submit()).job.id
        await api.plane.tick(2)
        token = credential(job_id)
        await api.report(token, [hello(job_id), points(1)])
        assert job_id in str([*api.plane.metrics.step.collect()])
        job = await api.plane.job(job_id)
        final = job.moved(JobState.FAILED, "test", time.time())
        assert await api.plane.jobs.change(job, final, events.state_changed(final, time.time()))
        api.plane.metrics.forget(job_id)
        await api.report(token, [hello(job_id), points(2, 3)])
        assert job_id not in str([*api.plane.metrics.step.collect()])


async def test_a_counter_that_ran_ahead_of_a_wait_does_not_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape adds to a wait that has ended since the account was read."""
    async with control_plane(tmp_path) as plane:
        await plane.add(new_job(1, created_at=SUBMITTED))
        registry = CollectorRegistry()
        metrics = Metrics(registry)

        def queued() -> float | None:
            labels = {"job_id": "JOB1", "job_name": new_job(1).spec.name, "kind": "queue"}
            return registry.get_sample_value("everstep_goodput_seconds_total", labels)

        await move(plane, JobState.STARTING, 10.0)
        ended = await plane.jobs.accounts(metrics.accounted)
        monkeypatch.setattr("service.metrics.time.time", lambda: SUBMITTED + 12.0)
        metrics._accounts.told["JOB1"] = {"queue": 11.5}  # by the scrape before
        metrics.set_accounts(ended)
        assert queued() == 11.5
        metrics.forget("JOB1")
        assert queued() is None


def test_a_job_that_moved_leaves_no_gpu_behind() -> None:
    registry = CollectorRegistry()
    metrics, job = Metrics(registry), new_job(1)
    for indices in ((0, 1), (), (0,)):
        sampled = [pb.DeviceSample(index=each, temperature_celsius=88) for each in indices]
        metrics.observe_point(job, pb.MetricPoint(step=1, devices=sampled))
    (family,) = metrics.gpu_temperature.collect()
    assert [sample.labels["gpu"] for sample in family.samples] == ["0"]


@pytest.mark.parametrize(("evaluation_s", "left_s"), [(0.0, 400.0), (85.0, 740.0)])
def test_the_time_that_is_left_counts_what_validation_took_so_far(
    evaluation_s: float, left_s: float
) -> None:
    ledger = Ledger(until=SUBMITTED)
    ledger.seconds |= {"productive": 80.0, "recompute": 15.0, "data": 5.0, "queue": 1e6}
    ledger.seconds["evaluation"] = evaluation_s
    point = pb.MetricPoint(step=100, step_s=2.0).SerializeToString()
    spec = JobSpec.parse({"schedule": {"num_iterations": 300}})
    job = replace(new_job(1), state=JobState.RUNNING, spec=spec)
    view = JobView(job, Progress(step=100, latest_point=point, ledger=ledger))
    assert convert.job_to_proto(view).eta_s == pytest.approx(left_s)
    assert convert.job_to_proto(replace(view, progress=replace(view.progress, ledger=None))).eta_s
