"""Jobs forgotten for good: their checkpoints, logs and documents, then their rows.

Knows no gRPC. A deletion is asked for once and then carried through, by whoever comes after a
crash too; the caller only waits for it.

Invariant: a job with a tombstone is final, nobody may start from its checkpoints any more, and it
goes as a whole. Nothing is deleted before the tombstone is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time

from service.errors import JobInUseError, JobNotFoundError, PreconditionError, ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.storage import Storage
from service.store import DeletionStore, JobStore

AGAIN_S = 30.0  # until what failed is tried again
SHOWN_JOBS = 10
log = logging.getLogger(__name__)


class Deletions:
    """Deletes jobs. `run` finishes what was begun before."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        jobs: JobStore,
        deletions: DeletionStore,
        storage: Storage,
        metrics: Metrics,
    ) -> None:
        self._lifecycle = lifecycle
        self._jobs = jobs
        self._deletions = deletions
        self._storage = storage
        self._metrics = metrics
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def delete(self, job_id: str, checkpoints: bool, actor: str) -> None:
        """Forget a final job; returns when nothing of it is left. Safe to repeat.

        checkpoints: those that it has go too; else a job that has any is refused.

        Raises:
            JobNotFoundError: there never was such a job.
            PreconditionError: it is not final, or has checkpoints.
            JobInUseError: jobs that are not final started from its checkpoints.
            StorageAwayError: it goes on by itself once the store is back.
        """
        # Nobody may start from this job between the look at who did and the tombstone.
        async with self._lifecycle.forking:
            known = await self._deletions.state(job_id)
            if known:
                return
            if known is None:
                await self._begin(job_id, checkpoints, actor)
        await asyncio.shield(self._task(job_id))  # goes on where the caller hangs up

    async def run(self) -> None:
        """Finish what was begun, for ever."""
        while True:
            try:
                for job_id in await self._deletions.pending():
                    await self._try(job_id)
            except Exception:  # the loop outlives any single failure
                log.exception("what is to be deleted can't be read")
            await asyncio.sleep(AGAIN_S)

    async def _try(self, job_id: str) -> None:
        try:
            await self._task(job_id)
        except ServiceError as error:
            log.warning("job %s is not deleted yet: %s", job_id, error)
        except Exception:
            log.exception("job %s is not deleted yet", job_id)

    async def close(self) -> None:
        """Stop at once; the next start goes on."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self, job_id: str, checkpoints: bool, actor: str) -> None:
        job = await self._jobs.get(job_id)
        if job is None:
            raise JobNotFoundError(f"no job {job_id!r}")
        if not job.is_final:
            raise PreconditionError(f"job {job_id} is {job.state}: cancel it first")
        if needed := await self._jobs.unfinished_children(job_id):
            names = ", ".join(needed[:SHOWN_JOBS]) + ", ..." * (len(needed) > SHOWN_JOBS)
            raise JobInUseError(
                f"job {job_id} is where {names} started, which may have to start there again: "
                "wait until they are final, or cancel them"
            )
        if not checkpoints and (current := await self._storage.current(job_id)):
            raise PreconditionError(
                f"job {job_id} has {len(current)} checkpoints, the newest {current[0]}; they go "
                "only if that is asked for (delete_checkpoints)"
            )
        if not await self._deletions.begin(job, actor, time.time()):
            raise PreconditionError(f"job {job_id} changed a moment ago; try again")
        log.info("job %s (%s) is being deleted, asked for by %s", job_id, job.spec.name, actor)

    def _task(self, job_id: str) -> asyncio.Task[None]:
        """The one that deletes this job."""
        task = self._tasks.get(job_id)
        if task is None:
            task = asyncio.create_task(self._carry_out(job_id))
            self._tasks[job_id] = task
            task.add_done_callback(lambda done: self._forget(job_id, done))
        return task

    def _forget(self, job_id: str, done: asyncio.Task[None]) -> None:
        del self._tasks[job_id]
        if not done.cancelled():
            done.exception()  # whoever waits for it is told; perhaps nobody does

    async def _carry_out(self, job_id: str) -> None:
        job = await self._jobs.get(job_id)
        await self._storage.delete_job(job_id, job.start if job is not None else None)
        await self._deletions.erase(job_id, time.time())
        self._metrics.forget(job_id)
        log.info("job %s is deleted", job_id)
