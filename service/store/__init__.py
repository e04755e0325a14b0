"""The only package that knows SQL: SQLAlchemy Core over SQLite, schema by Alembic.

Invariant: what a method has returned from is on disk (WAL, synchronous=FULL); one writer at a time.
"""

from service.store.database import Database
from service.store.deletion_store import DeletionStore
from service.store.drain_store import DrainStore
from service.store.job_store import JobStore
from service.store.record_store import NewRecord, RecordStore
from service.store.thinning import Thinning
from service.store.token_store import Token, TokenStore

__all__ = [
    "Database",
    "DeletionStore",
    "DrainStore",
    "JobStore",
    "NewRecord",
    "RecordStore",
    "Thinning",
    "Token",
    "TokenStore",
]
