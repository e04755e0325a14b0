"""The metric history of long jobs made thinner with age, in small batches beside all other work.

Events are never thinned. Of points, the newest RECENT of a job's stream stay, and of the others
one a step, the newest attempt's: all of the last RECENT steps, then every 16th step, and half as
many with each doubling of age. Strides are powers of two and count from step 0, so that what stays
at one age is part of what stayed before, and jobs of one length keep the same steps.

Invariant: cursors only ever grow, and no record changes; a reader that comes back later meets gaps.
A job's points are bounded, whatever its length and however often it was trained again: 2 * RECENT,
PER_OCTAVE for each doubling (18 up to the last step that there can be), the first, and what came
since the last pass: EVERY, or of a job that reports faster, what it reports in PAUSE_S.
"""

from __future__ import annotations

import asyncio
import logging

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from service.store.database import Database
from service.store.schema import progress, records, thinned

RECENT = 8192
PER_OCTAVE = 512
OCTAVES = 18  # RECENT * 2**18 is past the last step that a spec can ask for
EVERY = 2000  # new records of a job before it is looked at again
PAUSE_S = 20.0
CHOSEN = 20_000  # points that one look takes out
BATCH = 500  # of one transaction: a report waits a few milliseconds at most
log = logging.getLogger(__name__)


class Thinning:
    """Thins the streams of a database, for as long as it runs."""

    def __init__(self, database: Database, recent: int = RECENT, per_octave: int = PER_OCTAVE):
        """recent: a multiple of per_octave, both powers of two."""
        self._database = database
        self._recent = recent
        self._first_stride = recent // per_octave

    async def run(self) -> None:
        """Thin what is due, for ever."""
        while True:
            try:
                for job_id in await self.due():
                    await self.thin(job_id)
            except Exception:  # the loop outlives any single failure, such as a file that is held
                log.exception("metric histories are not thinned now")
            await asyncio.sleep(PAUSE_S)

    async def due(self) -> list[str]:
        """Jobs whose streams have grown much since they were last looked at."""
        grown = progress.c.next_cursor - sa.func.coalesce(thinned.c.upto, 0)
        query = (
            sa.select(progress.c.job_id)
            .outerjoin(thinned, thinned.c.job_id == progress.c.job_id)
            .where(progress.c.next_cursor > self._recent, grown >= EVERY)
        )
        async with self._database.read() as connection:
            return list(await connection.scalars(query))

    async def thin(self, job_id: str) -> int:
        """Take out what a job need not keep; how many points. Safe to interrupt and repeat."""
        taken = 0
        while True:
            async with self._database.read() as connection:
                upto = await connection.scalar(
                    sa.select(progress.c.next_cursor).where(progress.c.job_id == job_id)
                )
                doomed = list(await connection.scalars(self._doomed(job_id)))
            for first in range(0, len(doomed), BATCH):
                some = doomed[first : first + BATCH]
                here = sa.and_(records.c.job_id == job_id, records.c.cursor.in_(some))
                async with self._database.write() as connection:
                    taken += (await connection.execute(sa.delete(records).where(here))).rowcount
            if len(doomed) < CHOSEN:
                break
        async with self._database.write() as connection:
            still = sa.select(progress.c.job_id, sa.literal(upto)).where(
                progress.c.job_id == job_id
            )
            noted = insert(thinned).from_select(["job_id", "upto"], still)
            await connection.execute(
                noted.on_conflict_do_update(index_elements=["job_id"], set_={"upto": upto})
            )
        return taken

    def _doomed(self, job_id: str) -> sa.Select[tuple[int]]:
        """The cursors of points to take out, some of them where there are many."""
        of_job = sa.and_(records.c.job_id == job_id, records.c.kind == "point")
        newest_first = (records.c.attempt.desc(), records.c.cursor.desc())
        points = (
            sa.select(
                records.c.cursor,
                records.c.step,
                sa.func.row_number()
                .over(partition_by=records.c.step, order_by=newest_first)
                .label("turn"),
                sa.func.min(records.c.step).over().label("first"),
                sa.func.max(records.c.step).over().label("last"),
            )
            .where(of_job)
            .subquery()
        )
        horizon = (
            sa.select(records.c.cursor)
            .where(of_job)
            .order_by(records.c.cursor.desc())
            .limit(1)
            .offset(self._recent - 1)
            .scalar_subquery()
        )
        between = points.c.step.op("&")(self._mask(points.c.last - points.c.step)) != 0
        passed_by = sa.and_(between, points.c.step != points.c.first)
        return (
            sa.select(points.c.cursor)
            .where(points.c.cursor < horizon, sa.or_(points.c.turn > 1, passed_by))
            .limit(CHOSEN)
        )

    def _mask(self, age: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
        """One less than the stride at an age in steps."""
        ladder = [(age < self._recent, sa.literal(0))]
        ladder += [
            (age < (self._recent << octave), sa.literal((self._first_stride << (octave - 1)) - 1))
            for octave in range(1, OCTAVES)
        ]
        oldest = (self._first_stride << (OCTAVES - 1)) - 1
        return sa.case(*ladder, else_=sa.literal(oldest))
