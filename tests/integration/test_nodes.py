"""Two real Ray nodes on one machine: which may be used, what is where, and one that is drained."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from everstep import Client
from everstep.errors import ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from service.parts import plain_environment
from service.standalone import RAY_IP, Wiring
from tests.stack import (
    SMALL_JOB,
    Stack,
    running_stack,
    wait_for_checkpoint,
    wait_for_state,
    wait_until,
)
from trainer.contract.build import PREFIX, labels

SECOND = "127.0.0.3"
JOINED_S = 90.0
ENDLESS = {**SMALL_JOB, "schedule": {"num_iterations": 1_000_000}, "evaluate": {"every": 0}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose one node holds one job."""
    with running_stack(tmp_path_factory.mktemp("nodes"), ray_cpus=2) as stack:
        yield stack


@contextlib.contextmanager
def second_node(stack: Stack, runs: dict[str, str]) -> Iterator[None]:
    """A further box, as its container starts it, with labels of what it runs."""
    told = ",".join(f"{name}={value}" for name, value in runs.items())
    arguments = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        f"--address={RAY_IP}:{stack.wiring['ray_gcs_port']}",
        f"--node-ip-address={SECOND}",
        "--num-cpus=2",
        "--num-gpus=0",
        f"--labels={told}",
        "--object-store-memory=80000000",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]
    environment = {
        **plain_environment(),
        **Wiring.load(stack.state / "parts" / "wiring.json").s3_environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(stack.state / "parts" / "ray.token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (stack.state / "second-node.log").open("ab") as log:
        node = subprocess.Popen(
            arguments, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def node_at(client: Client, address: str) -> pb.Node | None:
    """None, too, while a service that has just started doesn't know Ray's nodes yet."""
    with contextlib.suppress(ServiceUnreachableError):
        return next((node for node in client.cluster().nodes if node.address == address), None)
    return None


def test_a_node_with_another_torch_is_kept_out_and_says_why(small: Stack) -> None:
    other = {**labels(), f"{PREFIX}torch": "1.0.0"}
    with small.client() as client, second_node(small, other):
        joined = wait_until(lambda: node_at(client, SECOND), JOINED_S, "the node to join")
        assert joined.unused_because.startswith("it runs torch 1.0.0 instead of")
        with pytest.raises(Exception, match="the cluster has 2"):
            client.submit({**SMALL_JOB, "resources": {"gpus_per_worker": 0, "cpus_per_worker": 4}})
    with small.client() as client:
        wait_until(lambda: node_at(client, SECOND) is None, JOINED_S, "the node to be gone")


def test_a_drained_node_loses_its_job_but_no_step_and_gets_none_until_it_is_undone(
    small: Stack,
) -> None:
    with small.client() as client, second_node(small, labels()):
        wait_until(lambda: node_at(client, SECOND), JOINED_S, "the node to join")
        jobs = [client.submit({**ENDLESS, "name": name}).job for name in ("one", "two")]
        for job in jobs:
            wait_for_checkpoint(client, job.id, 20)
        nodes = {node.address: node for node in client.cluster().nodes}
        assert {address: node.cpus_free for address, node in nodes.items()} == {
            RAY_IP: 0,
            SECOND: 0,
        }
        (moved,) = nodes[SECOND].job_ids
        (stays,) = nodes[RAY_IP].job_ids
        assert {moved, stays} == {job.id for job in jobs}

        assert list(client.drain(SECOND)) == [moved]
        there = node_at(client, SECOND)
        assert there is not None
        assert (list(there.job_ids), there.unused_because) == ([], "drained by admin")
        left = wait_for_state(client, moved, pb.JOB_STATE_QUEUED)
        stopped_at = left.checkpoint.step
        assert left.step == stopped_at >= 20, "it stopped with a checkpoint"

        small.kill_service()  # and the next one still knows
        small.start()
        with small.client() as again:
            wait_until(lambda: node_at(again, SECOND), JOINED_S, "the cluster to be known")
            assert again.get(moved).state == pb.JOB_STATE_QUEUED, "nothing new is put there"
            again.cancel(stays)
            wait_for_checkpoint(again, moved, stopped_at + 20)
            assert again.get(moved).attempts[0].start_step == stopped_at
            here = node_at(again, RAY_IP)
            assert here is not None
            assert list(here.job_ids) == [moved]
            done = again.cancel(moved).job
            assert done.goodput.recompute_s == 0, "not one step was trained twice"

            again.drain(SECOND, undo=True)
            free = [again.submit({**ENDLESS, "name": name}).job for name in ("three", "four")]
            for job in free:
                wait_for_state(again, job.id, pb.JOB_STATE_RUNNING)
            for job in free:
                again.cancel(job.id)


def test_a_job_grows_onto_a_box_that_joins_and_goes_on_without_it_when_it_dies(
    small: Stack,
) -> None:
    workers = {"min": 1, "max": 2, "policy": "grow", "cooldown_s": 0}
    resources = {**SMALL_JOB["resources"], "workers": workers}

    def on(client: Client, job: pb.Job, number: int) -> pb.Job | None:
        """The job, where it trains on so many workers."""
        found = client.get(job.id)
        trains = found.state == pb.JOB_STATE_RUNNING and found.workers == number
        return found if trains else None

    with small.client() as client:
        job = client.submit({**ENDLESS, "resources": resources}).job
        wait_until(lambda: on(client, job, 1), JOINED_S, "its start on the one box")
        with second_node(small, labels()):
            grown = wait_until(lambda: on(client, job, 2), JOINED_S, "its growth")
            assert (grown.attempts[1].outcome, grown.goodput.recompute_s) == ("STOPPED", 0)
            assert {tuple(node.job_ids) for node in client.cluster().nodes} == {(job.id,)}
            reached = wait_for_checkpoint(client, job.id, grown.attempts[0].start_step + 20)
        left = wait_until(lambda: on(client, job, 1), JOINED_S, "its going on")
        assert left.attempts[0].start_step >= reached.checkpoint.step
        wait_for_checkpoint(client, job.id, left.attempts[0].start_step + 20)
        client.cancel(job.id)
        told = [r.event.message for r in client.watch(job.id) if "resized" in r.event.message]
        # Before that it may have met the box of the test before, which Ray takes a while to miss.
        assert [each.partition(":")[0] for each in told][-2:] == [
            "resized from 1 to 2 workers",
            "resized from 2 to 1 workers",
        ]
