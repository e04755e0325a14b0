"""What the reconciler remembers of attempts: when each was heard of, and when its stop was asked.

Kept in memory, by a clock that only goes forward. What must outlive the service is in the job:
when its user asked for a stop.

Invariant: a stop's grace counts from when it was asked, whichever service heard it; but an attempt
is given the time to find a service that has just begun, and where it does, to hear and save.
"""

from __future__ import annotations

import time

from service.jobs import Job
from trainer.contract.outcome import FAILED_SAVE_S, FINAL_SAVE_S

STOP_GRACE_S = 120.0  # without a word from the attempt, from a stop's request to the hard stop
SAVE_S = FINAL_SAVE_S + FAILED_SAVE_S  # more, for one that reports: its last checkpoint's way
FROZEN_S = 60.0  # between two looks: this process was stopped, its disk or its machine stood still
HEARD_S = 5.0  # an attempt that reported so lately is alive; it does so twice a second


class Signs:
    """Times are of time.monotonic, by the job's id."""

    def __init__(self, stop_grace_s: float = STOP_GRACE_S) -> None:
        self.stop_grace_s = stop_grace_s
        self.began = self.looked = time.monotonic()
        self.heard: dict[str, float] = {}
        self.asked: dict[str, float] = {}
        self.told: set[str] = set()  # whose host has heard of the stop

    def look(self) -> None:
        """A tick. After one that came too late, attempts may have to find this service again."""
        before, self.looked = self.looked, time.monotonic()
        if self.looked - before > FROZEN_S:
            self.began = self.looked
            self.heard.clear()

    def hear(self, job_id: str) -> None:
        """Its attempt reports."""
        self.heard[job_id] = time.monotonic()

    def heard_lately(self, job_id: str) -> bool:
        """Whether its attempt is taken for alive, whatever the cluster says."""
        now, heard = time.monotonic(), self.heard.get(job_id)
        if heard is None:  # an attempt that outlived the last service may not have found this one
            return now - self.began < 2 * HEARD_S
        return now - heard < HEARD_S

    def ask(self, job: Job) -> bool:
        """A stop is wanted; whether that is news."""
        if job.id in self.asked:
            return False
        since = time.time() if job.stop_asked_at is None else job.stop_asked_at
        self.asked[job.id] = time.monotonic() - max(time.time() - since, 0.0)
        return True

    def overdue(self, job: Job) -> str:
        """Why a stop that was asked for needs force by now; empty: it doesn't."""
        now, asked = time.monotonic(), self.asked[job.id]
        heard = max(asked, self.heard.get(job.id, asked))
        silent = now - heard > self.stop_grace_s and not self.heard_lately(job.id)
        # One that reports may have heard of the stop only from this service.
        up = now - self.began > self.stop_grace_s
        late = up and now - asked > self.stop_grace_s + SAVE_S
        if not silent and not late:
            return ""
        last = f"last heard of {now - heard:.0f} s ago"
        return f"stopped by force {now - asked:.0f} s after it was asked to, {last}"

    def forget_stop(self, job_id: str) -> None:
        """It was taken back, or is done: the next one has its own grace."""
        self.asked.pop(job_id, None)
        self.told.discard(job_id)

    def forget(self, job_id: str) -> None:
        """The job is final."""
        self.heard.pop(job_id, None)
        self.forget_stop(job_id)
