"""Records: each job's one ordered stream, appended in a transaction, read by cursor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from everstep.v1 import everstep_pb2 as pb
from service.errors import StaleAttemptError
from service.jobs import Attempt, Record
from service.ledger import Ledger
from service.store.database import TOUCHED, Database
from service.store.schema import attempts, jobs, progress, records
from trainer.storage.manifest import CheckpointRef


@dataclass(frozen=True)
class NewRecord:
    """A record to append. body: an everstep.v1.WatchJobResponse without its cursor."""

    time: float
    attempt: int
    step: int
    kind: str  # "event" or "point"
    body: bytes
    # What the record changes of the job's progress: columns of the table.
    changes: dict[str, Any] = field(default_factory=dict)
    message: pb.WatchJobResponse | None = None  # the body, for the job's ledger

    @staticmethod
    def checkpoint_change(ref: CheckpointRef, time: float) -> dict[str, Any]:
        """The change of progress that a committed checkpoint makes."""
        return {"checkpoint": ref.model_dump(), "checkpoint_at": time}


class RecordStore:
    """Reads and writes streams of records, and what attempts report into them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, job_id: str, new: Sequence[NewRecord]) -> None:
        """Append records of the service's own."""
        async with self._database.write() as connection:
            await append_records(connection, job_id, new)

    async def read(self, job_id: str, after: int, limit: int) -> list[Record]:
        """Up to limit records with a cursor above after, in order."""
        query = (
            sa.select(records.c.cursor, records.c.time, records.c.attempt, records.c.body)
            .where(records.c.job_id == job_id, records.c.cursor > after)
            .order_by(records.c.cursor)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [Record(*row) for row in await connection.execute(query)]

    async def events(self, job_id: str) -> list[Record]:
        """All events of a job, in order."""
        query = (
            sa.select(records.c.cursor, records.c.time, records.c.attempt, records.c.body)
            .where(records.c.job_id == job_id, records.c.kind == "event")
            .order_by(records.c.cursor)
        )
        async with self._database.read() as connection:
            return [Record(*row) for row in await connection.execute(query)]

    async def points(
        self,
        job_id: str,
        start_step: int,
        end_step: int | None,
        max_points: int | None,
        limit: int,
        stride: int = 1,
    ) -> list[Record]:
        """Metric points of a range of steps, both ends included, in order: one a step.

        Where steps were trained twice the newest attempt's counts. max_points: at most so many,
        evenly spaced, the first and the last among them (1: the last). Never more than limit.
        stride: only of steps that are multiples of it; of a power of two all jobs keep the same.
        """
        wanted = [
            records.c.job_id == job_id,
            records.c.kind == "point",
            records.c.step >= start_step,
            records.c.step % stride == 0,
        ]
        if end_step is not None:
            wanted.append(records.c.step <= end_step)
        newest_first = (records.c.attempt.desc(), records.c.cursor.desc())
        turn = sa.func.row_number().over(partition_by=records.c.step, order_by=newest_first)
        trained = sa.select(records.c.cursor, records.c.step, turn.label("turn")).where(*wanted)
        each = trained.subquery()
        once: sa.Select[Any] = sa.select(each.c.cursor, each.c.step).where(each.c.turn == 1)
        if max_points is not None:
            once = _evenly(once.subquery(), max_points)
        chosen = once.subquery()
        query = (
            sa.select(records.c.cursor, records.c.time, records.c.attempt, records.c.body)
            .join(chosen, chosen.c.cursor == records.c.cursor)
            .where(records.c.job_id == job_id)
            .order_by(chosen.c.step)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [Record(*row) for row in await connection.execute(query)]

    async def begin_attempt(self, attempt: Attempt, record: NewRecord) -> int:
        """Make an attempt known; the last sequence number it has had acknowledged.

        Safe to repeat: an attempt that reports again after a broken connection goes on.

        Raises:
            StaleAttemptError: a newer attempt of the job is known.
        """
        async with self._database.write() as connection:
            await _check_newest(connection, attempt.job_id, attempt.number)
            acknowledged = await _acknowledged(connection, attempt.job_id, attempt.number)
            if acknowledged is not None:
                return acknowledged
            await connection.execute(sa.insert(attempts).values(**asdict(attempt)))
            await append_records(connection, attempt.job_id, [record])
            return 0

    async def append_reported(
        self, job_id: str, attempt: int, entries: Sequence[tuple[int, NewRecord | None]]
    ) -> tuple[int, int]:
        """Append numbered entries of an attempt, each once.

        Returns the number up to which everything was durable before, and up to which it is now.
        Entries come in order. A number that is left out is an entry that the attempt had to drop:
        what waits for an acknowledgement it sends again, from the first on.

        Raises:
            StaleAttemptError: a newer attempt of the job is known, or the job was deleted. One that
                was given up but lives on must not mix its points with the newer one's.
        """
        async with self._database.write() as connection:
            await _check_newest(connection, job_id, attempt)
            acknowledged = await _acknowledged(connection, job_id, attempt)
            if acknowledged is None:  # it began before it reported
                raise StaleAttemptError(f"job {job_id} was deleted")
            fresh: list[NewRecord] = []
            upto = acknowledged
            for sequence, record in entries:
                if sequence > upto:
                    upto = sequence
                    if record is not None:
                        fresh.append(record)
            if fresh:
                await append_records(connection, job_id, fresh)
            if upto > acknowledged:
                await connection.execute(
                    sa.update(attempts)
                    .where(attempts.c.job_id == job_id, attempts.c.number == attempt)
                    .values(acknowledged=upto)
                )
            return acknowledged, upto


async def begin_stream(
    connection: AsyncConnection, job_id: str, step: int, created_at: float, new: Sequence[NewRecord]
) -> Ledger:
    """The progress of a job that was inserted in this transaction, and its first records.

    step: where it starts. Returns its ledger, after these records.
    """
    ledger = Ledger(until=created_at)
    rows, changes = _taken(job_id, 1, ledger, new)
    await connection.execute(sa.insert(progress).values(**{"step": step, **changes}, job_id=job_id))
    if rows:
        await connection.execute(sa.insert(records), rows)
    connection.info[TOUCHED].add(job_id)
    return ledger


async def append_records(
    connection: AsyncConnection, job_id: str, new: Sequence[NewRecord]
) -> None:
    """Append within a transaction, and apply what the records change of the job's progress."""
    row = (await connection.execute(_ACCOUNT.where(progress.c.job_id == job_id))).first()
    assert row is not None, "a job and its progress are made together"
    cursor, kept, created_at = row
    ledger = Ledger.from_dict(kept) if kept else await _replayed(connection, job_id, created_at)
    rows, changes = _taken(job_id, cursor, ledger, new)
    await connection.execute(sa.insert(records), rows)
    connection.info[TOUCHED].add(job_id)
    await connection.execute(
        sa.update(progress).where(progress.c.job_id == job_id).values(**changes)
    )


def _taken(
    job_id: str, cursor: int, ledger: Ledger, new: Sequence[NewRecord]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of records from a cursor on, and what they change of the job's progress."""
    changes: dict[str, Any] = {"next_cursor": cursor + len(new)}
    rows = []
    for number, record in enumerate(new, start=cursor):
        changes.update(record.changes)
        if record.message is not None:
            ledger.take(record.time, record.message)
        rows.append(
            {
                "job_id": job_id,
                "cursor": number,
                "time": record.time,
                "attempt": record.attempt,
                "step": record.step,
                "kind": record.kind,
                "body": record.body,
            }
        )
    return rows, {**changes, "ledger": ledger.to_dict()}


_ACCOUNT = sa.select(progress.c.next_cursor, progress.c.ledger, jobs.c.created_at).join(
    jobs, jobs.c.id == progress.c.job_id
)


async def _replayed(connection: AsyncConnection, job_id: str, created_at: float) -> Ledger:
    """The ledger of a job from before ledgers were kept: from its records."""
    ledger = Ledger(until=created_at)
    query = sa.select(records.c.time, records.c.body).where(records.c.job_id == job_id)
    for time, body in await connection.execute(query.order_by(records.c.cursor)):
        ledger.take(time, pb.WatchJobResponse.FromString(body))
    return ledger


def _evenly(points: sa.Subquery, count: int) -> sa.Select[Any]:
    """Up to count of them, evenly spaced by their steps: old ones may lie thinner than new ones.

    The range of steps falls into count bins, the last step into one of its own; the first point of
    each bin counts. Where there are no more than count points, all do.
    """
    if count == 1:
        newest = sa.select(points.c.cursor, points.c.step).order_by(points.c.step.desc())
        return newest.limit(1)
    first = sa.func.min(points.c.step).over()
    width = sa.func.nullif(sa.func.max(points.c.step).over() - first, 0)
    binned = sa.select(
        points.c.cursor,
        points.c.step,
        # Whole numbers; of one step only, whose range is no range, SQLite makes one bin: NULL.
        ((points.c.step - first) * (count - 1)).op("/")(width).label("bin"),
        sa.func.count().over().label("total"),
    ).subquery()
    place = sa.func.row_number().over(partition_by=binned.c.bin, order_by=binned.c.step)
    ranked = sa.select(
        binned.c.cursor, binned.c.step, binned.c.total, place.label("place")
    ).subquery()
    return sa.select(ranked.c.cursor, ranked.c.step).where(
        sa.or_(ranked.c.place == 1, ranked.c.total <= count)
    )


async def _check_newest(connection: AsyncConnection, job_id: str, attempt: int) -> None:
    newest = await connection.scalar(
        sa.select(sa.func.max(attempts.c.number)).where(attempts.c.job_id == job_id)
    )
    if newest is not None and newest > attempt:
        raise StaleAttemptError(f"attempt {newest} of job {job_id} reports now")


async def _acknowledged(connection: AsyncConnection, job_id: str, attempt: int) -> int | None:
    found: int | None = await connection.scalar(
        sa.select(attempts.c.acknowledged).where(
            attempts.c.job_id == job_id, attempts.c.number == attempt
        )
    )
    return found
