"""Jobs in the database: inserted once, changed by compare-and-set only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.jobs import Attempt, Desired, Job, JobView, Progress
from service.ledger import Ledger
from service.store.database import Database
from service.store.record_store import NewRecord, append_records, begin_stream
from service.store.schema import attempts, jobs, progress
from trainer.contract.states import FINAL, JobState
from trainer.storage.manifest import CheckpointRef

AT_ONCE = 1000  # ids in one query; SQLite takes 32,766
_VIEWS = sa.select(jobs, progress).join(progress, progress.c.job_id == jobs.c.id)


class JobStore:
    """All that is known of jobs, attempts and progress."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._unfinished: dict[str, Job] = {}  # as last read: each change has another version
        self._read_at: int | None = None  # so many commits of jobs were made when they were read

    async def insert(self, job: Job, *new: NewRecord) -> JobView | None:
        """Store a new job with its first records; None where its request_id made one before."""
        async with self._database.write() as connection:
            result = await connection.execute(
                insert(jobs)
                .values(**_job_columns(job), version=0)
                .on_conflict_do_nothing([jobs.c.request_id])
                .returning(jobs.c.submission)
            )
            submission = result.scalar()
            if submission is None:
                return None
            step = job.start.step if job.start else job.spec.start.step or 0
            ledger = await begin_stream(connection, job.id, step, job.created_at, new)
            stored = replace(job, submission=submission, version=0)
            return JobView(stored, Progress(step, ledger=ledger))

    async def get(self, job_id: str) -> Job | None:
        """One job."""
        async with self._database.read() as connection:
            return await _first(connection, jobs.c.id == job_id)

    async def by_request(self, request_id: str) -> Job | None:
        """The job that a request_id made."""
        async with self._database.read() as connection:
            return await _first(connection, jobs.c.request_id == request_id)

    async def unfinished(self) -> list[Job]:
        """Every job that is not final, in order of submission."""
        commits = self._database.commits(jobs.name)
        if commits != self._read_at:
            self._unfinished = await self._read_unfinished()
            self._read_at = commits
        return list(self._unfinished.values())

    async def _read_unfinished(self) -> dict[str, Job]:
        # By the states that count, not by those that don't: only so the index serves.
        states = [state.value for state in JobState if state not in FINAL]
        listed = sa.select(jobs.c.id, jobs.c.version).where(jobs.c.state.in_(states))
        async with self._database.read() as connection:
            rows = await connection.execute(listed.order_by(jobs.c.submission))
            versions = {row.id: row.version for row in rows}
            known = {
                k: job for k, job in self._unfinished.items() if job.version == versions.get(k)
            }
            news = [key for key in versions if key not in known]
            for first in range(0, len(news), AT_ONCE):
                some = news[first : first + AT_ONCE]
                found = await connection.execute(sa.select(jobs).where(jobs.c.id.in_(some)))
                known |= {row.id: _job(row) for row in found}
        return {k: known[k] for k in versions if k in known and not known[k].is_final}

    async def page(
        self, states: Collection[JobState], before: int | None, limit: int
    ) -> list[JobView]:
        """Jobs with their progress, newest first, those submitted before a submission number."""
        query = _VIEWS
        if states:
            query = query.where(jobs.c.state.in_([state.value for state in states]))
        if before is not None:
            query = query.where(jobs.c.submission < before)
        return await self._views(query.order_by(jobs.c.submission.desc()).limit(limit))

    async def trained(self, among: int) -> list[JobView]:
        """Of so many jobs, the newest, those that made a step; newest first."""
        newest = sa.select(jobs.c.submission).order_by(jobs.c.submission.desc()).limit(among)
        query = _VIEWS.where(jobs.c.submission.in_(newest), progress.c.latest_point.is_not(None))
        return await self._views(query.order_by(jobs.c.submission.desc()))

    async def children(self, job_ids: Collection[str], limit: int) -> list[JobView]:
        """Jobs that continue from a checkpoint of one of these, in order of submission."""
        query = _VIEWS.where(jobs.c.start["job_id"].as_string().in_(job_ids))
        return await self._views(query.order_by(jobs.c.submission).limit(limit))

    async def unfinished_children(self, job_id: str) -> list[str]:
        """Ids of jobs that are not final and started from a checkpoint of this one."""
        query = sa.select(jobs.c.id).where(
            jobs.c.start["job_id"].as_string() == job_id,
            jobs.c.state.not_in([state.value for state in FINAL]),
        )
        async with self._database.read() as connection:
            return list(await connection.scalars(query.order_by(jobs.c.submission)))

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state that any is in."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        async with self._database.read() as connection:
            return {JobState(state): count for state, count in await connection.execute(query)}

    async def accounts(self, job_ids: Collection[str]) -> list[JobView]:
        """Of jobs that are not final, and of these: those with a ledger."""
        unfinished = [state.value for state in JobState if state not in FINAL]
        wanted = sa.or_(jobs.c.state.in_(unfinished), jobs.c.id.in_(job_ids))
        return await self._views(_VIEWS.where(wanted, progress.c.ledger.is_not(None)))

    async def _views(self, query: sa.Select[Any]) -> list[JobView]:
        async with self._database.read() as connection:
            rows = await connection.execute(query)
            return [JobView(_job(row), _progress(row)) for row in rows]

    async def view(self, job_id: str) -> JobView | None:
        """One job with its progress and attempts, newest attempt first."""
        async with self._database.read() as connection:
            row = (await connection.execute(_VIEWS.where(jobs.c.id == job_id))).first()
            if row is None:
                return None
            tries = await connection.execute(
                sa.select(attempts)
                .where(attempts.c.job_id == job_id)
                .order_by(attempts.c.number.desc())
            )
            found = tuple(Attempt(**attempt._mapping) for attempt in tries)
            return JobView(_job(row), _progress(row), found)

    async def change(self, old: Job, new: Job, record: NewRecord | None = None) -> Job | None:
        """Replace old by new, with the record that says why, if nobody changed it meanwhile.

        Returns the job as stored, or None where somebody else was first: read again and decide.
        """
        async with self._database.write() as connection:
            values = {**_job_columns(new), "version": old.version + 1}
            result = await connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == old.id, jobs.c.version == old.version)
                .values(**values)
            )
            if result.rowcount != 1:
                return None
            if record is not None:
                await append_records(connection, old.id, [record])
            return replace(new, version=old.version + 1, submission=old.submission)

    async def end_attempt(
        self, job_id: str, number: int, outcome: str, message: str, now: float, record: NewRecord
    ) -> bool:
        """Note how an attempt ended, once; False where it claimed no number or was noted before.

        One that lived and died while the service was away is made known by it.
        """
        unheard = Attempt(job_id, number, now, record.step)
        async with self._database.write() as connection:
            if number:
                row = insert(attempts).values(**asdict(unheard))
                await connection.execute(row.on_conflict_do_nothing())
            result = await connection.execute(
                sa.update(attempts)
                .where(
                    attempts.c.job_id == job_id,
                    attempts.c.number == number,
                    attempts.c.ended_at.is_(None),
                )
                .values(ended_at=now, outcome=outcome, message=message)
            )
            if result.rowcount != 1:
                return False
            await append_records(connection, job_id, [record])
            return True


async def _first(connection: AsyncConnection, where: sa.ColumnElement[bool]) -> Job | None:
    row = (await connection.execute(sa.select(jobs).where(where))).first()
    return _job(row) if row is not None else None


def _job_columns(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "request_id": job.request_id,
        "request_sha256": job.request_sha256,
        "spec": job.spec,
        "start": _ref_columns(job.start),
        "state": job.state.value,
        "desired": job.desired.value,
        "reason": job.reason,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "host_number": job.host_number,
        "workers": job.workers,
        "placement": job.placement,
        "resized_at": job.resized_at,
        "stop_asked_at": job.stop_asked_at,
    }


def _job(row: sa.Row[Any]) -> Job:
    columns = row._mapping
    return Job(
        id=columns[jobs.c.id],
        spec=columns[jobs.c.spec],
        start=_ref(columns[jobs.c.start]),
        request_id=columns[jobs.c.request_id],
        request_sha256=columns[jobs.c.request_sha256],
        created_at=columns[jobs.c.created_at],
        state=JobState(columns[jobs.c.state]),
        desired=Desired(columns[jobs.c.desired]),
        reason=columns[jobs.c.reason],
        started_at=columns[jobs.c.started_at],
        ended_at=columns[jobs.c.ended_at],
        host_number=columns[jobs.c.host_number],
        workers=columns[jobs.c.workers],
        placement=tuple(columns[jobs.c.placement]),
        resized_at=columns[jobs.c.resized_at],
        stop_asked_at=columns[jobs.c.stop_asked_at],
        submission=columns[jobs.c.submission],
        version=columns[jobs.c.version],
    )


def _progress(row: sa.Row[Any]) -> Progress:
    columns = row._mapping
    return Progress(
        step=columns[progress.c.step],
        latest_point=columns[progress.c.latest_point],
        in_force=columns[progress.c.in_force],
        checkpoint=_ref(columns[progress.c.checkpoint]),
        checkpoint_at=columns[progress.c.checkpoint_at],
        validation_bpb=columns[progress.c.validation_bpb],
        ledger=Ledger.from_dict(kept) if (kept := columns[progress.c.ledger]) else None,
    )


def _ref(value: dict[str, Any] | None) -> CheckpointRef | None:
    return CheckpointRef(**value) if value is not None else None


def _ref_columns(ref: CheckpointRef | None) -> dict[str, Any] | None:
    return ref.model_dump() if ref is not None else None
