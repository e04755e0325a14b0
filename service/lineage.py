"""Where a job came from: from job to job by their starts, back to fresh weights.

Reads the database, and the bucket for jobs that the database no longer knows. Decides nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.errors import JobNotFoundError
from service.storage import Storage
from service.store import JobStore
from trainer.storage.manifest import CheckpointRef
from trainer.storage.object_store import NotFoundError


@dataclass(frozen=True)
class Ancestor:
    """One job of a lineage. name: empty where nothing is left of the job but its id."""

    job_id: str
    name: str
    start_step: int
    end_step: int  # that the next job took over; of the first, its last step


async def lineage(jobs: JobStore, storage: Storage, job_id: str) -> list[Ancestor]:
    """The job, its parent, and so on; JobNotFoundError where the job itself is unknown."""
    found: list[Ancestor] = []
    taken_over: CheckpointRef | None = None
    seen = set()
    while job_id not in seen:  # a document that was edited could send us round for ever
        seen.add(job_id)
        known = await _look_up(jobs, storage, job_id)
        if known is None:
            if taken_over is None:
                raise JobNotFoundError(f"no job {job_id!r}")
            found.append(Ancestor(job_id, "", 0, taken_over.step))
            break
        name, start, last_step = known
        end_step = taken_over.step if taken_over is not None else last_step
        found.append(Ancestor(job_id, name, start.step if start else 0, end_step))
        if start is None:
            break
        job_id, taken_over = start.job_id, start
    return found


async def _look_up(
    jobs: JobStore, storage: Storage, job_id: str
) -> tuple[str, CheckpointRef | None, int] | None:
    """Name, start and last step of a job."""
    view = await jobs.view(job_id)
    if view is not None:
        return view.job.spec.name, view.job.start, view.progress.step
    if not re.fullmatch("[0-9A-Za-z]{1,64}", job_id):
        return None
    try:
        document = await storage.document(job_id)
    except NotFoundError:
        return None
    start = document.start
    current = await storage.current(job_id)
    last_step = current[0].step if current else start.step if start else 0
    return str(document.spec.get("name", "")), start, last_step
