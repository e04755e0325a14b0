"""Tokens in the database: their digests, never themselves."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from service.store.database import Database
from service.store.schema import tokens


@dataclass(frozen=True)
class Token:
    """A token without its secret. Times are seconds since the epoch, UTC."""

    id: str
    name: str
    role: str
    sha256: str
    created_at: float
    revoked_at: float | None = None


class TokenStore:
    """All tokens that were ever made."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[Token]:
        """Every token, oldest first."""
        async with self._database.read() as connection:
            rows = await connection.execute(sa.select(tokens).order_by(tokens.c.created_at))
            return [Token(**row._mapping) for row in rows]

    async def insert(self, token: Token) -> bool:
        """Keep a new token; False where one in use has its name."""
        async with self._database.write() as connection:
            same = sa.and_(tokens.c.name == token.name, tokens.c.revoked_at.is_(None))
            if (await connection.execute(sa.select(tokens.c.id).where(same))).first():
                return False
            await connection.execute(sa.insert(tokens).values(**vars(token)))
            return True

    async def revoke(self, name: str, now: float) -> Token | None:
        """Note that a token is out of use, once; by its id, or by the name of one in use."""
        in_use = sa.and_(tokens.c.name == name, tokens.c.revoked_at.is_(None))
        found = sa.select(tokens).where(sa.or_(tokens.c.id == name, in_use))
        async with self._database.write() as connection:
            row = (await connection.execute(found)).first()
            if row is None:
                return None
            token = Token(**row._mapping)
            unrevoked = sa.and_(tokens.c.id == token.id, tokens.c.revoked_at.is_(None))
            await connection.execute(sa.update(tokens).where(unrevoked).values(revoked_at=now))
            again = await connection.execute(sa.select(tokens).where(tokens.c.id == token.id))
            return Token(**again.one()._mapping)
