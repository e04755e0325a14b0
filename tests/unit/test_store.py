"""The database: what it returned from is durable, and one of two writers loses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.errors import StaleAttemptError
from service.jobs import Attempt, Desired, Record
from service.store import Database, JobStore, NewRecord, RecordStore
from service.store.deletion_store import DeletionStore
from service.store.record_store import append_records
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from trainer.contract.states import JobState
from trainer.storage.manifest import CheckpointRef


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


def warned(text: str, step: int = 0) -> NewRecord:
    event = pb.Event(kind=pb.EVENT_KIND_WARNING, message=text, step=step)
    return events.event_record(event, 1.5, 1)


def point(step: int) -> NewRecord:
    return events.point_record(pb.MetricPoint(step=step, loss=1.25), 2.0, 1)


def texts(records: list[Record]) -> list[str]:
    return [pb.WatchJobResponse.FromString(record.body).event.message for record in records]


async def test_inserting_one_request_twice_makes_one_job(plane: ControlPlane) -> None:
    first = await plane.add(new_job(1))
    assert await plane.jobs.insert(new_job(2, request_id="request-1"), warned("lost")) is None
    assert await plane.jobs.get("JOB2") is None
    assert await plane.jobs.by_request("request-1") == first
    assert len(await plane.records.read("JOB1", 0, 10)) == 1


async def test_submissions_are_numbered_in_order(plane: ControlPlane) -> None:
    made = [await plane.add(new_job(number)) for number in (3, 1, 2)]
    assert [job.submission for job in made] == [1, 2, 3]
    assert [job.id for job in await plane.jobs.unfinished()] == ["JOB3", "JOB1", "JOB2"]
    newest_first = await plane.jobs.page([], None, 2)
    assert [view.job.id for view in newest_first] == ["JOB2", "JOB1"]
    rest = await plane.jobs.page([], newest_first[-1].job.submission, 2)
    assert [view.job.id for view in rest] == ["JOB3"]


async def test_unfinished_jobs_are_read_again_only_after_one_changed(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = plane.jobs._read_unfinished
    monkeypatch.setattr(plane.jobs, "_read_unfinished", lambda: reads.append(1) or read())
    elsewhere, deletions = JobStore(plane.database), DeletionStore(plane.database)

    async def found() -> tuple[list[tuple[str, JobState]], int]:
        listed = [(job.id, job.state) for job in await plane.jobs.unfinished()]
        return listed, len(reads)

    assert await found() == ([], 1)
    job = await plane.add(new_job(1))
    assert await found() == ([("JOB1", JobState.QUEUED)], 2)
    await plane.records.append("JOB1", [warned("a word changes no job")])
    assert await found() == ([("JOB1", JobState.QUEUED)], 2)
    paused = await elsewhere.change(job, job.moved(JobState.PAUSED, "by another", 1.0))
    assert paused is not None
    assert await found() == ([("JOB1", JobState.PAUSED)], 3)
    assert await elsewhere.change(job, paused) is None, "an old version changes nothing"
    assert (await found())[0] == [("JOB1", JobState.PAUSED)]
    ended = await elsewhere.change(paused, paused.moved(JobState.CANCELLED, "done with", 2.0))
    assert ended is not None
    assert (await found())[0] == []
    count = len(reads)
    await deletions.begin(ended, "tester", 3.0)
    await deletions.erase("JOB1", 4.0)
    assert await found() == ([], count + 1)


async def test_a_change_loses_to_a_newer_version_and_leaves_no_record(plane: ControlPlane) -> None:
    job = await plane.add(new_job(1))
    won = await plane.jobs.change(job, replace(job, desired=Desired.PAUSED), warned("won"))
    lost = await plane.jobs.change(job, replace(job, desired=Desired.CANCELLED), warned("lost"))
    assert won is not None
    assert lost is None
    assert await plane.job("JOB1") == won
    assert texts(await plane.records.read("JOB1", 1, 10)) == ["won"]


async def test_of_many_changes_at_once_one_wins(plane: ControlPlane) -> None:
    job = await plane.add(new_job(1))
    tries = [plane.jobs.change(job, replace(job, reason=str(n))) for n in range(20)]
    results = await asyncio.gather(*tries)
    assert sum(result is not None for result in results) == 1


async def test_records_get_consecutive_cursors_however_they_come(plane: ControlPlane) -> None:
    await plane.add(new_job(1))
    await plane.add(new_job(2))
    await asyncio.gather(
        *(plane.records.append("JOB1", [warned(f"{n}a"), warned(f"{n}b")]) for n in range(10)),
        plane.records.append("JOB2", [warned("other")]),
    )
    records = await plane.records.read("JOB1", 0, 100)
    assert [record.cursor for record in records] == list(range(1, 22))
    assert [r.cursor for r in await plane.records.read("JOB1", 5, 3)] == [6, 7, 8]
    assert len(await plane.records.read("JOB2", 0, 100)) == 2


async def test_reported_entries_are_recorded_once_whatever_was_dropped_between(
    plane: ControlPlane,
) -> None:
    await plane.add(new_job(1))
    await plane.records.begin_attempt(Attempt("JOB1", 1, 1.0, 0), warned("begins"))
    entries = [(number, point(number)) for number in range(1, 7)]
    report = plane.records.append_reported
    assert await report("JOB1", 1, entries[:3]) == (0, 3)
    assert await report("JOB1", 1, entries[1:4]) == (3, 4)  # two of them again
    assert await report("JOB1", 1, entries[5:]) == (4, 6)  # 5 was dropped
    assert await report("JOB1", 1, entries[3:]) == (6, 6)
    assert await report("JOB1", 1, []) == (6, 6)
    view = await plane.jobs.view("JOB1")
    assert view is not None
    assert view.progress.step == 6
    assert len(await plane.records.read("JOB1", 2, 100)) == 5
    again = await plane.records.begin_attempt(Attempt("JOB1", 1, 9.0, 0), warned("again"))
    assert again == 6  # goes on after a broken connection, and begins no second time
    assert (await plane.jobs.view("JOB1")) == view


async def test_an_older_attempt_is_refused_once_a_newer_one_reports(plane: ControlPlane) -> None:
    await plane.add(new_job(1))
    await plane.records.begin_attempt(Attempt("JOB1", 1, 1.0, 0), warned("one"))
    await plane.records.begin_attempt(Attempt("JOB1", 2, 2.0, 5), warned("two"))
    with pytest.raises(StaleAttemptError, match="attempt 2 of job JOB1"):
        await plane.records.begin_attempt(Attempt("JOB1", 1, 1.0, 0), warned("one"))
    # One that has its stream open still is refused as well: its points would mix with the others.
    with pytest.raises(StaleAttemptError):
        await plane.records.append_reported("JOB1", 1, [(1, point(1))])
    view = await plane.jobs.view("JOB1")
    assert view is not None
    assert [attempt.number for attempt in view.attempts] == [2, 1]


async def test_an_attempt_ends_once(plane: ControlPlane) -> None:
    await plane.add(new_job(1))
    end = plane.jobs.end_attempt
    assert not await end("JOB1", 0, "START_TIMEOUT", "claimed nothing", 5.0, warned("end"))
    await plane.records.begin_attempt(Attempt("JOB1", 1, 1.0, 0), warned("begins"))
    assert await end("JOB1", 1, "WORKER_LOST", "gone", 5.0, warned("end"))
    assert not await end("JOB1", 1, "COMPLETED", "again", 6.0, warned("end"))
    view = await plane.jobs.view("JOB1")
    assert view is not None
    (attempt,) = view.attempts
    assert (attempt.outcome, attempt.ended_at) == ("WORKER_LOST", 5.0)


async def test_growth_wakes_those_who_wait_for_this_job_only(plane: ControlPlane) -> None:
    await plane.add(new_job(1))
    await plane.add(new_job(2))
    mine, other = plane.database.growth("JOB1"), plane.database.growth("JOB2")
    await plane.records.append("JOB1", [warned("x")])
    await asyncio.wait_for(mine.wait(), 5)
    assert not other.is_set()
    assert not plane.database.growth("JOB1").is_set()


async def test_a_transaction_that_fails_writes_nothing_and_wakes_nobody(
    plane: ControlPlane,
) -> None:
    job = await plane.add(new_job(1))
    waited = plane.database.growth("JOB1")
    broken = replace(warned("x"), changes={"no_such_column": 1})
    with pytest.raises(Exception, match="no_such_column"):
        await plane.jobs.change(job, replace(job, reason="new"), broken)
    assert await plane.job("JOB1") == job
    assert not waited.is_set()


async def test_a_transaction_that_is_cancelled_writes_nothing_and_blocks_nobody(
    plane: ControlPlane,
) -> None:
    job = await plane.add(new_job(1))
    written = asyncio.Event()

    async def half() -> None:
        async with plane.database.write() as connection:
            await append_records(connection, job.id, [warned("half")])
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(half())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await plane.records.append(job.id, [warned("whole")])
    assert texts(await plane.records.read(job.id, 1, 10)) == ["whole"]


async def test_a_caller_who_leaves_while_its_records_are_committed_wakes_those_who_wait(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await plane.add(new_job(1))
    waited = plane.database.growth(job.id)
    through, left = aiosqlite.Connection.commit, []

    async def leaves(self: aiosqlite.Connection) -> None:
        committing = asyncio.ensure_future(through(self))
        await asyncio.sleep(0)  # the thread has been asked
        if not left:
            left.append(task.cancel())
        await committing

    monkeypatch.setattr(aiosqlite.Connection, "commit", leaves)
    task = asyncio.create_task(plane.records.append(job.id, [warned("kept")]))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left == [True]
    assert texts(await plane.records.read(job.id, 1, 10)) == ["kept"]
    assert waited.is_set()


async def test_a_query_takes_one_turn_of_its_connections_thread(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await plane.add(new_job(1))
    turns = []
    through = aiosqlite.Connection._execute

    async def counted(self: aiosqlite.Connection, *call: Any) -> Any:
        turns.append(call)
        return await through(self, *call)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)
    assert await plane.jobs.get(job.id) == job
    assert len(turns) == 1


async def test_everything_survives_close_and_reopen(tmp_path: Path) -> None:
    ref = CheckpointRef(job_id="JOB0", step=7, attempt=2)
    committed = pb.Event(
        kind=pb.EVENT_KIND_CHECKPOINT_COMMITTED,
        checkpoint=pb.CheckpointRef(job_id="JOB1", step=8, attempt=1),
    )
    async with control_plane(tmp_path) as plane:
        job = await plane.add(new_job(1, start=ref))
        moved = job.moved(JobState.STARTING, "why", 9.25)
        stored = await plane.jobs.change(job, replace(moved, host_number=3), warned("x"))
        await plane.records.begin_attempt(Attempt("JOB1", 1, 1.0, 7), warned("begins"))
        await plane.records.append("JOB1", [events.event_record(committed, 5.5), point(8)])
        view = await plane.jobs.view("JOB1")
        records = await plane.records.read("JOB1", 0, 100)
    async with control_plane(tmp_path) as plane:
        assert await plane.job("JOB1") == stored
        found = await plane.jobs.view("JOB1")
        assert found == view
        assert found is not None
        assert found.progress.checkpoint == CheckpointRef(job_id="JOB1", step=8, attempt=1)
        assert found.progress.checkpoint_at == 5.5
        assert found.job.start == ref
        assert await plane.records.read("JOB1", 0, 100) == records
        assert await plane.jobs.counts() == {JobState.STARTING: 1}


async def writes_until_killed(path: Path) -> None:
    """A service that says what is durable, one number a line."""
    database = await Database.open(path)
    jobs, records = JobStore(database), RecordStore(database)
    job = new_job(1)
    await jobs.insert(job, events.state_changed(job, time.time()))
    number = 0
    while True:
        number += 1
        await records.append("JOB1", [warned(str(number))])
        print(number, flush=True)


async def test_what_was_said_to_be_durable_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "everstep.db"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.test_store", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    with child.stdout:
        while child.stdout.readline().strip() != "20":
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        said = 20 + len([line for line in child.stdout if line.strip()])
    assert child.wait() == -signal.SIGKILL
    async with control_plane(tmp_path) as plane:
        found = texts(await plane.records.read("JOB1", 1, 100_000))
    assert found[:said] == [str(number) for number in range(1, said + 1)]
    assert len(found) - said in (0, 1)  # one may be durable and not yet said


HELD = """
import asyncio, pathlib, sys
from service.store import Database

async def main():
    global held
    database = await Database.open(pathlib.Path(sys.argv[1]))
    held = await database._engine.connect()

asyncio.run(main())
"""


def test_a_connection_that_was_never_given_back_does_not_hold_up_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELD, str(tmp_path / "everstep.db")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert done.returncode == 0


if __name__ == "__main__":
    asyncio.run(writes_until_killed(Path(sys.argv[1])))


async def test_closing_waits_for_a_connection_that_a_cancelled_read_gives_back(
    tmp_path: Path,
) -> None:
    database = await Database.open(tmp_path / "everstep.db")

    async def hold() -> None:
        async with database.read() as connection:
            await connection.exec_driver_sql("SELECT 1")
            entered.set()
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.05)

    entered = asyncio.Event()
    reading = asyncio.create_task(hold())
    await entered.wait()
    reading.cancel()
    await database.close()
    await asyncio.gather(reading, return_exceptions=True)
    assert database._engine.pool.checkedout() == 0  # type: ignore[attr-defined]
