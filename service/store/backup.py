"""`python -m service.store.backup STATE TARGET`: a copy of the database, also while it is written.

By SQLite's own backup, in one step: the copy is the database at one moment, and in WAL mode nobody
who writes waits for it. docs/backup.md says what else belongs to a backup, and how to restore.

Invariant: TARGET appears whole and checked, or stays as it was.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

DATABASE = "everstep.db"
WAIT_S = 30.0
# Streams go on behind every cursor that was given out after the copy: a watcher who comes back with
# one to a service that was restored would pass over as many records.
LEAP = 1_000_000_000


def back_up(state: Path, target: Path) -> None:
    """Copy the database in the folder state to the file target.

    Raises:
        FileNotFoundError: there is none. sqlite3.DatabaseError: it is damaged, or so is the copy.
    """
    source = state / DATABASE
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not there")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    opened = closing(sqlite3.connect(source, timeout=WAIT_S))
    with opened as live, closing(sqlite3.connect(partial, isolation_level=None)) as copy:
        live.backup(copy)
        copy.execute(f"UPDATE progress SET next_cursor = next_cursor + {LEAP}")
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        (found,) = copy.execute("PRAGMA integrity_check").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged: {found}")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m service.store.backup", description=__doc__)
    parser.add_argument("state", type=Path, help="the service's state folder")
    parser.add_argument("target", type=Path, help="the file to write; replaced as a whole")
    asked = parser.parse_args()
    try:
        back_up(asked.state, asked.target)
    except (OSError, sqlite3.Error) as error:
        print(f"no backup was made: {error}", file=sys.stderr)
        return 1
    print(f"{asked.target}: {asked.target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
