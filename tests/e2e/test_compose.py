"""The stack of docker-compose.yml, in its CPU form, used and broken from outside.

One stack and one long job for all tests, in the order written: each leaves the job training.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep import Client
from everstep.errors import InvalidSpecError, ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from tests.e2e.box import Box, wait_for_checkpoint, wait_until

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
# Panels that a healthy run of one worker without a GPU has nothing for.
MAY_BE_EMPTY = (
    *("everstep_mfu_ratio", "everstep_gpu_", "ALERTS"),
    "everstep_rank_busy_seconds",
)
JOB: dict[str, Any] = {
    "name": "box",
    "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 64},
    "data": {"source": "builtin:python-docs", "tokenizer": "builtin:python-docs-512"},
    "batch": {"device_batch_size": 4, "total_batch_size": 256},
    "optimizer": {"smear_lr": 0.01},
    "schedule": {"num_iterations": 1_000_000},
    "evaluate": {"every": 100, "tokens": 1024},
    "sample": {"every": 0},
    "checkpoint": {"every_steps": 50, "every_s": 0},
    "resources": {"gpus_per_worker": 0, "cpus_per_worker": 1},
    "precision": {"compute": "fp32"},
}


@pytest.fixture
def client(box: Box) -> Iterator[Client]:
    with box.client() as client:
        yield client


@pytest.fixture(scope="module")
def job_id(box: Box) -> str:
    """A job that trains and has committed a checkpoint to SeaweedFS."""
    with box.client() as client:
        job_id = client.submit(JOB).job.id
        wait_for_checkpoint(client, job_id, 0)
    return job_id


def test_readmes_first_job_trains(box: Box) -> None:
    with box.client() as client:
        (first,) = client.list()
        assert first.spec.name == "first-light"
        wait_until(lambda: client.get(first.id).step > 0, "its first step")
        client.cancel(first.id)


def newest_attempt(job: pb.Job) -> pb.Attempt:
    return max(job.attempts, key=lambda attempt: attempt.number)


def test_only_loopback_is_published(box: Box, job_id: str) -> None:
    containers = box.compose("ps", "--quiet").split()
    described = json.loads(box.run("docker", "inspect", *containers))
    published = [
        binding["HostIp"]
        for container in described
        for bindings in container["HostConfig"]["PortBindings"].values()
        for binding in bindings
    ]
    assert set(published) == {"127.0.0.1"}


def test_secrets_are_the_owners_alone_and_not_in_the_image(box: Box) -> None:
    folder = box.clone / ".everstep/compose"
    assert folder.stat().st_mode & 0o077 == 0
    image = box.run("docker", "image", "inspect", "everstep:local")
    history = box.run("docker", "history", "--no-trunc", "everstep:local")
    for line in (folder / "service.env").read_text().split():
        assert line.split("=")[1] not in image + history
    assert json.loads(image)[0]["Config"]["User"] == "10001:10001"


def test_killed_service_leaves_the_job_training(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    box.kill("service")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts), "the job was in no need of the service"


def test_crashed_service_comes_back_by_itself(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    box.crash("service")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts)


def test_killed_head_costs_the_steps_since_the_last_checkpoint(
    box: Box, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    box.kill("ray-head")
    after = wait_for_checkpoint(client, job_id, client.get(job_id).step)
    assert len(after.attempts) > len(before.attempts)
    assert newest_attempt(after).start_step >= before.checkpoint.step


def test_killed_store_delays_checkpoints_only(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    box.kill("seaweedfs")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts), "storage trouble never stops training"


def test_prometheus_has_the_run_and_every_panel_shows_something(box: Box, job_id: str) -> None:
    def scraped() -> bool:
        return bool(box.query(f'everstep_validation_bits_per_byte{{job_id="{job_id}"}}'))

    wait_until(scraped, "the job's series in Prometheus")
    # The store was killed a moment ago: the last scrape may have missed it.
    wait_until(
        lambda: [sample["value"][1] for sample in box.query("up")] == ["1", "1"], "both targets"
    )
    assert {rule["health"] for rule in box.rules()} <= {"ok", "unknown"}
    firing = [rule["name"] for rule in box.rules() if rule.get("state") == "firing"]
    assert firing == []
    asked = sorted({each for path in DASHBOARDS for each in expressions(path)})
    assert asked
    # SeaweedFS says only once a minute how full its disk is.
    wait_until(lambda: not empty(box, asked), "something on every panel")


def empty(box: Box, asked: list[str]) -> list[str]:
    """The expressions without an answer that should have one."""
    found = []
    for expression in asked:
        plain = expression.replace("$__rate_interval", "5m").replace("$job", ".*")
        if not box.query(plain) and not any(name in expression for name in MAY_BE_EMPTY):
            found.append(expression)
    return found


def expressions(path: Path) -> Iterator[str]:
    """Every query of a dashboard: panels' and annotations'."""
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["expr"]


def goes_on(box: Box, job_id: str, before: pb.Job) -> None:
    """No step was lost over a stop: the job goes on from a checkpoint that the stop took."""
    with box.client() as client:
        stopped = wait_until(lambda: client.get(job_id), "the service")
        assert stopped.checkpoint.step >= before.step, "the stop's own checkpoint was committed"
        after = wait_for_checkpoint(client, job_id, stopped.checkpoint.step)
    assert len(after.attempts) > len(before.attempts)
    assert newest_attempt(after).start_step == stopped.checkpoint.step


def test_job_goes_on_after_stop_and_up_without_losing_a_step(
    box: Box, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    box.compose("stop")
    box.compose("up", "--detach", "--wait", "--wait-timeout", "240")
    goes_on(box, job_id, before)


def test_job_goes_on_after_a_reboot_and_over_tls(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    # Docker tells all containers at once, each with its own grace, when the box goes down.
    box.run("docker", "stop", *box.compose("ps", "--quiet").split())
    box.environment["EVERSTEP_TLS"] = "yes"
    box.run("make", "up")
    assert client_certificate(box).exists()
    goes_on(box, job_id, before)
    with box.client() as trusting:
        assert trusting.get(job_id).state == pb.JOB_STATE_RUNNING
    with (
        Client(trusting.address, "no token", ca_cert=None) as plain,
        pytest.raises(ServiceUnreachableError),
    ):
        plain.get(job_id)


def client_certificate(box: Box) -> Path:
    """What `make up` tells clients to trust."""
    folder = box.clone / ".everstep/compose"
    return Path(folder / json.loads((folder / "service.json").read_text())["ca_cert"])


def test_a_foreign_client_reads_by_reflection(box: Box, job_id: str) -> None:
    box.environment["BUF"] = str(Path(sys.executable).with_name("buf"))
    answer = box.run("examples/buf-curl", "GetJob", json.dumps({"job_id": job_id}))
    assert json.loads(answer)["job"]["id"] == job_id


def test_nanochats_folder_trains_as_it_stands(box: Box) -> None:
    small = "--depth=2 --aspect-ratio=32 --head-dim=16 --max-seq-len=64 --window-pattern=L"
    flags = f"{small} --device-batch-size=4 --total-batch-size=256 --num-iterations=20"
    own = ("optimizer.smear_lr=0.01", "evaluate.tokens=1024", "precision.compute=fp32")
    own += ("sample.every=0", "resources.gpus_per_worker=0", "resources.cpus_per_worker=1")
    settings = [word for each in own for word in ("--set", each)]
    where = ("--nanochat-dir", str(box.data))
    said = box.run("everstep", "submit", "--nanochat", flags, *where, *settings, "--wait")
    assert "SUCCEEDED" in said


def test_data_is_brought_and_trains(box: Box, client: Client) -> None:
    printed = box.run("everstep", "data", "put", str(box.data), "--name", "brought", "-o", "json")
    spec = {**JOB, "data": json.loads(printed), "schedule": {"num_iterations": 20}}
    made = client.submit(spec)
    assert made.plan.shape.vocab_size == 768
    states = [record.event.state for record in client.watch(made.job.id)]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED


def test_a_checkpoint_writes_and_no_other_folder_is_read(
    box: Box, client: Client, job_id: str
) -> None:
    assert "".join(client.sample(f"{job_id}@latest", "The ", max_tokens=4, temperature=1.0))
    with pytest.raises(InvalidSpecError, match=f"must lie in {box.data}"):
        client.plan({**JOB, "data": {"source": "file:/etc", "tokenizer": "file:/run/secrets"}})


def test_the_doctor_says_what_the_containers_have(box: Box) -> None:
    said = box.compose("exec", "-T", "ray-head", "everstep", "doctor")
    for check in ("versions", "store", "ray", "clock"):
        assert f"ok       {check}: " in said, said
    assert "ok       encryption: " in box.compose("exec", "-T", "service", "everstep", "doctor")


def test_job_ends_with_a_checkpoint_that_another_continues(client: Client, job_id: str) -> None:
    last = client.cancel(job_id).job
    assert last.state == pb.JOB_STATE_CANCELLED
    step = last.checkpoint.step
    spec = {"start": {"from": f"{job_id}@{step}"}, "schedule": {"num_iterations": step + 20}}
    child = client.submit(spec, inherit=True).job.id
    states = [record.event.state for record in client.watch(child) if record.HasField("event")]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED


def test_down_with_volumes_leaves_nothing(box: Box) -> None:
    box.compose("down", "--volumes")
    project = f"label=com.docker.compose.project={box.environment['COMPOSE_PROJECT_NAME']}"
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        assert box.run("docker", *kind, "--quiet", "--filter", project) == ""


def test_up_names_what_is_wrong_and_starts_nothing(box: Box) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "set EVERSTEP_PORT to another" in box.refusal(EVERSTEP_PORT=port)
    in_the_clear = box.refusal(EVERSTEP_BIND="0.0.0.0", EVERSTEP_TLS="")
    assert "would send tokens in the clear" in in_the_clear
    assert "EVERSTEP_TLS=yes" in in_the_clear
    assert "make room" in box.refusal(EVERSTEP_MIN_FREE_GB="1000000")
    secret = box.clone / ".everstep/compose/ray.token"
    kept = secret.read_bytes()
    secret.unlink()
    assert "lacks ray.token" in box.refusal()
    secret.write_bytes(kept)
    if shutil.which("nvidia-smi") is None:
        assert "no NVIDIA GPU answers" in box.refusal(COMPOSE_FILE="docker-compose.yml")
    assert box.compose("ps", "--all", "--quiet") == ""


def test_wrong_keys_of_the_store_stop_the_stack_again(box: Box) -> None:
    override = box.clone / "wrong-keys.yml"
    override.write_text(
        "services: {service: {environment: {AWS_SECRET_ACCESS_KEY: not-the-key}}}\n"
    )
    files = f"{box.environment['COMPOSE_FILE']}:{override}"
    said = box.refusal(COMPOSE_FILE=files)
    assert "access denied" in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "not-the-key" not in said
    assert box.compose("ps", "--quiet") == "", "nothing runs by half"
    box.compose("--profile", "*", "down", "--volumes")


@pytest.mark.parametrize(
    "files",
    [
        ["docker-compose.yml"],
        ["docker-compose.yml", "deploy/cluster.compose.yml"],
        ["deploy/worker.compose.yml"],
    ],
)
def test_gpu_forms_reserve_the_gpus_and_fit_the_schema(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    secrets = str(box.clone / ".everstep/compose")
    facts = {"EVERSTEP_HEAD": "10.0.0.1", "EVERSTEP_IP": "10.0.0.2", "EVERSTEP_SECRETS": secrets}
    for name, value in facts.items():
        monkeypatch.setitem(box.environment, name, value)
    named = [word for file in files for word in ("-f", file)]
    shown = box.run("docker", "compose", *named, "config", "--format", "json")
    services = json.loads(shown)["services"]
    node = services.get("ray-head") or services["ray-worker"]
    devices = node["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"capabilities": ["gpu"], "count": -1, "driver": "nvidia"}]
    assert node["environment"]["EVERSTEP_RAY_ADDRESS"].endswith(":6379")
    whole = tmp_path / "compose.json"
    whole.write_text(shown)
    checker = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([checker, "--builtin-schema", "vendor.compose-spec", whole], check=True)
