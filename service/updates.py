"""What may change while a job exists: its priority, and which checkpoints it keeps.

The spec in the bucket stays what was asked for at first; manifests carry its digest. The retention
in force lies beside it, where the trainer looks each time that it deletes checkpoints.

Invariant: what the database says of a job is what its trainer does, once the call has answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from everstep.specs import merged
from service import events
from service.errors import PreconditionError, require
from service.jobs import JobView
from service.lifecycle import Lifecycle
from service.storage import Storage
from service.store import JobStore
from trainer.contract.spec import JobSpec

RETENTION = ("keep_last", "keep_every_steps", "keep_best")


class Updates:
    """Changes jobs."""

    def __init__(
        self, lifecycle: Lifecycle, jobs: JobStore, storage: Storage, wake: Callable[[], None]
    ) -> None:
        """wake: makes the reconciler look now."""
        self._lifecycle = lifecycle
        self._jobs = jobs
        self._storage = storage
        self._wake = wake
        self._turn = asyncio.Lock()  # bucket and database change together

    async def update(
        self, job_id: str, priority: int | None, retention: Mapping[str, Any], actor: str
    ) -> JobView:
        """Give a job that is not final another priority or retention. Safe to repeat.

        Raises:
            InvalidRequestError: nothing to change is given, or something that can't change.
            SpecError: a value that no spec may have.
            PreconditionError: the job is final.
        """
        fixed = ", ".join(f"retention.{field}" for field in retention if field not in RETENTION)
        require(not fixed, f"{fixed}: can't change; priority and {', '.join(RETENTION)} can")
        changes: dict[str, Any] = {"checkpoint": dict(retention)} if retention else {}
        if priority is not None:
            changes["priority"] = priority
        require(bool(changes), "priority or retention: must be given")
        async with self._turn:
            while True:
                job = (await self._lifecycle.get(job_id)).job
                if job.is_final:
                    raise PreconditionError(f"job {job_id} is {job.state}: nothing to change")
                spec = JobSpec.parse(merged(job.spec.to_dict(), changes))
                if retention:
                    # The bucket first: a change without an answer may hold, never the reverse.
                    # Also where the database says so already: the answer of an earlier change that
                    # the bucket took may have been lost.
                    await self._storage.save_retention(job_id, spec.checkpoint)
                told = _differences(job.spec, spec)
                if not told:
                    return await self._lifecycle.get(job_id)
                record = events.requested(f"change {told}", actor, time.time())
                if await self._jobs.change(job, replace(job, spec=spec), record):
                    self._wake()
                    return await self._lifecycle.get(job_id)


def _differences(old: JobSpec, new: JobSpec) -> str:
    """What changes, in words; empty: nothing."""
    pairs = [("priority", old.priority, new.priority)] + [
        (field, getattr(old.checkpoint, field), getattr(new.checkpoint, field))
        for field in RETENTION
    ]
    return ", ".join(f"{name} from {was} to {now}" for name, was, now in pairs if was != now)
