"""One checkpoint by its name: what the name means, and whether it may be deleted.

Synchronous, over a repository; storage.py runs it in threads. Knows no job's state.

Invariant: what is deleted was no job's start, held by nobody and not among the last two, also
where somebody takes it up at the same moment: whoever comes first wins, and the other is told.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from service.errors import (
    CheckpointNeededError,
    CheckpointNotFoundError,
    InvalidRequestError,
)
from trainer.storage import layout
from trainer.storage.manifest import CheckpointRef
from trainer.storage.repository import CheckpointRepository, select_current
from trainer.storage.retention import ALWAYS_KEPT, delete_checkpoint

LATEST = "latest"
SHOWN_STEPS = 10
SHOWN_CHARS = 120  # a wrong name is quoted up to here
_NAME = re.compile(r"([0-9A-Za-z]{1,64})@(latest|[0-9]{1,10})")


class CheckpointName(NamedTuple):
    """JOB@STEP; step None: the latest."""

    job_id: str
    step: int | None

    @classmethod
    def parse(cls, name: str) -> CheckpointName:
        """InvalidRequestError where it isn't one."""
        match = _NAME.fullmatch(name)
        if match is None:
            shown = repr(name[:SHOWN_CHARS])
            raise InvalidRequestError(f"checkpoint: {shown}: must be JOB@STEP or JOB@{LATEST}")
        return cls(match[1], None if match[2] == LATEST else int(match[2]))


def find(repository: CheckpointRepository, step: int | None) -> CheckpointRef:
    """The current checkpoint at a step, or the newest; CheckpointNotFoundError."""
    return _find(repository.current(), repository.job_id, step)


def choose(current: list[CheckpointRef], step: int | None) -> CheckpointRef | None:
    """Of a job's current checkpoints, newest first, the one at a step, or the newest."""
    return next((ref for ref in current if step is None or ref.step == step), None)


def shown_steps(current: list[CheckpointRef]) -> str:
    """The newest steps that there are, for a message."""
    return ", ".join(str(ref.step) for ref in current[:SHOWN_STEPS]) or "none"


def delete(repository: CheckpointRepository, step: int | None) -> None:
    """Delete the current checkpoint at a step. Safe to repeat after a crash.

    Two attempts may have committed at one step: then both go, or the older would take its place.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointNeededError: somebody depends on it; says who.
    """
    committed = repository.committed()
    claims = repository.claims()
    current = select_current(committed, claims)
    ref = _find(current, repository.job_id, step)
    if ref in current[:ALWAYS_KEPT]:
        raise CheckpointNeededError(
            f"{ref} is among the last {ALWAYS_KEPT} checkpoints of its job, which stay: "
            "one to resume from, one to fall back to"
        )
    doomed = [r for r in committed if r.step == ref.step and select_current([r], claims)]
    for each in doomed:
        _check_needed(repository, each)
    for each in doomed:
        if not delete_checkpoint(repository, each):
            _check_needed(repository, each)  # since the first look: says by whom


def _check_needed(repository: CheckpointRepository, ref: CheckpointRef) -> None:
    claims = repository.claims()
    if claims and claims[-1].start == ref:
        raise CheckpointNeededError(
            f"{ref} is where attempt {claims[-1].attempt}, its job's newest, starts"
        )
    prefix = layout.checkpoint_prefix(ref.job_id, ref.step, ref.attempt)
    holds = (layout.parse_hold(info.key) for info in repository.store.list(prefix))
    holders = [hold.file for hold in holds if hold is not None]
    if holders:
        raise CheckpointNeededError(f"{ref} is where job {', '.join(holders)} starts")


def _find(current: list[CheckpointRef], job_id: str, step: int | None) -> CheckpointRef:
    ref = choose(current, step)
    if ref is None:
        wanted = LATEST if step is None else step
        there = shown_steps(current)
        raise CheckpointNotFoundError(
            f"no checkpoint {job_id}@{wanted}; there are at steps: {there}"
        )
    return ref
