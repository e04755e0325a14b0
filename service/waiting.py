"""Why queued jobs wait, and at which place: worked out for the jobs that somebody asks about. Pure.

A decision takes the same time whatever waits behind what is free; thousands of sentences that
nobody reads, and that change with every place, would not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property

from service.jobs import Job


def rank(job: Job) -> tuple[int, int]:
    """Before whom it comes: by priority, then submission."""
    return -job.spec.priority, job.submission


class Waiting(Mapping[str, str]):
    """By job id."""

    def __init__(
        self, queued: Sequence[Job], why: Callable[[Job], str], begun: Collection[str] = ()
    ) -> None:
        """queued: all that count for the places. begun: ids of those that don't wait any more."""
        self._queued, self._why, self._begun = queued, why, begun

    @cached_property
    def _places(self) -> dict[str, tuple[int, Job]]:
        order = enumerate(sorted(self._queued, key=rank), start=1)
        return {job.id: (place, job) for place, job in order if job.id not in self._begun}

    def __getitem__(self, job_id: str) -> str:
        place, job = self._places[job_id]
        return f"place {place} in the queue{self._why(job)}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
