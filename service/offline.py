"""`everstep plan --offline` of a continuation: a plan from what storage holds, without a service.

A program of its own (`python -m service.offline`): one line of JSON on stdin (spec, inherit,
device), one on stdout: {"plan": of everstep.v1}, {"violations": of the spec} or {"error": why}.
Reads the checkpoint that the job starts from and binds its data, as the service would; knows no
job's measured rates, and of a cluster nothing.

Invariant: writes nothing, in storage or anywhere that stays, but a built-in corpus that is asked
for and isn't there yet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from service.errors import ServiceError, StartError
from service.planning import Planner
from service.servicer import plan_to_proto
from service.settings import Settings
from service.storage import Storage
from service.store import Database, JobStore, RecordStore
from trainer.contract.violations import SpecError, Violation
from trainer.storage.object_store import StoreError, StoreUriError, open_store

NO_STORAGE = "without a service EVERSTEP_STORAGE must name the bucket that holds the job"


def main() -> None:
    """Answer the request on stdin."""
    logging.disable(logging.INFO)
    asked = json.loads(sys.stdin.readline())
    try:
        answer = asyncio.run(_plan(Settings(), **asked))
    except SpecError as error:
        answer = {"violations": [[v.field, v.describe()] for v in error.violations]}
    except (ServiceError, StartError, StoreError, StoreUriError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


async def _plan(
    settings: Settings, spec: dict[str, Any], inherit: bool, device: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="everstep-plan-") as folder:
        database = await Database.open(Path(folder) / "empty.db")
        try:
            start = (spec.get("start") or {}).get("from") or ""
            if settings.storage is None and not str(start).startswith("nanochat:"):
                raise SpecError([Violation("start.from", start, NO_STORAGE)])
            store = open_store(settings.storage or f"file:{folder}")
            storage = Storage(store, settings.data_roots)
            jobs, records = JobStore(database), RecordStore(database)
            planner = Planner(jobs, records, storage, nodes=lambda: None)
            made = plan_to_proto(await planner.plan(spec, inherit, device))
        finally:
            await database.close()
    return {"plan": MessageToDict(made, preserving_proto_field_name=True)}


if __name__ == "__main__":
    main()
