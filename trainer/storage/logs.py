"""Logs of a job in its bucket: written in pieces by each rank, read in order by anybody.

A piece is an object of JSON lines, written once and never changed, so reading needs no lock and a
reader that comes back goes on after the last piece it saw.

Invariant: the pieces of a rank in an attempt are numbered from 1 without a gap; a line is in one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from trainer.storage import layout
from trainer.storage.object_store import NotFoundError, ObjectStore


@dataclass(frozen=True)
class LogLine:
    """One line of a rank. time: seconds since the epoch."""

    attempt: int
    rank: int
    time: float
    text: str


def write_piece(
    store: ObjectStore, job_id: str, key: layout.LogKey, lines: Sequence[tuple[float, str]]
) -> None:
    """Store one piece of (time, text); safe to repeat with the same lines."""
    body = "".join(json.dumps({"time": at, "text": text}) + "\n" for at, text in lines)
    store.put(layout.log_key(job_id, key), body.encode())


def new_pieces(
    store: ObjectStore,
    job_id: str,
    seen: Collection[layout.LogKey],
    attempt: int | None = None,
    rank: int | None = None,
) -> list[layout.LogKey]:
    """The pieces that are there and not in seen, by attempt, then rank, then number."""
    found = []
    for info in store.list(layout.logs_prefix(job_id)):
        key = layout.parse_log(info.key)
        if key is None or key in seen:
            continue
        if (attempt is None or key.attempt == attempt) and (rank is None or key.rank == rank):
            found.append(key)
    return sorted(found)


def read_piece(store: ObjectStore, job_id: str, key: layout.LogKey) -> Iterator[LogLine]:
    """The lines of a piece; none where it was deleted meanwhile."""
    try:
        body = store.get(layout.log_key(job_id, key))
    except NotFoundError:
        return
    for line in body.decode().splitlines():
        fields = json.loads(line)
        yield LogLine(key.attempt, key.rank, float(fields["time"]), str(fields["text"]))
