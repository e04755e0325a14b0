"""Two boxes: the head's by deploy/cluster.compose.yml, and one that joins by the printed command.

The head has this machine's own network, as its file says. The other box is the network of a
container, which its worker takes for its host's; ssh to it is a shell here, its GPUs are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep import Client
from everstep.errors import ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from service.parts import free_ports
from tests.e2e.box import (
    JOB,
    PROJECT,
    Box,
    newest_attempt,
    wait_for_checkpoint,
    wait_until,
)
from tests.e2e.conftest import clone

pytestmark = pytest.mark.e2e
NAME = f"{PROJECT}{os.getpid()}-further"  # of the other box's network, its holder and its stack
SSH = """#!/bin/sh
shift
cd {home}
exec env -i HOME={home} PATH={folder}/bin:$PATH DOCKER_HOST="$DOCKER_HOST" \\
    DOCKER_CONFIG="$DOCKER_CONFIG" sh -c "$*"
"""
# The other box's docker: its host's network is that of the holder.
DOCKER = """#!/bin/sh
case "$*" in
"compose -f worker.compose.yml "*)
    shift 3
    exec {docker} compose -p {name} -f worker.compose.yml -f {folder}/stand-in.yml "$@"
    ;;
esac
exec {docker} "$@"
"""
STAND_IN = """
services:
  ray-worker:
    network_mode: container:{name}
    deploy: !reset null
"""


class Further:
    """The box that joins."""

    def __init__(self, head: Box, folder: Path) -> None:
        self.head, self.home = head, folder / "home"
        self.home.mkdir()
        (folder / "bin").mkdir()
        facts = {
            "home": self.home,
            "folder": folder,
            "name": NAME,
            "docker": shutil.which("docker"),
        }
        (folder / "stand-in.yml").write_text(STAND_IN.format(**facts))
        self._ssh = folder / "ssh"
        for path, text in ((self._ssh, SSH), (folder / "bin/docker", DOCKER)):
            path.write_text(text.format(**facts))
            path.chmod(0o755)
        holder = ("run", "--detach", "--name", NAME, "--network", NAME, "--entrypoint", "sleep")
        head.run("docker", *holder, "everstep:local", "infinity")
        networks = head.run("docker", "inspect", NAME, "--format", "{{json .NetworkSettings}}")
        self.address: str = json.loads(networks)["Networks"][NAME]["IPAddress"]

    def join(self) -> None:
        """The one command, as the head's box prints it."""
        command = self.head.run("everstep", "cluster", "join", f"me@{self.address}")
        path = f"{self._ssh.parent}:{self.head.environment['PATH']}"
        self.head.run("env", f"PATH={path}", "sh", "-ec", command)

    def compose(self, *words: str) -> str:
        """`docker compose ...` there, in the folder that joining made."""
        told = f"EVERSTEP_HEAD={self.head.environment['EVERSTEP_HEAD']} EVERSTEP_IP={self.address}"
        told += f" AWS_ENDPOINT_URL_S3=http://{self.head.environment['EVERSTEP_HEAD']}"
        told += f":{self.head.ports['EVERSTEP_S3_PORT']} EVERSTEP_DATA={self.head.data}"
        line = (
            f"cd everstep-worker && {told} docker compose -f worker.compose.yml {' '.join(words)}"
        )
        return self.head.run(str(self._ssh), "me@box", line)

    def node(self, client: Client) -> pb.Node | None:
        """As the service sees it; None while it isn't there."""
        try:
            nodes = client.cluster().nodes
        except ServiceUnreachableError:
            return None
        return next((node for node in nodes if node.address == self.address), None)


@pytest.fixture(scope="module")
def head(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The head's box, healthy, by an address that the other one reaches."""
    files = ["deploy/cluster.compose.yml"]
    box = Box(clone(tmp_path_factory), engine, tmp_path_factory.mktemp("data"), files)
    box.run("docker", "network", "create", NAME)
    address = box.run("docker", "network", "inspect", NAME, "--format", GATEWAY).strip()
    metrics_port = str(free_ports(1)[0])
    box.environment |= {
        "EVERSTEP_HEAD": address,
        "EVERSTEP_TLS": "yes",
        "EVERSTEP_METRICS_PORT": metrics_port,
    }
    try:
        box.run("make", "up")
        yield box
    finally:
        box.remove()
        box.run("docker", "network", "rm", NAME)


TOKEN = "Authentication token is missing or incorrect"  # Ray says
GATEWAY = "{{(index .IPAM.Config 0).Gateway}}"


@pytest.fixture(scope="module")
def further(head: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Further]:
    try:
        box = Further(head, tmp_path_factory.mktemp("further"))
        box.join()
        yield box
    finally:
        for words in (
            ["compose", "-p", NAME, "down", "--volumes", "--timeout", "1"],
            ["rm", "-f", NAME],
        ):
            subprocess.run(["docker", *words], env=head.environment, check=False)


@pytest.fixture
def client(head: Box) -> Iterator[Client]:
    with head.client() as client:
        yield client


@pytest.fixture(scope="module")
def job_id(head: Box, further: Further) -> str:
    """A job that takes every CPU of as many boxes as there are, at most two."""
    with head.client() as client:
        here = wait_until(lambda: further.node(client), "the other box in the cluster")
        workers = {"min": 1, "max": 2, "policy": "grow", "cooldown_s": 0}
        resources = {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": here.cpus}
        batch = {"device_batch_size": 2, "total_batch_size": 256}  # two micro-steps, one for each
        spec = {**JOB, "name": "spread", "batch": batch, "resources": resources}
        job_id: str = client.submit(spec).job.id
        return job_id


def on(client: Client, job_id: str, workers: int) -> pb.Job | None:
    """The job, where it trains on so many workers."""
    job = client.get(job_id)
    assert job.state != pb.JOB_STATE_FAILED, job.reason
    return job if job.state == pb.JOB_STATE_RUNNING and job.workers == workers else None


def test_a_box_joins_by_one_command_and_a_job_trains_on_both(
    head: Box, further: Further, client: Client, job_id: str
) -> None:
    wait_until(lambda: on(client, job_id, 2), "its start on two boxes")
    wait_for_checkpoint(client, job_id, 0)
    holding = {node.address for node in client.cluster().nodes if job_id in node.job_ids}
    assert holding == {head.environment["EVERSTEP_HEAD"], further.address}
    busy = f'everstep_rank_busy_seconds{{job_id="{job_id}"}}'
    wait_until(lambda: len(head.query(busy)) == 2, "the panel of the ranks' work")


def test_a_box_that_is_stopped_in_mid_job_costs_no_step(
    further: Further, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    further.compose("stop")
    left = wait_until(lambda: on(client, job_id, 1), "its going on on one box")
    newest, old = sorted(left.attempts, key=lambda attempt: -attempt.number)[:2]
    assert old.outcome == "STOPPED"
    assert newest.start_step >= before.step, "from a checkpoint that the stop took"
    assert left.goodput.recompute_s == 0
    wait_for_checkpoint(client, job_id, newest.start_step)


def test_a_box_that_comes_back_is_used_again(further: Further, client: Client, job_id: str) -> None:
    further.compose("up", "--detach")
    wait_until(lambda: on(client, job_id, 2), "its growth onto the box")
    wait_for_checkpoint(client, job_id, newest_attempt(client.get(job_id)).start_step)
    assert client.get(job_id).goodput.recompute_s == 0


def test_a_reboot_of_the_heads_box_costs_no_step(head: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    head.run("docker", "stop", *head.compose("ps", "--quiet").split())
    head.run("make", "up")
    stopped = wait_until(lambda: client.get(job_id), "the service")
    assert stopped.checkpoint.step >= before.step
    after = wait_for_checkpoint(client, job_id, stopped.checkpoint.step)
    assert len(after.attempts) > len(before.attempts)
    assert after.goodput.recompute_s == 0


def test_a_worker_without_the_heads_token_does_not_join(
    further: Further, client: Client, job_id: str
) -> None:
    token = further.home / "everstep-worker/ray.token"
    kept = token.read_text()
    further.compose("down")
    wait_until(lambda: further.node(client) is None, "its leaving")
    token.write_text("0" * 64)
    try:
        further.compose("up", "--detach")
        wait_until(lambda: TOKEN in further.compose("logs"), "its being refused")
        assert further.node(client) is None
    finally:
        further.compose("down")
        token.write_text(kept)


@pytest.mark.parametrize(
    "files",
    [
        ["docker-compose.yml"],
        ["docker-compose.yml", "deploy/cluster.compose.yml"],
        ["deploy/worker.compose.yml"],
    ],
)
def test_gpu_forms_reserve_the_gpus_and_fit_the_schema(
    head: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    secrets = str(head.clone / ".everstep/compose")
    for name, value in {"EVERSTEP_IP": "10.0.0.2", "EVERSTEP_SECRETS": secrets}.items():
        monkeypatch.setitem(head.environment, name, value)
    named = [word for file in files for word in ("-f", file)]
    shown = head.run("docker", "compose", *named, "config", "--format", "json")
    services: dict[str, Any] = json.loads(shown)["services"]
    node = services.get("ray-head") or services["ray-worker"]
    devices = node["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"capabilities": ["gpu"], "count": -1, "driver": "nvidia"}]
    assert node["environment"]["EVERSTEP_RAY_ADDRESS"].endswith(":6379")
    whole = tmp_path / "compose.json"
    whole.write_text(shown)
    checker = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([checker, "--builtin-schema", "vendor.compose-spec", whole], check=True)
