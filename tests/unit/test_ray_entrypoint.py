"""The host of a job's attempts without Ray: whose word counts, and what its workers are told."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray import exceptions
from ray.exceptions import RpcError

from trainer import ray_entrypoint
from trainer.contract.outcome import POLICIES, AttemptResult, Outcome, Policy
from trainer.ray_entrypoint import RAY_TRAIN_SETTINGS, AttemptHost, HostConfig, _backend

WAIT_S = 20.0
CONFIG: dict[str, Any] = {
    "job_id": "JOB1",
    "host_number": 1,
    "storage_uri": "file:/nowhere",
    "cache_dir": "/nowhere",
    "service_address": "127.0.0.1:1",
    "service_ca": None,
    "host_key": "KEY",
    "placement": ("node2", "node3"),
    "gpus_per_worker": 1,
    "cpus_per_worker": 1,
    "stall_floor_s": 300.0,
}


def remote(cause: Exception) -> Exception:
    """As Ray raises what a call to an actor raised."""
    return exceptions.RayTaskError("run", "traceback", cause).as_instanceof_cause()


Attempt = Callable[[AttemptHost], None]


def word(attempt: int, outcome: Outcome) -> dict[str, Any]:
    return AttemptResult(attempt, outcome, f"{outcome} of {attempt}", 5).to_dict()


def run(monkeypatch: pytest.MonkeyPatch, *attempts: Attempt) -> list[tuple[int, str]]:
    """How each attempt ended, by its host, when its workers say what is scripted."""
    for name in RAY_TRAIN_SETTINGS:
        monkeypatch.setenv(name, "")  # what the host sets is taken back at the end
    made: list[AttemptHost] = []
    left = list(attempts)

    def fit(_config: HostConfig) -> None:
        while not made:
            time.sleep(0.001)
        left.pop(0)(made[0])

    monkeypatch.setattr(ray_entrypoint, "_fit", fit)
    made.append(AttemptHost(CONFIG))
    made[0]._thread.join(WAIT_S)
    assert made[0].status()["finished"]
    assert not left, "every scripted attempt ran"
    return [(each["attempt"], each["outcome"]) for each in made[0].status()["results"]]


def test_a_late_word_of_an_earlier_attempt_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(host: AttemptHost) -> None:
        host.attempt_claimed(3)
        host.attempt_ended(word(3, Outcome.STALLED))

    def second(host: AttemptHost) -> None:
        host.attempt_ended(word(3, Outcome.CODE_ERROR))  # before the next one is claimed
        host.attempt_claimed(4)
        host.attempt_ended(word(3, Outcome.CODE_ERROR))
        host.attempt_ended(word(4, Outcome.COLLECTIVE_FAILED))
        host.attempt_ended(word(3, Outcome.CODE_ERROR))
        host.attempt_ended(word(4, Outcome.COMPLETED))  # the cause, told later
        host.attempt_ended(word(4, Outcome.CODE_ERROR))

    assert run(monkeypatch, first, second) == [(3, "STALLED"), (4, "COMPLETED")]


def test_an_attempt_that_fails_before_it_claims_or_at_a_rank_that_has_not_heard_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unclaimed(host: AttemptHost) -> None:
        host.attempt_ended(word(0, Outcome.STORE_UNAVAILABLE))

    def claimed(host: AttemptHost) -> None:
        host.attempt_claimed(4)
        host.attempt_ended(word(0, Outcome.INVALID_JOB))

    assert run(monkeypatch, unclaimed, claimed) == [(0, "STORE_UNAVAILABLE"), (0, "INVALID_JOB")]


@pytest.mark.parametrize(
    ("claimed", "outcome", "said"),
    [(0, "STOPPED", "before training began"), (4, "WORKER_LOST", "without a word")],
)
def test_a_worker_that_is_lost_while_it_stops_is_not_said_to_have_stopped(
    monkeypatch: pytest.MonkeyPatch, claimed: int, outcome: str, said: str
) -> None:
    ended: list[AttemptHost] = []

    def killed(host: AttemptHost) -> None:
        host.attempt_claimed(claimed)
        host.stop()
        ended.append(host)

    assert run(monkeypatch, killed) == [(claimed, outcome)]
    assert said in ended[0].status()["results"][0]["message"]


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (RpcError("the head is away"), Outcome.CONTROLLER_LOST),
        (exceptions.LocalRayletDiedError(), Outcome.CONTROLLER_LOST),
        (exceptions.GetTimeoutError("no answer"), Outcome.CONTROLLER_LOST),
        (exceptions.OutOfDiskError("the box is full"), Outcome.CONTROLLER_LOST),
        (exceptions.ActorUnavailableError("gone", None), Outcome.CONTROLLER_LOST),
        (remote(RpcError("the head is away")), Outcome.CONTROLLER_LOST),
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.CONTROLLER_LOST),
        (remote(KeyError("a bug")), Outcome.CODE_ERROR),
        (KeyError("a bug"), Outcome.CODE_ERROR),
    ],
    ids=str,
)
def test_trouble_of_the_cluster_or_the_box_is_no_error_of_the_code(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, outcome: Outcome
) -> None:
    def fails(_host: AttemptHost) -> None:
        raise failure

    def ends(host: AttemptHost) -> None:
        host.attempt_ended(word(0, Outcome.COMPLETED))

    then = [ends] if POLICIES[outcome] is Policy.RESTART else []
    assert run(monkeypatch, fails, *then)[0] == (0, outcome)


def test_ray_train_hands_on_what_it_is_told_and_takes_no_silent_worker_for_dead() -> None:
    from ray.train.v2._internal import constants

    assert set(RAY_TRAIN_SETTINGS) <= constants.ENV_VARS_TO_PROPAGATE
    silence_s = float(RAY_TRAIN_SETTINGS[constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR])
    assert silence_s > 100 * constants.DEFAULT_WORKER_HEALTH_CHECK_TIMEOUT_S


def node(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Resources": {"CPU": 8.0, **resources}}


CARDS = {"GPU": 2.0, "accelerator_type:H100": 1.0}
LOGICAL = {"GPU": 2.0}


@pytest.mark.parametrize(
    ("second", "third", "backend"),
    [(CARDS, CARDS, "nccl"), (CARDS, LOGICAL, "gloo"), (LOGICAL, LOGICAL, "gloo")],
)
def test_ranks_speak_nccl_where_all_their_own_nodes_have_cards(
    caplog: pytest.LogCaptureFixture,
    second: dict[str, float],
    third: dict[str, float],
    backend: str,
) -> None:
    nodes = [node("node1"), node("node2", **second), node("node3", **third)]  # the head has none
    caplog.set_level(logging.INFO, "trainer")
    assert _backend(HostConfig(**CONFIG), nodes) == backend
    (said,) = caplog.messages
    assert backend in said
    assert ("node3" in said) == (backend == "gloo"), "the reason is told by name"


def test_what_ray_does_not_tell_of_speaks_gloo_and_so_do_workers_without_gpus() -> None:
    assert _backend(HostConfig(**CONFIG), [node("node2", **CARDS)]) == "gloo"
    both = [node("node2", **CARDS), node("node3", **CARDS)]
    assert _backend(HostConfig(**{**CONFIG, "gpus_per_worker": 0}), both) == "gloo"
