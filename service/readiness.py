"""Whether the service can do its work, as gRPC's health protocol tells it; how many jobs there are.

Ready means: the database takes a write, and the reconciler runs. Ray or the store being away is no
reason not to be: calls are answered then, jobs wait, and what trainers report is kept.
"""

from __future__ import annotations

import asyncio
import logging

from service.metrics import Metrics
from service.server import Server
from service.store import Database, JobStore

LOOK_EVERY_S = 2.0
LATE_S = 10.0  # as long as a call waits for the file's lock
log = logging.getLogger(__name__)


async def look_after(
    database: Database,
    jobs: JobStore,
    metrics: Metrics,
    server: Server,
    reconciling: asyncio.Task[None],
) -> None:
    """Look for ever. reconciling: the reconciler's task, which never ends by itself."""

    async def look() -> None:
        metrics.set_states(await jobs.counts())
        metrics.set_accounts(await jobs.accounts(metrics.accounted))
        await database.touch()
        if reconciling.done():
            raise RuntimeError("the reconciler has ended") from reconciling.exception()

    while True:
        well = False
        looking = asyncio.create_task(look())
        try:
            # A disk that hangs fails nothing. It is waited for: a thread hangs with each look.
            if not (await asyncio.wait({looking}, timeout=LATE_S))[0]:
                log.error("the service is not ready: its database is silent for %.0f s", LATE_S)
                await server.ready(False)
            await looking
            well = True
        except Exception:  # whatever it is: told until it is over
            log.exception("the service is not ready")
        finally:
            looking.cancel()
        await server.ready(well)
        await asyncio.sleep(LOOK_EVERY_S)
