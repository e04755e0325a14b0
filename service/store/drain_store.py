"""Machines that are kept empty, in the database."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from service.store.database import Database
from service.store.schema import drains


class DrainStore:
    """Addresses of machines that somebody drained, until that is undone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> dict[str, str]:
        """By whom each was drained, by address."""
        async with self._database.read() as connection:
            rows = await connection.execute(sa.select(drains.c.address, drains.c.actor))
            return {row.address: row.actor for row in rows}

    async def add(self, address: str, actor: str, now: float) -> None:
        """Note it; who drained it first stays. Safe to repeat."""
        row = insert(drains).values(address=address, actor=actor, asked_at=now)
        async with self._database.write() as connection:
            await connection.execute(row.on_conflict_do_nothing())

    async def remove(self, address: str) -> None:
        """Forget it. Safe to repeat."""
        async with self._database.write() as connection:
            await connection.execute(sa.delete(drains).where(drains.c.address == address))
