"""kill -9 of any process of the stack at random steps of one job, by a seed that is printed.

For `make chaos` (EVERSTEP_CHAOS_ROUNDS jobs of KILLS each); test_whole_stack.py kills each of them
once. The final weights, the watch stream and what is left behind are checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from everstep.v1 import everstep_pb2 as pb
from tests.fault.seeds import drawn
from tests.fault.test_whole_stack import (
    STEP_S,
    STEPS,
    check_whole,
    kill_controller,
    kill_host,
    kill_ray_head,
    kill_store,
    undisturbed,
    wait_for_step,
    watched,
)
from tests.integration.test_first_light import digests
from tests.stack import SMALL_JOB, Stack, wait_for_state, wait_until

__all__ = ["undisturbed"]
ROUNDS = int(os.environ.get("EVERSTEP_CHAOS_ROUNDS", "1"))
KILLS = 3


def kill_worker(stack: Stack) -> None:
    stack.worker().kill()


def kill_service(stack: Stack) -> None:
    stack.kill_service()
    stack.start()


VICTIMS: list[Callable[[Stack], None]] = [
    kill_worker,
    kill_service,
    kill_controller,
    kill_host,
    kill_ray_head,
    kill_store,
]


def killed(stack: Stack, kill: Callable[[Stack], None]) -> bool:
    """Whether it could be: while a job recovers, some of the processes are not there."""
    try:
        kill(stack)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_kills_of_any_process_at_any_step(
    stack: Stack, undisturbed: dict[str, str], round_: int
) -> None:
    draw = drawn(f"round {round_}")
    victims = draw.sample(VICTIMS, KILLS)
    steps = sorted(draw.sample(range(5, STEPS - 40), KILLS))
    print(f"{[kill.__name__ for kill in victims]} at {steps}")
    with stack.client() as client:
        job = client.submit({**SMALL_JOB, "schedule": {"num_iterations": STEPS}}).job
        with watched(client, job.id) as seen:
            for kill, step in zip(victims, steps, strict=True):
                wait_for_step(client, job.id, step)
                wait_until(lambda kill=kill: killed(stack, kill), STEP_S, f"{kill.__name__}")
            done = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
    assert digests(stack, job.id, STEPS) == undisturbed
    check_whole(stack, done, seen)
