"""Tables. A change here needs a migration beside it; a test compares the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from trainer.contract.spec import JobSpec

REMEMBERED_SPECS = 1024  # some 5 KB each


class SpecColumn(sa.types.TypeDecorator[JobSpec]):
    """A job's spec as JSON. Checking one takes longer than reading its row: each text once."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: JobSpec | None, dialect: sa.Dialect) -> Any:
        """See TypeDecorator."""
        return value.to_dict() if value is not None else None

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], JobSpec]:
        """See TypeDecorator; the text comes as SQLite keeps it."""
        return _parsed


@lru_cache(REMEMBERED_SPECS)
def _parsed(text: str) -> JobSpec:
    return JobSpec.parse(json.loads(text))


metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("submission", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(26), nullable=False, unique=True),
    sa.Column("request_id", sa.String(128), nullable=False, unique=True),
    sa.Column("request_sha256", sa.String(64), nullable=False),
    sa.Column("spec", SpecColumn, nullable=False),
    sa.Column("start", sa.JSON, nullable=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("desired", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float, nullable=True),
    sa.Column("ended_at", sa.Float, nullable=True),
    sa.Column("host_number", sa.Integer, nullable=False),
    sa.Column("workers", sa.Integer, nullable=False, server_default="0"),
    sa.Column("placement", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("resized_at", sa.Float, nullable=True),
    sa.Column("stop_asked_at", sa.Float, nullable=True),
    sa.Column("version", sa.Integer, nullable=False),
    sqlite_autoincrement=True,
)

# Written by reports, apart from jobs so that they never meet in a compare-and-set.
progress = sa.Table(
    "progress",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("next_cursor", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("latest_point", sa.LargeBinary, nullable=True),
    sa.Column("in_force", sa.LargeBinary, nullable=True),
    sa.Column("checkpoint", sa.JSON, nullable=True),
    sa.Column("checkpoint_at", sa.Float, nullable=True),
    sa.Column("validation_bpb", sa.Float, nullable=True),
    sa.Column("ledger", sa.JSON, nullable=True),  # see service/ledger.py
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("start_step", sa.Integer, nullable=False),
    sa.Column("ended_at", sa.Float, nullable=True),
    sa.Column("outcome", sa.String(40), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("acknowledged", sa.Integer, nullable=False),
)

# One ordered stream a job: events and metric points, as the wire shows them.
records = sa.Table(
    "records",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("cursor", sa.Integer, primary_key=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# How far each job's stream was looked at by whoever thins it.
thinned = sa.Table(
    "thinned",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("upto", sa.Integer, nullable=False),
)

# Bearer tokens by their digests; what names one that is in use names no other.
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String(26), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("role", sa.String(8), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float, nullable=True),
)

# Machines on which nothing may be, by address: Ray names one anew each time that it joins.
drains = sa.Table(
    "drains",
    metadata,
    sa.Column("address", sa.String(255), primary_key=True),
    sa.Column("actor", sa.String(64), nullable=False),
    sa.Column("asked_at", sa.Float, nullable=False),
)

# Tombstones: what remains of jobs that were deleted, or are about to be.
deletions = sa.Table(
    "deletions",
    metadata,
    sa.Column("job_id", sa.String(26), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("actor", sa.String(64), nullable=False),
    sa.Column("asked_at", sa.Float, nullable=False),
    sa.Column("done_at", sa.Float, nullable=True),
)
