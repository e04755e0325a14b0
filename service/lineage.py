"""Where a job came from, job by job back to fresh weights or nanochat, and what forked from it.

Reads the database, and the bucket for jobs that the database no longer knows. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import JobNotFoundError
from service.storage import Storage
from service.store import JobStore
from trainer.storage.manifest import CheckpointRef
from trainer.storage.nanochat_files import NanochatStart, split_name
from trainer.storage.object_store import NotFoundError

MOST_FORKS = 500


@dataclass(frozen=True)
class Ancestor:
    """One job of a lineage. name: empty where nothing is left of the job but its id.

    Or what the first job started from at nanochat: job_id is empty, name names the checkpoint.
    """

    job_id: str
    name: str
    start_step: int
    end_step: int  # that the next job took over; of the first, its last step


@dataclass(frozen=True)
class Fork:
    """A job that continues from another."""

    job_id: str
    name: str
    parent_job_id: str
    start_step: int
    end_step: int


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
        name, start, last_step, nanochat = known
        end_step = taken_over.step if taken_over is not None else last_step
        step = start.step if start else nanochat.step if nanochat else 0
        found.append(Ancestor(job_id, name, step, end_step))
        if start is None:
            found += [nanochat_ancestor(nanochat)] if nanochat is not None else []
            break
        job_id, taken_over = start.job_id, start
    return found


async def forks(jobs: JobStore, ancestors: Sequence[Ancestor]) -> list[Fork]:
    """Other jobs that continue from these and from each other, parents first; MOST_FORKS at most.

    Only the database is asked: jobs that it forgot are not found from their parents.
    """
    seen = {each.job_id for each in ancestors}
    parents = seen - {""}
    found: list[Fork] = []
    while parents and len(found) < MOST_FORKS:  # a generation a time
        children = await jobs.children(parents, MOST_FORKS - len(found))
        parents = {view.job.id for view in children} - seen
        seen |= parents
        for view in children:
            job, start = view.job, view.job.start
            if job.id in parents and start is not None:
                found.append(
                    Fork(job.id, job.spec.name, start.job_id, start.step, view.progress.step)
                )
    return found


def nanochat_ancestor(start: NanochatStart) -> Ancestor:
    """What a job started from at nanochat."""
    return Ancestor("", start.name, 0, start.step)


async def _look_up(
    jobs: JobStore, storage: Storage, job_id: str
) -> tuple[str, CheckpointRef | None, int, NanochatStart | None] | None:
    """Name, start and last step of a job, and nanochat's checkpoint where it started from one."""
    view = await jobs.view(job_id)
    if view is not None:
        started = view.job.spec.start.from_ or ""
        nanochat = None
        if started.startswith("nanochat:"):
            uri, step = split_name(started)
            nanochat = NanochatStart(uri=uri, step=step, files=())
        return view.job.spec.name, view.job.start, view.progress.step, nanochat
    try:
        document = await storage.document(job_id)
    except NotFoundError:
        return None
    start = document.start
    current = await storage.current(job_id)
    began = start or document.nanochat
    last_step = current[0].step if current else began.step if began else 0
    return str(document.spec.get("name", "")), start, last_step, document.nanochat
