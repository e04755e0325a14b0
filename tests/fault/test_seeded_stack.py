"""kill -9 of any process of the stack at random steps of one job, by a seed that is printed.

For `make chaos` (EVERSTEP_CHAOS_ROUNDS jobs of KILLS each); test_whole_stack.py kills each of them
once. The final weights, the watch stream and what is left behind are checked.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from everstep.v1 import everstep_pb2 as pb
from tests.fault.seeds import drawn
from tests.fault.test_whole_stack import (
    STEPS,
    kill_controller,
    kill_host,
    kill_ray_head,
    kill_store,
    undisturbed,
)
from tests.integration.test_first_light import digests, objects
from tests.stack import SMALL_JOB, Stack, wait_for_state, wait_until

__all__ = ["undisturbed"]
ROUNDS = int(os.environ.get("EVERSTEP_CHAOS_ROUNDS", "1"))
KILLS = 3
STEP_S = 300.0  # for a step to come on a loaded machine


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
        seen: list[pb.WatchJobResponse] = []
        watching = threading.Thread(target=lambda: seen.extend(client.watch(job.id)), daemon=True)
        watching.start()
        for kill, step in zip(victims, steps, strict=True):
            wait_until(lambda step=step: client.get(job.id).step >= step, STEP_S, f"step {step}")
            wait_until(lambda kill=kill: killed(stack, kill), STEP_S, f"{kill.__name__}")
        done = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
        watching.join(60)
        assert not watching.is_alive()
        again = list(client.watch(job.id))
        checkpoints = [ref.ref.step for ref in client.checkpoints(job.id)]
    assert digests(stack, job.id, STEPS) == undisturbed
    assert [record.cursor for record in again] == list(range(1, len(again) + 1))
    assert seen == again, "what a watcher saw through all kills is the stream, each record once"
    assert len(checkpoints) == len(set(checkpoints))
    starts = [attempt.number for attempt in done.attempts]
    assert starts == sorted(set(starts), reverse=True)
    nothing_left(stack, job.id)


def nothing_left(stack: Stack, job_id: str) -> None:
    """No process of the job's, and no checkpoint on its way."""
    names = ("ray::AttemptHost", "ray::TrainController", "ray::RayTrainWorker")
    deadline = time.monotonic() + 60
    while left := [title for title in stack.titles() if title.startswith(names)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    spool = stack.state / "cache" / "spool" / job_id
    assert [path for path in spool.rglob("*") if path.is_file()] == []
    assert objects(stack, f"jobs/{job_id}/attempts/"), "claims stay"
