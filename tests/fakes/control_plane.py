"""The service without Ray and sockets: its stores, reconciler and use cases over a folder."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from service import events
from service.jobs import Attempt, Desired, Job
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.reconciler import Reconciler
from service.storage import Storage
from service.store import Database, DeletionStore, DrainStore, JobStore, RecordStore
from service.upkeep import Upkeep
from tests.fakes.corpus import CORPUS, TOKENIZER
from tests.fakes.ray_cluster import FakeRayCluster
from trainer.contract.spec import JobSpec
from trainer.contract.states import JobState
from trainer.storage.object_store import ObjectStore, open_store

# The smallest model that the test corpus trains.
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": 64},
    "data": {"source": f"file:{CORPUS}", "tokenizer": f"file:{TOKENIZER}"},
    "batch": {"device_batch_size": 2, "total_batch_size": 256},
    "schedule": {"num_iterations": 12, "warmdown_ratio": 0.5},
    "evaluate": {"every": 0, "tokens": 256},
    "sample": {"every": 0},
    "checkpoint": {"every_steps": 4, "every_s": 0, "keep_last": 10},
    "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2},
    "precision": {"compute": "fp32"},
    "compile": "off",
}


def changed(base: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """base with some fields of some sections changed."""
    both = {key: value for key, value in sections.items() if isinstance(value, dict)}
    return {**base, **sections, **{key: {**base.get(key, {}), **both[key]} for key in both}}


def new_job(number: int, **changes: Any) -> Job:
    """A queued job of the test's own making; number makes its id and request."""
    spec = JobSpec.parse(changed(TINY, **changes.pop("spec", {})))
    job = Job(f"JOB{number}", spec, None, f"request-{number}", "0" * 64, time.time())
    return Job(**{**vars(job), **changes})


@dataclass
class ControlPlane:
    """One start of the service over a folder."""

    database: Database
    cluster: FakeRayCluster
    store: ObjectStore
    jobs: JobStore = field(init=False)
    records: RecordStore = field(init=False)
    registry: CollectorRegistry = field(init=False)
    metrics: Metrics = field(init=False)
    reconciler: Reconciler = field(init=False)
    storage: Storage = field(init=False)
    lifecycle: Lifecycle = field(init=False)
    deletions: DeletionStore = field(init=False)
    upkeep: Upkeep = field(init=False)

    def __post_init__(self) -> None:
        self.jobs, self.records = JobStore(self.database), RecordStore(self.database)
        self.deletions = DeletionStore(self.database)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.upkeep = Upkeep(DrainStore(self.database))
        self.reconciler = Reconciler(
            self.jobs,
            self.cluster,  # type: ignore[arg-type] # the same methods
            self.metrics,
            lambda job: {
                "job_id": job.id,
                "host_number": job.host_number,
                "placement": job.placement,
            },
            self.upkeep.mark,
        )
        self.reconciler.signs.began -= 600.0  # it has run for a while
        self.storage = Storage(self.store)
        self.lifecycle = Lifecycle(
            self.database,
            self.storage,
            lambda: self.reconciler.nodes,
            self.reconciler.wake,
            self.reconciler.explained,
        )

    async def add(self, job: Job) -> Job:
        """Queue a job directly."""
        view = await self.jobs.insert(job, events.state_changed(job, job.created_at))
        assert view is not None
        return view.job

    async def job(self, job_id: str) -> Job:
        """The job as it stands."""
        found = await self.jobs.get(job_id)
        assert found is not None
        return self.reconciler.explained(found)

    async def want(self, job_id: str, desired: Desired) -> None:
        """What a user's call does first."""
        await self.lifecycle._desire(job_id, desired, "test", "")

    async def tick(self, times: int = 1) -> None:
        """Reconcile."""
        for _ in range(times):
            await self.reconciler.tick()

    async def trains(self, job: Job, attempt: int = 1) -> Job:
        """An attempt of a STARTING job has reported its first step."""
        begun = Attempt(job.id, attempt, time.time(), 0)
        record = events.attempt_started(attempt, 0, time.time())
        await self.records.begin_attempt(begun, record)
        now = await self.job(job.id)
        changed = await self.jobs.change(now, now.moved(JobState.RUNNING, "trains", time.time()))
        assert changed is not None
        return changed

    async def states(self, job_id: str) -> list[str]:
        """Every state that the job's stream says it entered."""
        from everstep.v1 import everstep_pb2 as pb

        found = []
        for record in await self.records.read(job_id, 0, 1000):
            event = pb.WatchJobResponse.FromString(record.body).event
            if event.kind == pb.EVENT_KIND_STATE_CHANGED:
                found.append(pb.JobState.Name(event.state).removeprefix("JOB_STATE_"))
        return found

    async def messages(self, job_id: str) -> list[str]:
        """What every event of the job's stream says."""
        from everstep.v1 import everstep_pb2 as pb

        records = await self.records.events(job_id)
        return [pb.WatchJobResponse.FromString(record.body).event.message for record in records]


@asynccontextmanager
async def control_plane(
    folder: Path, cluster: FakeRayCluster | None = None, store: ObjectStore | None = None
) -> AsyncIterator[ControlPlane]:
    """A service over a folder; entered again on the same folder, it is the restarted service."""
    database = await Database.open(folder / "everstep.db")
    try:
        plane = ControlPlane(
            database, cluster or FakeRayCluster(), store or open_store(f"file:{folder}/bucket")
        )
        await plane.upkeep.load()
        yield plane
    finally:
        await database.close()
