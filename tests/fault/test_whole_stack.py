"""kill -9 of every process of the stack, one after another, under one training job.

After each kill the job goes on by itself from its last committed checkpoint, and its final weights
are those of a job that nobody disturbed. The steps are drawn by a seed that is printed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from everstep import Client
from everstep.v1 import everstep_pb2 as pb
from tests.fault.seeds import drawn
from tests.integration.test_first_light import digests, objects
from tests.stack import (
    ROLES,
    SMALL_JOB,
    Stack,
    is_alive,
    running_stack,
    wait_for_an_empty_ray,
    wait_for_checkpoint,
    wait_for_state,
    wait_until,
)

STEPS = 300
STEP_S = 300.0  # for a step to come on a loaded machine
LONG = {**SMALL_JOB, "name": "long", "schedule": {"num_iterations": 100_000}}


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> dict[str, str]:
    """Digests of the final weights of a job that nobody disturbed."""
    with stack.client() as client:
        job = client.submit({**SMALL_JOB, "schedule": {"num_iterations": STEPS}}).job
        wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
    return digests(stack, job.id, STEPS)


def kill_host(stack: Stack) -> None:
    stack.ray_process("ray::AttemptHost").kill()


def kill_controller(stack: Stack) -> None:
    stack.ray_process("ray::TrainController").kill()


def kill_ray_head(stack: Stack) -> None:
    for process in stack.processes():
        if process.pid != stack.part_pid("seaweedfs") and is_alive(process):
            process.kill()


def kill_store(stack: Stack) -> None:
    """The store is gone for longer than one retry takes."""
    port = stack.wiring["seaweedfs"]["s3"][0]
    pid = stack.part_pid("seaweedfs")
    next(process for process in stack.processes() if process.pid == pid).kill()
    wait_until(lambda: _started_anew(stack, pid), 30, "another SeaweedFS")
    wait_until(lambda: _accepts(port), 30, "SeaweedFS on its old port")


def _started_anew(stack: Stack, old_pid: int) -> bool:
    try:
        return stack.part_pid("seaweedfs") != old_pid
    except FileNotFoundError:  # between the end of one and the start of the next
        return False


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


KILLS: list[tuple[Callable[[Stack], None], list[str]]] = [
    (kill_controller, ["CONTROLLER_LOST", "COMPLETED"]),
    (kill_host, ["HOST_LOST", "COMPLETED"]),
    (kill_ray_head, ["HOST_LOST", "COMPLETED"]),
    (kill_store, ["COMPLETED"]),  # storage trouble never stops training
]


@contextlib.contextmanager
def watched(client: Client, job_id: str) -> Iterator[list[pb.WatchJobResponse]]:
    """What a watcher sees of a job until its end, which comes before this one's."""
    seen: list[pb.WatchJobResponse] = []
    watching = threading.Thread(target=lambda: seen.extend(client.watch(job_id)), daemon=True)
    watching.start()
    yield seen
    watching.join(60)
    assert not watching.is_alive()


def wait_for_step(client: Client, job_id: str, step: int) -> None:
    wait_until(lambda: client.get(job_id).step >= step, STEP_S, f"step {step}")


def check_whole(stack: Stack, job: pb.Job, seen: list[pb.WatchJobResponse]) -> None:
    """Of an ended job: no record lost or doubled, one checkpoint a step, nothing left behind."""
    with stack.client() as client:
        again = list(client.watch(job.id))
        checkpoints = [each.ref.step for each in client.checkpoints(job.id)]
    assert [record.cursor for record in again] == list(range(1, len(again) + 1))
    assert seen == again, "what a watcher saw through all kills is the stream, each record once"
    assert len(checkpoints) == len(set(checkpoints))
    numbers = [attempt.number for attempt in job.attempts]
    assert numbers == sorted(set(numbers), reverse=True)
    wait_for_an_empty_ray(stack)
    spool = stack.state / "cache" / "spool" / job.id
    assert [path for path in spool.rglob("*") if path.is_file()] == []
    assert objects(stack, f"jobs/{job.id}/attempts/"), "claims stay"


@pytest.mark.parametrize(("kill", "outcomes"), KILLS, ids=[kill.__name__ for kill, _ in KILLS])
def test_a_job_survives(
    client: Client,
    stack: Stack,
    undisturbed: dict[str, str],
    kill: Callable[[Stack], None],
    outcomes: list[str],
) -> None:
    step = drawn(kill.__name__).randrange(40, STEPS - 60)
    print(f"at step {step}")
    job = client.submit({**SMALL_JOB, "schedule": {"num_iterations": STEPS}}).job
    with watched(client, job.id) as seen:
        wait_for_checkpoint(client, job.id, 40)
        wait_for_step(client, job.id, step)
        kill(stack)
        done = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
    assert [attempt.outcome for attempt in reversed(done.attempts)] == outcomes
    assert all(attempt.start_step % 20 == 0 for attempt in done.attempts)
    if len(outcomes) > 1:
        assert done.attempts[0].start_step >= 40
    assert digests(stack, job.id, STEPS) == undisturbed
    check_whole(stack, done, seen)


def test_nothing_of_a_killed_job_stays_in_ray(client: Client, stack: Stack) -> None:
    job = client.submit(LONG).job
    wait_for_checkpoint(client, job.id, 20)
    held = "\n".join(stack.ray_leftovers())
    assert all(word in held for word in ("actor host-", "group ", "CPU: ", *ROLES)), held
    client.cancel(job.id)
    wait_for_an_empty_ray(stack)


def test_stop_in_mid_job_and_start_again_loses_no_step(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_stack(tmp_path_factory.mktemp("stopped")) as stack:
        with stack.client() as client:
            job = client.submit(LONG).job
            wait_for_checkpoint(client, job.id, 20)
        before = stack.processes()
        stack.stop()
        deadline = time.monotonic() + 10
        while any(is_alive(process) for process in before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [process for process in before if is_alive(process)] == []
        assert stack.service is not None
        assert stack.service.returncode == 0
        stack.start()
        with stack.client() as client:
            running = wait_for_state(client, job.id, pb.JOB_STATE_RUNNING)
            newest, first = running.attempts
            assert first.outcome == "STOPPED"
            assert newest.start_step >= 20
            committed = wait_for_checkpoint(client, job.id, newest.start_step + 20)
            assert committed.attempts[0].start_step == newest.start_step
            client.cancel(job.id)


def test_a_second_service_on_the_same_state_is_refused(stack: Stack) -> None:
    second = Stack(stack.state)
    facts = (stack.state / "service.json").read_text()
    with pytest.raises(AssertionError, match="another service runs on"):
        second.start()
    (stack.state / "service.json").write_text(facts)  # start() removed it to wait for its own


def test_a_stopped_process_is_not_taken_for_dead(client: Client, stack: Stack) -> None:
    job = client.submit(LONG).job
    wait_for_checkpoint(client, job.id, 20)
    worker = stack.worker()
    worker.send_signal(signal.SIGSTOP)
    time.sleep(5)  # longer than several ticks: silence alone must not end it
    worker.send_signal(signal.SIGCONT)
    before = client.get(job.id).checkpoint.step
    wait_for_checkpoint(client, job.id, before + 20)
    assert [attempt.number for attempt in client.get(job.id).attempts] == [1]
    assert stack.worker().pid == worker.pid
    client.cancel(job.id)
