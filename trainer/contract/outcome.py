"""How an attempt can end, and what follows from it, and how often.

The trainer names the outcome, the host on Ray and the service act on its policy; the table below is
the only place where the two meet. Adding an outcome without a policy fails at import.

Invariant: `pause_before_restart` alone says whether and when a job is tried again. A host asks it
about the ends that the service recorded before and its own; of its own those that no attempt had
claimed a number for are unknown to the service, and to the host after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self


class Outcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "COMPLETED"  # reached the horizon
    STOPPED = "STOPPED"  # asked to stop, and did so with a checkpoint
    WORKER_LOST = "WORKER_LOST"  # a worker died without a word, or its GPU failed it
    CONTROLLER_LOST = "CONTROLLER_LOST"  # Ray's controller of the run died
    HOST_LOST = "HOST_LOST"  # the host of the attempt is gone, or the whole cluster was
    COLLECTIVE_FAILED = "COLLECTIVE_FAILED"  # NCCL or gloo: a rank or the network between is gone
    START_TIMEOUT = "START_TIMEOUT"  # the workers did not get their resources in time
    STALE_WRITER = "STALE_WRITER"  # a newer attempt holds the claim
    # Storage could not be reached at the start or for the last checkpoint, or the data for an hour.
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    STALLED = "STALLED"  # no step for many times the attempt's own median step
    OUT_OF_MEMORY = "OUT_OF_MEMORY"  # noted in the bucket: the next one takes half the device batch
    OUT_OF_MEMORY_AT_ONE_ROW = "OUT_OF_MEMORY_AT_ONE_ROW"  # there is no smaller device batch
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
    Outcome.COLLECTIVE_FAILED: Policy.RESTART,
    Outcome.START_TIMEOUT: Policy.RESTART,
    Outcome.STALE_WRITER: Policy.RESTART,
    Outcome.STORE_UNAVAILABLE: Policy.RESTART,
    Outcome.STALLED: Policy.RESTART,
    Outcome.OUT_OF_MEMORY: Policy.RESTART,
    Outcome.OUT_OF_MEMORY_AT_ONE_ROW: Policy.FAIL,
    Outcome.NOT_FINITE: Policy.FAIL,
    Outcome.HYPERPARAMETERS_NOT_APPLIED: Policy.FAIL,
    Outcome.DATA_CHANGED: Policy.FAIL,
    Outcome.CHECKPOINT_UNUSABLE: Policy.FAIL,
    Outcome.INVALID_JOB: Policy.FAIL,
    Outcome.CODE_ERROR: Policy.FAIL,
}
assert set(POLICIES) == set(Outcome)

# Restarts within a window; past them the job fails and names the last outcome.
RESTART_BUDGET = 10
RESTART_WINDOW_S = 3600.0
# An attempt that lived as long was well: the pauses begin anew after it.
GOOD_STRETCH_S = 600.0
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 30.0, 60.0)  # before the first, second, ... restart in a row
# How long an attempt waits for its last checkpoint's way to the store: one that ends well or was
# told to stop, then one that failed. Whoever ends attempts by force must leave them both.
FINAL_SAVE_S = 300.0
FAILED_SAVE_S = 60.0
# Exit statuses of `python -m trainer`, sysexits-like where there is a fit.
EXIT_CODES: dict[Outcome, int] = {
    outcome: 0 if policy is Policy.DONE else 75 if policy is Policy.RESTART else 1
    for outcome, policy in POLICIES.items()
}


def pause_before_restart(ends: Iterable[float]) -> float | None:
    """Seconds to wait before the next attempt; None: the budget is spent.

    Args:
        ends: when attempts that may be followed by another one ended, in seconds of one clock, on
            whichever host; the latest is the one that asks. Those that ran out of memory stay out:
            halving ends by itself.
    """
    latest_first = sorted(ends, reverse=True)
    recent = [end for end in latest_first if latest_first[0] - end < RESTART_WINDOW_S]
    if len(recent) > RESTART_BUDGET:
        return None
    in_a_row = 0
    for later, earlier in pairwise(recent):
        if later - earlier >= GOOD_STRETCH_S:
            break
        in_a_row += 1
    return BACKOFF_S[min(in_a_row, len(BACKOFF_S) - 1)]


def counts(outcome: Outcome) -> bool:
    """Whether a restart after such an end is paid from the budget."""
    return POLICIES[outcome] is Policy.RESTART and outcome is not Outcome.OUT_OF_MEMORY


@dataclass(frozen=True)
class AttemptResult:
    """How one attempt ended. attempt is 0 where it ended before it could claim a number.

    ended_at: seconds since the epoch, by its host's clock; 0 where nobody noted it.
    """

    attempt: int
    outcome: Outcome
    message: str
    step: int
    checkpoint_step: int | None = None
    ended_at: float = 0.0

    @property
    def policy(self) -> Policy:
        """What follows from it."""
        return POLICIES[self.outcome]

    @property
    def counts(self) -> bool:
        """Whether what follows is paid from the budget of restarts."""
        return counts(self.outcome)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for Ray and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of to_dict, but that any message can be kept: not all names are UTF-8."""
        outcome = Outcome(data["outcome"])
        message = data["message"].encode(errors="replace").decode()
        return cls(**{**data, "outcome": outcome, "message": message})
