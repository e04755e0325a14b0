"""Checkpoints to and from other programs, by a child process: the service has no torch.

One at a time, at low priority: each holds a whole state in memory.

Invariant: what an import makes is a whole checkpoint of a job that is known, or nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from service import events
from service.checkpoints import CheckpointName
from service.children import answers
from service.errors import BusyError, InvalidRequestError, PreconditionError
from service.lifecycle import Lifecycle
from service.storage import Storage
from service.store import RecordStore
from trainer.storage.manifest import Manifest
from trainer.storage.object_store import StoreUriError, open_store

FORMATS = ("nanochat", "safetensors")


class Transfers:
    """Brings checkpoints in and out, one at a time."""

    def __init__(self, lifecycle: Lifecycle, storage: Storage, records: RecordStore) -> None:
        self._lifecycle = lifecycle
        self._storage = storage
        self._records = records
        self._turn = asyncio.Lock()

    async def export(self, checkpoint: str, target: str, form: str, actor: str = "") -> list[str]:
        """Write JOB@STEP into a folder; the URIs of its files. The job's events say who asked.

        Raises:
            InvalidRequestError: the target or the format can't be.
            JobNotFoundError, CheckpointNotFoundError: there is no such checkpoint.
            BusyError: another transfer is under way.
            PreconditionError: it can't be read or written; says why.
        """
        name = CheckpointName.parse(checkpoint)
        form = form or FORMATS[0]
        if form not in FORMATS:
            raise InvalidRequestError(f"format: {form[:80]!r}: {' or '.join(FORMATS)}")
        try:
            open_store(target)
        except StoreUriError as error:
            raise InvalidRequestError(f"target: {error}") from error
        if (outside := self._storage.outside(target)) is not None:
            raise InvalidRequestError(f"target: {target}: {outside}")
        await self._lifecycle.require(name)
        async with self._alone():
            told = events.requested(f"export {checkpoint} to {target}", actor, time.time())
            await self._records.append(name.job_id, [told])
            wish = {**name._asdict(), "target": target, "format": form}
            return await self._run(checkpoint, wish)

    async def bring(self, source: str, data: Mapping[str, Any], actor: str = "") -> Manifest:
        """Import nanochat:<folder or uri>@STEP as the end of a job. Safe to repeat.

        Raises:
            SpecError: the source or the spec can't be used.
            BusyError, PreconditionError: as export.
        """
        async with self._alone():
            return await self._lifecycle.adopt(
                source, data, lambda job_id: self._run(source, {"job_id": job_id}), actor
            )

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._turn.locked():
            raise BusyError("another import or export is under way; try again in a moment")
        async with self._turn:
            yield

    async def _run(self, what: str, wish: Mapping[str, Any]) -> list[str]:
        # The folder is ours: a child that is killed could not clean up.
        with tempfile.TemporaryDirectory(prefix="everstep-transfer-") as folder:
            request = {"storage_uri": self._storage.uri, "folder": folder, **wish}
            async with contextlib.aclosing(answers("trainer.transfer", request)) as told:
                answer = await anext(told)
        if "error" in answer:
            raise PreconditionError(f"{what}: {answer['error']}")
        files: list[str] = answer["files"]
        return files
