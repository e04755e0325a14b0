"""The only package that knows SQL: SQLAlchemy Core over SQLite, schema by Alembic.

Invariant: what a method has returned from is on disk (WAL, synchronous=FULL); one writer at a time.
"""

from service.store.database import Database
from service.store.job_store import JobStore
from service.store.record_store import NewRecord, RecordStore

__all__ = ["Database", "JobStore", "NewRecord", "RecordStore"]
