"""How an attempt can end, and what follows from it.

The trainer names the outcome, the host on Ray and the service act on its policy; the table below is
the only place where the two meet. Adding an outcome without a policy fails at import.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self


class Outcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "COMPLETED"  # reached the horizon
    STOPPED = "STOPPED"  # asked to stop, and did so with a checkpoint
    WORKER_LOST = "WORKER_LOST"  # a worker died without a word
    CONTROLLER_LOST = "CONTROLLER_LOST"  # Ray's controller of the run died
    HOST_LOST = "HOST_LOST"  # the host of the attempt is gone, or the whole cluster was
    START_TIMEOUT = "START_TIMEOUT"  # the workers did not get their resources in time
    STALE_WRITER = "STALE_WRITER"  # a newer attempt holds the claim
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"  # storage could not be reached at the start
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NOT_FINITE = "NOT_FINITE"  # loss or gradient is NaN or infinite; no update was applied
    HYPERPARAMETERS_NOT_APPLIED = "HYPERPARAMETERS_NOT_APPLIED"  # the optimizer says otherwise
    DATA_CHANGED = "DATA_CHANGED"  # a shard is not what was bound at submission
    CHECKPOINT_UNUSABLE = "CHECKPOINT_UNUSABLE"  # nothing to start from can be loaded
    INVALID_JOB = "INVALID_JOB"  # spec, data, tokenizer and cluster don't fit together
    CODE_ERROR = "CODE_ERROR"  # an error in our code or its libraries


class Policy(StrEnum):
    """What follows."""

    DONE = "DONE"  # the job's wish is fulfilled
    RESTART = "RESTART"  # another attempt, from the newest current checkpoint
    FAIL = "FAIL"  # another attempt would end the same way


POLICIES: dict[Outcome, Policy] = {
    Outcome.COMPLETED: Policy.DONE,
    Outcome.STOPPED: Policy.DONE,
    Outcome.WORKER_LOST: Policy.RESTART,
    Outcome.CONTROLLER_LOST: Policy.RESTART,
    Outcome.HOST_LOST: Policy.RESTART,
    Outcome.START_TIMEOUT: Policy.RESTART,
    Outcome.STALE_WRITER: Policy.RESTART,
    Outcome.STORE_UNAVAILABLE: Policy.RESTART,
    Outcome.OUT_OF_MEMORY: Policy.FAIL,
    Outcome.NOT_FINITE: Policy.FAIL,
    Outcome.HYPERPARAMETERS_NOT_APPLIED: Policy.FAIL,
    Outcome.DATA_CHANGED: Policy.FAIL,
    Outcome.CHECKPOINT_UNUSABLE: Policy.FAIL,
    Outcome.INVALID_JOB: Policy.FAIL,
    Outcome.CODE_ERROR: Policy.FAIL,
}
assert set(POLICIES) == set(Outcome)

# Restarts that one host may spend; past it the job fails and names the last outcome.
RESTART_BUDGET = 10
# Seconds of training after which earlier restarts no longer count.
RESTART_WINDOW_S = 3600.0
# Exit statuses of `python -m trainer`, sysexits-like where there is a fit.
EXIT_CODES: dict[Outcome, int] = {
    outcome: 0 if policy is Policy.DONE else 75 if policy is Policy.RESTART else 1
    for outcome, policy in POLICIES.items()
}


@dataclass(frozen=True)
class AttemptResult:
    """How one attempt ended. attempt is 0 where it ended before it could claim a number."""

    attempt: int
    outcome: Outcome
    message: str
    step: int
    checkpoint_step: int | None = None

    @property
    def policy(self) -> Policy:
        """What follows from it."""
        return POLICIES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for Ray and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of to_dict."""
        return cls(**{**data, "outcome": Outcome(data["outcome"])})
