"""How attempts end: every outcome has a policy, an exit status and a plain form."""

import json

import pytest

from trainer.contract.outcome import (
    BACKOFF_S,
    EXIT_CODES,
    GOOD_STRETCH_S,
    POLICIES,
    RESTART_BUDGET,
    RESTART_WINDOW_S,
    AttemptResult,
    Outcome,
    Policy,
    counts,
    pause_before_restart,
)
from trainer.start import START_BUDGET_S

FATAL = {
    Outcome.OUT_OF_MEMORY_AT_ONE_ROW,
    Outcome.NOT_FINITE,
    Outcome.HYPERPARAMETERS_NOT_APPLIED,
    Outcome.DATA_CHANGED,
    Outcome.CHECKPOINT_UNUSABLE,
    Outcome.INVALID_JOB,
    Outcome.CODE_ERROR,
}


def test_only_what_would_end_the_same_way_again_fails_a_job() -> None:
    assert {outcome for outcome, policy in POLICIES.items() if policy is Policy.FAIL} == FATAL
    done = {outcome for outcome, policy in POLICIES.items() if policy is Policy.DONE}
    assert done == {Outcome.COMPLETED, Outcome.STOPPED}


@pytest.mark.parametrize("outcome", Outcome)
def test_a_result_survives_json_and_says_what_follows(outcome: Outcome) -> None:
    result = AttemptResult(3, outcome, "why", 17, checkpoint_step=12)
    again = AttemptResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result
    assert isinstance(again.outcome, Outcome)
    assert again.policy is POLICIES[outcome]
    assert EXIT_CODES[outcome] == {"DONE": 0, "RESTART": 75, "FAIL": 1}[again.policy]


def test_an_outcome_that_nobody_knows_is_no_result() -> None:
    with pytest.raises(ValueError, match="LOST_INTEREST"):
        AttemptResult.from_dict({"attempt": 1, "outcome": "LOST_INTEREST"})


def test_halving_the_batch_is_not_paid_from_the_budget_of_restarts() -> None:
    assert {outcome for outcome in Outcome if counts(outcome)} == {
        outcome
        for outcome, policy in POLICIES.items()
        if policy is Policy.RESTART and outcome is not Outcome.OUT_OF_MEMORY
    }
    assert AttemptResult(1, Outcome.WORKER_LOST, "", 0).counts


def test_restarts_in_a_row_wait_longer_each_time_up_to_a_bound() -> None:
    ends = [float(second) for second in range(RESTART_BUDGET)]
    pauses = [pause_before_restart(ends[:count]) for count in range(1, len(ends) + 1)]
    assert pauses == [*BACKOFF_S, *[BACKOFF_S[-1]] * (len(ends) - len(BACKOFF_S))]


def test_a_good_stretch_begins_the_pauses_anew() -> None:
    assert pause_before_restart([0.0, 1.0, 2.0]) == BACKOFF_S[2]
    assert pause_before_restart([0.0, 1.0, 2.0, 2.0 + GOOD_STRETCH_S]) == BACKOFF_S[0]
    well = 2.0 + GOOD_STRETCH_S
    assert pause_before_restart([0.0, 1.0, 2.0, well, well + 1]) == BACKOFF_S[1]


def test_a_store_that_is_away_for_a_day_never_spends_the_budget() -> None:
    """Training goes on without it: an attempt that happens to start then must not end the job."""
    ends, now = [], 0.0
    while now < 24 * 3600.0:
        now += START_BUDGET_S  # an attempt waits so long for it
        ends.append(now)
        pause_s = pause_before_restart(ends)
        assert pause_s is not None, f"failed after {now:.0f} s"
        now += pause_s


def test_only_the_restarts_of_the_window_count_in_whatever_order_they_are_told() -> None:
    quick = [float(second) for second in range(RESTART_BUDGET)]
    assert pause_before_restart([*quick, 100.0]) is None
    assert pause_before_restart([100.0, *quick]) is None
    assert pause_before_restart([*quick, RESTART_WINDOW_S]) == BACKOFF_S[0]
    every_hour = [RESTART_WINDOW_S * n for n in range(1000)]
    assert pause_before_restart(every_hour) == BACKOFF_S[0]
    assert pause_before_restart([]) == BACKOFF_S[0]
