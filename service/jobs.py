"""Jobs and attempts as values, and the state table applied to them. Pure.

Invariant: a Job changes state only through `moved`, which refuses what the table in
trainer.contract.states doesn't hold; what the reconciler works towards is `desired`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from service.ledger import Ledger
from service.placement import Placement
from trainer.contract.spec import JobSpec
from trainer.contract.states import ACTIVE, FINAL, JobState, may_follow
from trainer.storage.manifest import CheckpointRef


class Desired(StrEnum):
    """What the user wants of a job."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    CANCELLED = "CANCELLED"


class IllegalTransitionError(RuntimeError):
    """Our own bug: somebody asked for a transition that the table doesn't hold."""


@dataclass(frozen=True)
class Job:
    """What the user asked for and where it stands. Times are seconds since the epoch, UTC."""

    id: str
    spec: JobSpec
    start: CheckpointRef | None
    request_id: str
    request_sha256: str
    created_at: float
    state: JobState = JobState.QUEUED
    desired: Desired = Desired.RUNNING
    reason: str = "waits to be scheduled"
    started_at: float | None = None
    ended_at: float | None = None
    host_number: int = 0  # counts the hosts started for this job; fences them
    workers: int = 0  # in force, or the last number; 0: none was chosen yet
    placement: Placement = ()  # the node of each worker; empty where it holds none
    resized_at: float | None = None  # when that number changed last, while it ran
    stop_asked_at: float | None = None  # when its user paused or cancelled it; None: it is to run
    submission: int = 0  # order of submission, given by the store
    version: int = 0  # compare-and-set

    @property
    def is_final(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in FINAL

    @property
    def holds_resources(self) -> bool:
        """Its workers have, or are about to have, their GPUs."""
        return self.state in ACTIVE

    def moved(self, to: JobState, reason: str, now: float) -> Job:
        """This job in another state.

        Raises:
            IllegalTransitionError: not in the state table.
        """
        if not may_follow(self.state, to):
            raise IllegalTransitionError(f"job {self.id}: {self.state} can't become {to}")
        return replace(
            self,
            state=to,
            placement=self.placement if to in ACTIVE else (),
            # Set aside by its user, it starts with what is free when it comes back.
            workers=0 if (self.state, to) == (JobState.PAUSED, JobState.QUEUED) else self.workers,
            reason=reason,
            started_at=now
            if to is JobState.RUNNING and self.started_at is None
            else self.started_at,
            ended_at=now if to in FINAL else None,
        )


@dataclass(frozen=True)
class Attempt:
    """One run of a job on the cluster."""

    job_id: str
    number: int
    started_at: float
    start_step: int
    ended_at: float | None = None
    outcome: str = ""
    message: str = ""
    acknowledged: int = 0


@dataclass(frozen=True)
class Progress:
    """What a job's attempts have reported last. Bodies are serialised everstep.v1 messages."""

    step: int = 0
    latest_point: bytes | None = None
    in_force: bytes | None = None  # an Event of kind VALUES_IN_FORCE
    checkpoint: CheckpointRef | None = None
    checkpoint_at: float | None = None
    validation_bpb: float | None = None
    ledger: Ledger | None = None  # None: of before it was kept, and nothing happened since


@dataclass(frozen=True)
class Record:
    """One entry of a job's stream; body is a serialised everstep.v1.WatchJobResponse."""

    cursor: int
    time: float
    attempt: int
    body: bytes


@dataclass(frozen=True)
class JobView:
    """A job with what belongs to it, as GetJob shows it."""

    job: Job
    progress: Progress = field(default_factory=Progress)
    attempts: tuple[Attempt, ...] = ()
