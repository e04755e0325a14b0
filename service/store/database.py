"""The SQLite file: opened, migrated, and written by one writer at a time."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiosqlite
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import AsyncAdaptedQueuePool, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
# Keys in a connection's info, of this transaction: jobs whose stream grew; tables written to.
TOUCHED, WRITTEN = "touched", "written"
RETURN_S, RETURN_POLL_S = 5.0, 0.01
BUSY_TIMEOUT_MS = 10_000  # another process may hold the file for a backup


class Database:
    """An open database. `open` it, hand it to the stores, `close` it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writer = asyncio.Lock()
        self._grown: dict[str, asyncio.Event] = {}
        self._commits = Counter[str]()
        event.listen(engine.sync_engine, "after_execute", _note_table)

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open the file, creating it and migrating it to the newest schema first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(migrate, path)
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{path}", async_creator=lambda: _Connection(path)
        )
        event.listen(engine.sync_engine, "connect", _configure)
        return cls(engine)

    async def close(self) -> None:
        """Close every connection; what was written stays."""
        # A call that was cancelled gives its connection back a moment later, and one that came back
        # after the pool's end would never be closed.
        pool = self._engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_S):
                while pool.checkedout():
                    await asyncio.sleep(RETURN_POLL_S)
        await self._engine.dispose()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may write: committed at the end, rolled back on an exception.

        Whoever waits for a job whose stream grew in it is woken after the commit.
        """
        touched: set[str] = set()
        written: set[str] = set()
        ends = False
        async with self._writer:
            try:
                async with self._engine.begin() as connection:
                    connection.info.update({TOUCHED: touched, WRITTEN: written})
                    yield connection
                    ends = True
            finally:  # a commit that fails, or whose caller leaves, may have been made
                self._commits.update(written)
                for job_id in touched if ends else ():
                    if waited := self._grown.pop(job_id, None):
                        waited.set()

    async def touch(self) -> None:
        """Write one page, durably: fails where no call that changes anything could be kept."""
        async with self.write() as connection:
            await connection.exec_driver_sql("PRAGMA user_version = 1")

    def commits(self, table: str) -> int:
        """How often the table was written to. Taken before a read, it says what that knows of."""
        return self._commits[table]

    def growth(self, job_id: str) -> asyncio.Event:
        """Set once the job's stream has grown. Take it before reading, then wait for it."""
        return self._grown.setdefault(job_id, asyncio.Event())

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read with; never waits for a writer (WAL)."""
        async with self._engine.connect() as connection:
            yield connection


class _Cursor(aiosqlite.Cursor):
    """Runs a statement and fetches its rows in one turn of the connection's thread, not in four."""

    _rows: Sequence[Any] = ()

    async def execute(self, sql: str, parameters: Any = None) -> aiosqlite.Cursor:
        self._rows = await self._conn._execute(self._fetched, sql, parameters or ())  # type: ignore[no-untyped-call]
        return self

    def _fetched(self, sql: str, parameters: Any) -> Sequence[Any]:
        return self._cursor.execute(sql, parameters).fetchall()

    async def fetchall(self) -> Sequence[Any]:
        return self._rows

    async def close(self) -> None:
        """Nothing is left to close once every row was fetched."""


class _Connection(aiosqlite.Connection):
    """Asks its thread for nothing that SQLite isn't needed for."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: sqlite3.connect(path, check_same_thread=False), iter_chunk_size=1)
        # One that was never given back must not hold up the end of the process.
        self._thread.daemon = True

    def cursor(self) -> Any:
        return _Cursor(self, self._conn.cursor())

    async def rollback(self) -> None:
        if self.in_transaction:
            await super().rollback()


def migrate(path: Path, revision: str = "head") -> None:
    """Bring the schema of the file at path to a revision. Safe to repeat; each step is atomic."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = sa.create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", _configure)
    # Python's sqlite3 begins a transaction at the first INSERT, long after the first CREATE: so it
    # leaves that to us, and an upgrade that is cut off leaves the schema that was there.
    event.listen(engine, "connect", _leave_transactions)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


def _note_table(connection: sa.Connection, statement: object, *_rest: object) -> None:
    if isinstance(statement, sa.UpdateBase) and WRITTEN in connection.info:
        connection.info[WRITTEN].add(statement.entity_description["name"])


def _leave_transactions(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # An acknowledged call survives a power cut, not only the end of the process.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
