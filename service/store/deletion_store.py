"""Tombstones: which jobs are being forgotten, and which were. A job's rows go in small batches."""

from __future__ import annotations

import sqlalchemy as sa

from service.jobs import Job
from service.store.database import Database
from service.store.schema import attempts, deletions, jobs, progress, records, thinned

BATCH = 1000  # records at once: others may write in between


class DeletionStore:
    """What is left of jobs that were deleted, and what still has to go."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, job: Job, actor: str, now: float) -> bool:
        """Set the tombstone, unless the job has changed meanwhile; safe to repeat."""
        reason = f"is being deleted, asked for by {actor}" if actor else "is being deleted"
        async with self._database.write() as connection:
            same = sa.and_(jobs.c.id == job.id, jobs.c.version == job.version)
            change = sa.update(jobs).where(same).values(reason=reason, version=job.version + 1)
            if (await connection.execute(change)).rowcount != 1:
                return False
            row = {"job_id": job.id, "name": job.spec.name, "actor": actor, "asked_at": now}
            await connection.execute(sa.insert(deletions).values(row))
            return True

    async def state(self, job_id: str) -> bool | None:
        """Whether a job was deleted; False: it is about to be; None: nobody asked for it."""
        query = sa.select(deletions.c.done_at).where(deletions.c.job_id == job_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
            return None if row is None else row[0] is not None

    async def pending(self) -> list[str]:
        """The jobs whose deletion was begun and not finished."""
        query = sa.select(deletions.c.job_id).where(deletions.c.done_at.is_(None))
        async with self._database.read() as connection:
            return list(await connection.scalars(query))

    async def erase(self, job_id: str, now: float) -> None:
        """Delete the job's rows and note that it is done. Safe to interrupt and repeat."""
        some = sa.select(records.c.cursor).where(records.c.job_id == job_id).limit(BATCH)
        batch = sa.delete(records).where(records.c.job_id == job_id, records.c.cursor.in_(some))
        while True:
            async with self._database.write() as connection:
                if (await connection.execute(batch)).rowcount == 0:
                    break
        async with self._database.write() as connection:
            for table in (records, attempts, progress, thinned):
                await connection.execute(sa.delete(table).where(table.c.job_id == job_id))
            await connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
            done = sa.update(deletions).where(deletions.c.job_id == job_id)
            await connection.execute(done.values(done_at=now))
