"""The newest migration's tables are those of the schema, and migrating again changes nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from service.store import schema
from service.store.database import MIGRATIONS, migrate
from trainer.contract.spec import JobSpec


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    migrate(tmp_path / "fresh.db")
    return sa.create_engine(f"sqlite:///{tmp_path}/fresh.db", poolclass=sa.NullPool)


def structure(engine: sa.Engine) -> dict[str, str]:
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT name, sql FROM sqlite_master"))
        return {name: sql for name, sql in rows if sql}


def clauses(tables: dict[str, str]) -> dict[str, list[str]]:
    """What each consists of; a column that was added later stands behind the constraints."""
    return {
        name: sorted(" ".join(clause.split()) for clause in re.split("[(),]", sql))
        for name, sql in tables.items()
    }


def test_the_newest_revision_is_the_schema(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_heads() == tuple(ScriptDirectory(str(MIGRATIONS)).get_heads())


def test_what_a_comparison_of_tables_does_not_see_is_the_same_too(
    engine: sa.Engine, tmp_path: Path
) -> None:
    direct = sa.create_engine(f"sqlite:///{tmp_path}/direct.db", poolclass=sa.NullPool)
    schema.metadata.create_all(direct)
    migrated = structure(engine)
    migrated.pop("alembic_version")
    assert clauses(migrated) == clauses(structure(direct))


def test_migrating_twice_is_safe_and_keeps_the_rows(engine: sa.Engine, tmp_path: Path) -> None:
    before = structure(engine)
    row = dict.fromkeys(schema.jobs.c.keys(), 0) | {"spec": JobSpec(), "start": None, "id": "J"}
    with engine.begin() as connection:
        connection.execute(sa.insert(schema.jobs).values(row))
    migrate(tmp_path / "fresh.db")
    assert structure(engine) == before
    with engine.connect() as connection:
        assert connection.scalar(sa.select(schema.jobs.c.id)) == "J"


def test_there_is_one_line_of_migrations() -> None:
    script = ScriptDirectory(str(MIGRATIONS))
    assert len(script.get_heads()) == 1
    assert len(script.get_bases()) == 1


def row_of(table: sa.Table) -> dict[str, Any]:
    """A row with something in every column, as an older service may have left it."""
    samples: dict[type[Any], Any] = {
        int: 7,
        float: 2.5,
        str: "text",
        bytes: b"raw",
        object: {"a": 1},
    }
    found = {column.name: samples[column.type.python_type] for column in table.c}
    found |= {key: "J" for key in ("id", "job_id") if key in found}
    if table.name == "jobs":
        found["spec"] = {"resources": {"workers": {"min": 2, "max": 2}}}
        found |= {"host_number": 1, "state": "RUNNING", "desired": "CANCELLED"}
        found |= {"workers": 2} if "workers" in found else {}
    return found


def rows(engine: sa.Engine, table: sa.Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(sa.select(table))]


def reflected(engine: sa.Engine) -> dict[str, sa.Table]:
    metadata = sa.MetaData()
    metadata.reflect(engine)
    return {name: table for name, table in metadata.tables.items() if name != "alembic_version"}


@pytest.mark.parametrize(
    "revision", [each.revision for each in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]
)
def test_every_earlier_schema_is_brought_forward_with_its_rows(
    tmp_path: Path, revision: str
) -> None:
    path = tmp_path / "old.db"
    migrate(path, revision)
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    before = {}
    for name, table in reflected(engine).items():
        with engine.begin() as connection:
            connection.execute(sa.insert(table).values(row_of(table)))
        (before[name],) = rows(engine, table)
    assert before["jobs"], "there were rows to bring forward"
    migrate(path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert list(connection.execute(sa.text("PRAGMA foreign_key_check"))) == []
    now = reflected(engine)
    assert set(before) <= set(now)
    for name, old in before.items():
        (found,) = rows(engine, now[name])
        assert {key: found[key] for key in old} == old, name
        if name == "jobs":
            assert found["workers"] == 2, "it ran on its least number"
            assert found["stop_asked_at"], "a stop that was under way has its grace"
            (job,) = rows(engine, schema.jobs)
            assert job["spec"].resources.workers.min == 2, "and it is read as ever"


def test_an_upgrade_that_is_cut_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full disk of a migration that has made tables, and then copies rows."""
    path = tmp_path / "old.db"
    migrate(path, "0004")
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    before = structure(engine)
    with monkeypatch.context() as cut:
        made = Operations.create_table

        def full(self: Operations, *args: Any, **kwargs: Any) -> Any:
            made(self, *args, **kwargs)
            raise OSError("no space left")

        cut.setattr(Operations, "create_table", full)
        with pytest.raises(OSError, match="no space left"):
            migrate(path)
    assert structure(engine) == before
    migrate(path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
