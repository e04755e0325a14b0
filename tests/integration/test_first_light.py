"""One job through the whole system, killed on the way, and continued with other learning rates.

Real gRPC, Ray Train, SeaweedFS and Prometheus. The tests run in order on one stack.
"""

from __future__ import annotations

import contextlib
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from everstep import Client
from everstep.v1 import everstep_pb2 as pb
from tests.servers import prometheus
from tests.stack import (
    SMALL_JOB,
    Stack,
    wait_for_checkpoint,
    wait_for_state,
    wait_until,
)
from trainer.contract.credential import AttemptIdentity, attempt_credential, host_key
from trainer.contract.scaling import param_groups
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec

STEPS = 300
SERVICE_MEMORY_BYTES = 300 << 20


@pytest.fixture(scope="module")
def disturbed(stack: Stack) -> Iterator[pb.Job]:
    """A job that lived through kill -9 of the service and of its worker, watched all along."""
    with stack.client() as client:
        spec = {**SMALL_JOB, "name": "disturbed", "schedule": {"num_iterations": STEPS}}
        job = client.submit(spec).job
        records: list[pb.WatchJobResponse] = []
        watcher = Thread(target=lambda: records.extend(client.watch(job.id)), daemon=True)
        watcher.start()
        wait_for_checkpoint(client, job.id, 40)
        worker = stack.worker()
        stack.kill_service()
        stack.start()
        assert stack.worker().pid == worker.pid, "the job was disturbed by the service's end"
        before = client.get(job.id).checkpoint.step
        wait_for_checkpoint(client, job.id, before + 20)
        assert [a.number for a in client.get(job.id).attempts] == [1]
        stack.worker().kill()
        wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
        watcher.join(30)
        assert not watcher.is_alive()
        check_stream(records)
        yield client.get(job.id)


def check_stream(records: list[pb.WatchJobResponse]) -> None:
    """The watch went on over the service's end: every record once, in order."""
    assert [record.cursor for record in records] == list(range(1, len(records) + 1))
    kinds = [record.event.kind for record in records if record.HasField("event")]
    assert kinds.count(pb.EVENT_KIND_ATTEMPT_STARTED) == 2
    assert kinds.count(pb.EVENT_KIND_ATTEMPT_ENDED) == 2
    assert records[-1].event.state == pb.JOB_STATE_SUCCEEDED
    steps = [record.point.step for record in records if record.HasField("point")]
    # What a killed trainer measured in its last half second dies with it where the checkpoint of
    # that step lives: the next attempt doesn't train it again.
    starts = [r.event.step for r in records if r.event.kind == pb.EVENT_KIND_ATTEMPT_STARTED]
    missing = set(range(1, STEPS + 1)) - set(steps)
    assert all(starts[-1] - 20 < step <= starts[-1] for step in missing)


def test_a_killed_worker_resumes_from_the_last_checkpoint(disturbed: pb.Job) -> None:
    second, first = disturbed.attempts
    assert (first.outcome, second.outcome) == ("WORKER_LOST", "COMPLETED")
    assert second.start_step >= 60
    assert second.start_step % SMALL_JOB["checkpoint"]["every_steps"] == 0
    assert disturbed.step == STEPS


def test_disturbed_and_undisturbed_weights_are_bit_identical(
    client: Client, stack: Stack, disturbed: pb.Job
) -> None:
    spec = {**SMALL_JOB, "name": "undisturbed", "schedule": {"num_iterations": STEPS}}
    other = client.submit(spec).job
    wait_for_state(client, other.id, pb.JOB_STATE_SUCCEEDED)
    assert digests(stack, disturbed.id, STEPS) == digests(stack, other.id, STEPS)


def test_logs_of_every_attempt_are_there_afterwards(client: Client, disturbed: pb.Job) -> None:
    lines = list(client.logs(disturbed.id))
    assert {line.attempt for line in lines} == {1, 2}
    first, second = ([x.line for x in lines if x.attempt == number] for number in (1, 2))
    assert any("attempt 1 at" in line for line in first)
    assert any("attempt 2 at" in line for line in second)
    assert any("step " in line for line in second)
    assert any(f"checkpoint {disturbed.id}@{STEPS} committed" in line for line in second[-5:])
    assert next(iter(client.logs(disturbed.id, attempt=2, rank=0))).line == second[0]
    assert list(client.logs(disturbed.id, rank=7)) == []


def test_checkpoints_are_in_s3_by_the_documented_keys(stack: Stack, disturbed: pb.Job) -> None:
    keys = {item["Key"] for item in objects(stack, f"jobs/{disturbed.id}/")}
    assert f"jobs/{disturbed.id}/spec.json" in keys
    assert {f"jobs/{disturbed.id}/attempts/{n}.json" for n in (1, 2)} <= keys
    folder = f"jobs/{disturbed.id}/checkpoints/{STEPS:010d}/2/"
    assert {f"{folder}manifest.json", f"{folder}part-00000-00000.safetensors"} <= keys


def test_a_continuation_trains_with_its_own_rates(client: Client, disturbed: pb.Job) -> None:
    rates = {
        "embedding_lr": 0.011,
        "unembedding_lr": 0.0004,
        "matrix_lr": 0.0013,
        "scalar_lr": 0.021,
        "smear_lr": 0.003,
        "weight_decay": 0.1,
    }
    changes = {
        "start": {"from": f"{disturbed.id}@{STEPS}"},
        "optimizer": rates,
        "schedule": {"num_iterations": STEPS + 30},
    }
    job = client.submit(changes, inherit=True).job
    job = wait_for_state(client, job.id, pb.JOB_STATE_SUCCEEDED)
    spec = JobSpec.parse(
        {**SMALL_JOB, "optimizer": rates, "schedule": {"num_iterations": STEPS + 30}}
    )
    wanted = {group.name: group.lr for group in param_groups(spec, ModelShape.of(spec.model, 768))}
    found = {values.group: values.learning_rate for values in job.in_force}
    assert found == pytest.approx(wanted, rel=1e-12, abs=0)
    before = {values.group: values.learning_rate for values in disturbed.in_force}
    assert all(found[group] != before[group] for group in wanted)
    assert job.start == pb.CheckpointRef(job_id=disturbed.id, step=STEPS, attempt=2)
    assert (job.attempts[0].start_step, job.step) == (STEPS, STEPS + 30)


def test_a_jump_above_the_rates_in_force_is_refused_before_it_runs(
    client: Client, disturbed: pb.Job
) -> None:
    changes = {
        "start": {"from": f"{disturbed.id}@latest"},
        "optimizer": {"matrix_lr": 1.0},
        "schedule": {"num_iterations": STEPS + 30},
    }
    plan = client.plan(changes, inherit=True)
    assert plan.refusals
    assert all("matrix_" in refusal and "50 times" in refusal for refusal in plan.refusals)


def test_a_cancelled_job_acknowledges_its_last_checkpoint_and_is_continued_to_the_bit(
    client: Client, stack: Stack
) -> None:
    spec = {**SMALL_JOB, "name": "cancelled", "schedule": {"num_iterations": STEPS}}
    job = client.submit(spec).job
    wait_for_checkpoint(client, job.id, 20)
    answer = client.cancel(job.id)
    assert answer.job.state == pb.JOB_STATE_CANCELLED
    last = answer.final_checkpoint
    assert last.checkpoint.step >= 20
    assert last.checkpoint.step == answer.job.step
    assert len(last.manifest_sha256) == 64
    assert client.checkpoints(job.id)[0].ref == last.checkpoint
    assert client.cancel(job.id).final_checkpoint == last, "cancelling twice is safe"
    same = client.submit({"start": {"from": f"{job.id}@latest"}}, inherit=True).job
    assert same.start == last.checkpoint
    wait_for_state(client, same.id, pb.JOB_STATE_SUCCEEDED)
    other = next(each for each in client.list() if each.spec.name == "undisturbed")
    assert digests(stack, same.id, STEPS) == digests(stack, other.id, STEPS)


def test_more_than_the_cluster_has_is_refused_with_field_value_and_bound(client: Client) -> None:
    spec = {**SMALL_JOB, "resources": {"gpus_per_worker": 1, "cpus_per_worker": 4096}}
    with pytest.raises(Exception, match=r"resources\.gpus_per_worker") as refused:
        client.plan(spec)
    text = str(refused.value)
    assert "needs 1 GPU, the cluster has 0" in text
    assert "resources.cpus_per_worker: 4096" in text


def test_the_service_stays_small(stack: Stack, disturbed: pb.Job) -> None:
    assert stack.service is not None
    assert disturbed.step == STEPS
    assert psutil.Process(stack.service.pid).memory_info().rss < SERVICE_MEMORY_BYTES


def test_a_real_prometheus_answers_what_a_user_asks(
    client: Client, stack: Stack, tmp_path: Path
) -> None:
    spec = {**SMALL_JOB, "name": "scraped", "schedule": {"num_iterations": 100_000}}
    job = client.submit(spec).job
    wait_for_checkpoint(client, job.id, 20)
    target = urllib.parse.urlsplit(stack.facts["metrics_url"]).netloc
    with prometheus(tmp_path, target) as ask:
        label = f'{{job_id="{job.id}",job_name="scraped"}}'
        loss = wait_until(lambda: ask(f"everstep_train_loss{label}"), 30, "a scrape")
        assert 0 < float(loss[0]["value"][1]) < 20
        rates = ask(f"everstep_learning_rate{label}")
        assert {rate["metric"]["group"] for rate in rates} == {v.group for v in job_rates(client)}
        assert float(ask(f"everstep_tokens_per_second{label}")[0]["value"][1]) > 0
        age = ask(f"time() - everstep_checkpoint_last_committed_timestamp_seconds{label}")
        assert 0 <= float(age[0]["value"][1]) < 120
        assert ask('everstep_jobs{state="running"}')[0]["value"][1] == "1"
        assert ask("everstep_cluster_up")[0]["value"][1] == "1"
    client.cancel(job.id)


def test_no_secret_is_in_any_log_event_metric_or_the_database(
    client: Client, stack: Stack, disturbed: pb.Job
) -> None:
    """What the jobs before left, searched for everything that opens a door."""
    jobs = [client.get(job.id) for job in client.list()]
    texts = {
        "metrics": urllib.request.urlopen(stack.facts["metrics_url"]).read(),
        **{f"the stream of {job.id}": stream(client, job.id) for job in jobs},
        **{f"argv of {each.pid}": argv(each) for each in stack.processes()},
        **{
            f"object {item['Key']}": body(stack, item["Key"])
            for item in objects(stack, "jobs/")
            if item["Key"].endswith((".json", ".jsonl"))
        },
    }
    scratch = Path(psutil.Process(stack.part_pid("ray")).environ()["TMPDIR"])
    files = [*stack.state.glob("everstep.db*"), *stack.state.rglob("*.log")]
    files += [path for path in scratch.rglob("logs/**/*") if path.is_file()]
    texts |= {str(path): path.read_bytes() for path in files}
    for expected in ("everstep.db", "service.log", "ray.log", "raylet", ".err", "logs/1/00000/"):
        assert any(expected in place for place in texts), expected
    known = disturbed.id.encode()
    assert sum(known in text for text in texts.values()) > 10, "the search finds what is there"
    for name, secret in secrets_of(stack, jobs).items():
        assert len(secret) >= 16, name
        where = [place for place, text in texts.items() if secret.encode() in text]
        assert where == [], f"{name} is in {where}"


def secrets_of(stack: Stack, jobs: list[pb.Job]) -> dict[str, str]:
    """All that a caller of the service, of Ray or of the store would need, by name."""
    wiring = stack.wiring
    names = ("s3_access_key", "s3_secret_key", "admin_token", "secret", "ray_token")
    found = {name: wiring[name] for name in names}
    for job in jobs:
        for host in range(1, 4):
            key = host_key(bytes.fromhex(wiring["secret"]), job.id, host)
            found[f"key of host {host} of {job.id}"] = key
            for attempt in job.attempts:
                identity = AttemptIdentity(job.id, host, attempt.number)
                found[f"credential of {identity}"] = attempt_credential(key, identity)
    return found


def stream(client: Client, job_id: str) -> bytes:
    """All that a watcher of an ended job gets."""
    return b"\n".join(record.SerializeToString() for record in client.watch(job_id))


def argv(process: psutil.Process) -> bytes:
    """What anybody on the machine sees of a process."""
    with contextlib.suppress(psutil.Error):
        return "\0".join(process.cmdline()).encode()
    return b""


def body(stack: Stack, key: str) -> bytes:
    """An object of the bucket."""
    found: bytes = stack.s3().get_object(Bucket="everstep", Key=key)["Body"].read()
    return found


def job_rates(client: Client) -> list[pb.GroupValues]:
    """The values in force of the newest job."""
    newest = next(iter(client.list()))
    return list(client.get(newest.id).in_force)


def digests(stack: Stack, job_id: str, step: int) -> dict[str, str]:
    """Name and SHA-256 of every part of a job's checkpoint at a step."""
    prefix = f"jobs/{job_id}/checkpoints/{step:010d}/"
    key = next(o["Key"] for o in objects(stack, prefix) if o["Key"].endswith("manifest.json"))
    body = stack.s3().get_object(Bucket="everstep", Key=key)["Body"].read()
    return {part["name"]: part["sha256"] for part in json.loads(body)["parts"]}


def objects(stack: Stack, prefix: str) -> list[dict[str, Any]]:
    """What lies in the bucket."""
    pages = stack.s3().get_paginator("list_objects_v2").paginate(Bucket="everstep", Prefix=prefix)
    return [item for page in pages for item in page.get("Contents", [])]
