"""Pause and resume with real Ray: while queued, starting and running, and what each answers."""

from __future__ import annotations

import urllib.request

import pytest

from everstep import Client
from everstep.errors import EverstepError
from everstep.v1 import everstep_pb2 as pb
from tests.integration.test_first_light import digests
from tests.stack import SMALL_JOB, Stack, wait_for_checkpoint, wait_for_state, wait_until

STEPS = 200
SPEC = {**SMALL_JOB, "schedule": {"num_iterations": STEPS}}


def outcomes(job: pb.Job) -> list[tuple[int, str]]:
    """Where each attempt started and how it ended, oldest first."""
    return [(attempt.start_step, attempt.outcome) for attempt in reversed(job.attempts)]


def seconds_of(job: pb.Job) -> float:
    """All kinds together."""
    return sum(value for field, value in job.goodput.ListFields() if field.name.endswith("_s"))


def lived(job: pb.Job) -> float:
    """From submission to the end."""
    return job.end_time.ToNanoseconds() / 1e9 - job.create_time.ToNanoseconds() / 1e9


def test_a_job_paused_in_every_state_and_over_a_crash_ends_as_the_undisturbed_one(
    client: Client, stack: Stack
) -> None:
    """One job all along: every attempt costs the start of a worker."""
    whole = client.submit({**SPEC, "name": "whole"}).job
    queued = client.submit({**SPEC, "name": "queued"}).job  # the one before holds all CPUs
    assert client.get(queued.id).state == pb.JOB_STATE_QUEUED
    answer = client.pause(queued.id)
    assert answer.job.state == pb.JOB_STATE_PAUSED
    assert not answer.final_checkpoint.HasField("checkpoint")
    assert answer.final_checkpoint.reason.startswith("no step was checkpointed: paused while")
    assert client.pause(queued.id).job.state == pb.JOB_STATE_PAUSED, "pausing twice is safe"
    wait_for_state(client, whole.id, pb.JOB_STATE_SUCCEEDED)
    assert client.get(queued.id).state == pb.JOB_STATE_PAUSED, "its turn came while it was paused"

    assert client.resume(queued.id).state in (pb.JOB_STATE_PAUSED, pb.JOB_STATE_QUEUED)
    wait_for_state(client, queued.id, pb.JOB_STATE_STARTING)
    answer = client.pause(queued.id)
    assert answer.job.state == pb.JOB_STATE_PAUSED
    assert not answer.job.HasField("checkpoint") or answer.final_checkpoint.HasField("checkpoint")

    client.resume(queued.id)
    wait_for_checkpoint(client, queued.id, 40)
    answer = client.pause(queued.id)
    assert answer.job.state == pb.JOB_STATE_PAUSED
    stopped_at = answer.final_checkpoint.checkpoint.step
    assert stopped_at == answer.job.step >= 40
    assert len(answer.final_checkpoint.manifest_sha256) == 64

    stack.kill_service()
    stack.start()
    with stack.client() as again:
        assert again.get(queued.id).state == pb.JOB_STATE_PAUSED, "also for the next service"
        again.resume(queued.id)
        twice = again.resume(queued.id)
        assert twice.desired_state == pb.JOB_STATE_RUNNING, "resuming twice is safe"
        done = wait_for_state(again, queued.id, pb.JOB_STATE_SUCCEEDED)
        before = again.get(whole.id)
        tokens = f'everstep_tokens_total{{job_id="{done.id}",job_name="queued"}}'
        trained = f"{tokens} {float(STEPS * done.spec.batch.total_batch_size)}"
        url = stack.facts["metrics_url"]
        wait_until(lambda: trained in urllib.request.urlopen(url).read().decode(), 10, trained)
    assert outcomes(done)[-1] == (stopped_at, "COMPLETED")
    assert {outcome for _, outcome in outcomes(done)[:-1]} == {"STOPPED"}
    assert digests(stack, queued.id, STEPS) == digests(stack, whole.id, STEPS)
    # Every second of it, over three attempts, two services and two pauses.
    goodput = done.goodput
    for job in (done, before):
        assert seconds_of(job) == pytest.approx(lived(job), abs=2e-6)
    assert min(goodput.queue_s, goodput.wait_s, goodput.start_s, goodput.productive_s) > 0
    assert goodput.recompute_s == 0, "a job that is paused loses no step"


def test_what_can_not_be_paused_or_resumed_says_why(client: Client) -> None:
    job = client.submit(SPEC).job
    assert client.cancel(job.id).job.state == pb.JOB_STATE_CANCELLED
    for call in (client.pause, client.resume):
        with pytest.raises(EverstepError, match="nothing to change"):
            call(job.id)
    with pytest.raises(EverstepError, match="no job"):
        client.pause("01NOBODY")
