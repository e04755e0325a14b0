"""The table of states, held against the one in the design."""

import itertools

import pytest

from service.jobs import IllegalTransitionError, Job
from trainer.contract.spec import JobSpec
from trainer.contract.states import ACTIVE, FINAL, TRANSITIONS, JobState, may_follow

# DESIGN.md, "The API": as it stands there.
DESIGN = {
    "QUEUED": "STARTING, CANCELLED, FAILED",
    "STARTING": "RUNNING, QUEUED, PAUSED, CANCELLED, FAILED",
    "RUNNING": "STARTING, QUEUED, PAUSED, SUCCEEDED, CANCELLED, FAILED",
    "PAUSED": "QUEUED, CANCELLED",
}
# Ours on top of it: a job set aside before it ever ran, and one brought back at its horizon.
ADDED = {("QUEUED", "PAUSED"), ("STARTING", "SUCCEEDED")}
ALL = list(itertools.product(JobState, JobState))


def job_in(state: JobState) -> Job:
    return Job("J", JobSpec.parse({}), None, "R", "0" * 64, 1.0, state=state)


def test_the_table_is_the_designs_with_two_transitions_of_ours() -> None:
    designed = {(old, new) for old, row in DESIGN.items() for new in row.split(", ")}
    ours = {(old.value, new.value) for old, row in TRANSITIONS.items() for new in row}
    assert ours == designed | ADDED


def test_every_state_has_its_row_and_final_states_lead_nowhere() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state in JobState if not TRANSITIONS[state]} == FINAL
    assert not ACTIVE & FINAL


@pytest.mark.parametrize(("old", "new"), ALL)
def test_a_job_moves_as_the_table_says_and_no_other_way(old: JobState, new: JobState) -> None:
    job = job_in(old)
    if not may_follow(old, new):
        with pytest.raises(IllegalTransitionError, match=f"{old} can't become {new}"):
            job.moved(new, "why", 7.0)
        return
    moved = job.moved(new, "why", 7.0)
    assert (moved.state, moved.reason) == (new, "why")
    assert moved.ended_at == (7.0 if new in FINAL else None)
    assert moved.started_at == (7.0 if new is JobState.RUNNING else None)


def test_the_first_start_is_kept_when_a_job_runs_again() -> None:
    job = job_in(JobState.STARTING).moved(JobState.RUNNING, "", 5.0)
    again = job.moved(JobState.STARTING, "", 6.0).moved(JobState.RUNNING, "", 8.0)
    assert again.started_at == 5.0
