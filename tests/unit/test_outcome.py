"""How attempts end: every outcome has a policy, an exit status and a plain form."""

import json

import pytest

from trainer.contract.outcome import EXIT_CODES, POLICIES, AttemptResult, Outcome, Policy

FATAL = {
    Outcome.OUT_OF_MEMORY,
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
