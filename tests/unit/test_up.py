"""`make up` refuses whatever would let the stack start by half: deploy/up with a docker of our own.

tests/e2e does the same on a real engine, as far as that can be brought about there.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Docker as a box has it: each call is written down, `up` starts nothing and is healthy.
DOCKER = """#!/bin/sh
echo "$*" >>"$BOX/called"
case "$*" in
"compose version"*) exit "${NO_COMPOSE:-0}" ;;
"version"*) exit "${NO_ENGINE:-0}" ;;
*Runtimes*) echo "runc ${RUNTIME:-nvidia} " ;;
*DockerRootDir*) echo "$BOX" ;;
esac
"""
VARIABLES = ("EVERSTEP_PORT", "EVERSTEP_RAY_PORT", "EVERSTEP_S3_PORT", "PROMETHEUS_PORT")
CPU = "docker-compose.yml:docker-compose.cpu.yml"
SECRETS = ("service.env", "storage.env", "grafana.env", "ray.token", "token")


class Box:
    """A clone with `docker` and, where the test wants, `nvidia-smi`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "deploy").mkdir()
        shutil.copy(ROOT / "deploy/up", folder / "deploy/up")
        (folder / "bin").mkdir()
        self.program("docker", DOCKER)
        self.program("nvidia-smi", "#!/bin/sh\nexit 0\n")
        self.program("sleep", "#!/bin/sh\nexit 0\n")

    @property
    def secrets(self) -> Path:
        return self.folder / ".everstep/compose"

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def up(self, **changes: str) -> subprocess.CompletedProcess[str]:
        """With ports that are free."""
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "BOX": str(self.folder),
            "EVERSTEP_MIN_FREE_GB": "0",
            **{name: str(port) for name, port in free_ports().items()},
            **changes,
        }
        (self.folder / "called").unlink(missing_ok=True)
        return subprocess.run(
            ["bash", self.folder / "deploy/up"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def refusal(self, **changes: str) -> str:
        """What it says when it refuses; nothing was built or started."""
        done = self.up(**changes)
        assert done.returncode == 1, done
        called = self.folder / "called"
        calls = called.read_text() if called.exists() else ""
        assert "compose up" not in calls
        assert "compose build" not in calls
        return done.stderr


def free_ports() -> dict[str, int]:
    found = {}
    for name in (*VARIABLES, "GRAFANA_PORT"):
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            found[name] = trial.getsockname()[1]
    return found


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_box_that_has_everything_starts_and_keeps_its_secrets(box: Box) -> None:
    assert box.up().returncode == 0
    made = {name: (box.secrets / name).read_bytes() for name in SECRETS}
    assert all(made.values())
    assert box.up().returncode == 0
    assert {name: (box.secrets / name).read_bytes() for name in SECRETS} == made
    calls = (box.folder / "called").read_text()
    assert calls.index("compose build") < calls.index("compose up --detach --wait")


@pytest.mark.parametrize("variable", [*VARIABLES, "GRAFANA_PORT"])
def test_each_port_that_is_taken_is_named_with_its_variable(box: Box, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = box.refusal(**{variable: port})
    assert f"port {port} of 127.0.0.1 is taken: stop what listens there, or set {variable}" in said


def test_a_port_of_what_is_not_started_may_be_taken(box: Box) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert box.up(GRAFANA_PORT=port, COMPOSE_PROFILES="").returncode == 0


def test_rays_own_port_counts_where_further_boxes_join(box: Box) -> None:
    cluster = {"COMPOSE_FILE": "docker-compose.yml:deploy/cluster.compose.yml"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.77", 6379))
        taken.listen()
        assert "port 6379 of 127.0.0.77 is taken" in box.refusal(
            **cluster, EVERSTEP_HEAD="127.0.0.77"
        )
    assert box.up(**cluster, EVERSTEP_HEAD="127.0.0.77").returncode == 0
    assert "EVERSTEP_HEAD: set it to" in box.refusal(**cluster)


@pytest.mark.parametrize(
    ("variable", "address"),
    [
        ("EVERSTEP_PORT", "127.0.0.77"),
        ("EVERSTEP_S3_PORT", "127.0.0.77"),
        ("EVERSTEP_METRICS_PORT", "127.0.0.1"),
    ],
)
def test_the_heads_own_address_counts_where_further_boxes_join(
    box: Box, variable: str, address: str
) -> None:
    cluster = {"COMPOSE_FILE": "docker-compose.yml:deploy/cluster.compose.yml"}
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = box.refusal(**cluster, EVERSTEP_HEAD="127.0.0.77", **{variable: port})
    assert f"port {port} of {address} is taken" in said
    assert f"set {variable} to another" in said


def test_what_the_gpu_form_lacks_is_named(box: Box) -> None:
    assert "nvidia-ctk runtime configure" in box.refusal(RUNTIME="none")
    box.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    said = box.refusal()
    assert "no NVIDIA GPU answers" in said
    assert f"export COMPOSE_FILE={CPU}" in said
    assert box.up(COMPOSE_FILE=CPU, RUNTIME="none").returncode == 0, "the form without a GPU"


def test_a_docker_that_can_not_be_used_is_named(box: Box) -> None:
    assert "docker compose is missing" in box.refusal(NO_COMPOSE="1")
    assert "engine does not answer" in box.refusal(NO_ENGINE="1")


def test_a_full_disk_is_named_with_its_folder(box: Box) -> None:
    said = box.refusal(EVERSTEP_MIN_FREE_GB="1000000")
    assert f"{box.folder} has " in said
    assert "less than 1000000: make room" in said


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_each_secret_that_is_missing_is_named_and_none_is_made_anew(
    box: Box, name: str, how: str
) -> None:
    assert box.up().returncode == 0
    kept = {path.name: path.read_bytes() for path in box.secrets.iterdir() if path.is_file()}
    if how == "gone":
        (box.secrets / name).unlink()
    else:
        (box.secrets / name).write_bytes(b"")
    said = box.refusal()
    assert f"lacks {name}, but holds others" in said
    assert "Put it back from a copy" in said
    for path in (box.secrets / each for each in kept if each != name):
        assert path.read_bytes() == kept[path.name]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("service.env", "EVERSTEP_ADMIN_TOKEN"),
        ("service.env", "EVERSTEP_SECRET"),
        ("storage.env", "AWS_ACCESS_KEY_ID"),
        ("storage.env", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_line_that_was_left_out_of_a_secret_is_named(box: Box, file: str, name: str) -> None:
    assert box.up().returncode == 0
    path = box.secrets / file
    path.write_text("".join(x for x in path.read_text().splitlines(True) if name not in x) + "#\n")
    assert f"{file} has no {name}" in box.refusal()


@pytest.mark.parametrize("variable", ["EVERSTEP_BIND", "EVERSTEP_HEAD"])
def test_another_address_takes_tls_or_a_network_that_encrypts(box: Box, variable: str) -> None:
    said = box.refusal(**{variable: "10.0.0.1"})
    assert "10.0.0.1 is not this box alone, and would send tokens in the clear" in said
    assert "EVERSTEP_TLS=yes" in said
    assert box.up(**{variable: "10.0.0.1", "EVERSTEP_PLAINTEXT": "yes"}).returncode == 0
    assert box.up(**{variable: "10.0.0.1", "EVERSTEP_TLS": "yes"}).returncode == 0
    assert b"BEGIN CERTIFICATE" in (box.secrets / "tls/server.crt").read_bytes()


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("$HOME/.cache/nanochat", "/home/me/.cache/nanochat"),
        ("${HOME}/a$HOME b # mine", "/home/me/a/home/me b"),
        ('"${HOME}/my data"', "/home/me/my data"),
        ("'$HOME/data'", "$HOME/data"),
        ("${HOME:-/root}/data", "left to compose"),
        ("$$HOME", "left to compose"),
        ("/plain", "/plain"),
    ],
)
def test_a_line_of_env_means_what_it_means_to_compose(box: Box, written: str, told: str) -> None:
    box.program("docker", f'{DOCKER}echo "${{EVERSTEP_DATA-left to compose}}" >"$BOX/told"\n')
    (box.folder / ".env").write_text(f"# ours\nexport EVERSTEP_DATA={written}\n")
    assert box.up(HOME="/home/me").returncode == 0
    assert (box.folder / "told").read_text() == f"{told}\n"


def test_secrets_from_a_copy_are_kept_from_others_again(box: Box) -> None:
    assert box.up().returncode == 0
    box.secrets.chmod(0o755)
    assert box.up().returncode == 0
    assert box.secrets.stat().st_mode & 0o777 == 0o700


def test_the_containers_user_reads_a_certificate_of_ones_own(box: Box) -> None:
    assert box.up().returncode == 0
    for name in ("server.crt", "server.key"):
        (box.secrets / "tls" / name).write_text("mine")
    assert box.up(EVERSTEP_TLS="yes").returncode == 0
    assert (box.secrets / "tls").stat().st_mode & 0o777 == 0o755
    assert (box.secrets / "tls/server.crt").read_text() == "mine"
