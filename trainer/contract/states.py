"""Job states and the one table of what may follow what.

The service applies it in code and in the database; nothing else decides a transition.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING})  # holds resources

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        # PAUSED: a user may set a job aside before it ever ran.
        {JobState.STARTING, JobState.PAUSED, JobState.CANCELLED, JobState.FAILED}
    ),
    JobState.STARTING: frozenset(
        {
            JobState.RUNNING,
            JobState.QUEUED,
            JobState.PAUSED,
            JobState.CANCELLED,
            JobState.FAILED,
            # A job brought back at its horizon has nothing left to train.
            JobState.SUCCEEDED,
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.STARTING,
            JobState.QUEUED,
            JobState.PAUSED,
            JobState.SUCCEEDED,
            JobState.CANCELLED,
            JobState.FAILED,
        }
    ),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


def may_follow(old: JobState, new: JobState) -> bool:
    """Whether a job may go from old to new."""
    return new in TRANSITIONS[old]
