"""Everything of one job taken out of a bucket.

Knows keys through `layout`; whether a job may go is the caller's decision.

Invariant: manifests go first, so that nobody takes up a checkpoint that is about to go, and the
job's document last: what a crash leaves is found again, and deleted, by the same call.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from trainer.storage import layout
from trainer.storage.manifest import CheckpointRef
from trainer.storage.object_store import ObjectStore

AT_ONCE = 8  # a long run leaves tens of thousands of pieces of log


def delete_job(store: ObjectStore, job_id: str, start: CheckpointRef | None) -> None:
    """Delete a job's objects, and its hold on the checkpoint that it started from.

    Safe to interrupt and repeat. Nobody may write for the job any more.
    """
    document = layout.spec_key(job_id)
    keys = [info.key for info in store.list(layout.job_prefix(job_id)) if info.key != document]
    manifests = [key for key in keys if _is_manifest(key)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for some in (manifests, [key for key in keys if not _is_manifest(key)]):
            _exhaust(pool.map(store.delete, some))
    if start is not None:
        store.delete(layout.hold_key(start.job_id, start.step, start.attempt, job_id))
    store.delete(document)


def _is_manifest(key: str) -> bool:
    named = layout.parse_checkpoint(key)
    return named is not None and named.file == layout.MANIFEST


def _exhaust(results: Iterable[None]) -> None:
    """Wait for all; the first that failed raises."""
    for _ in results:
        pass
