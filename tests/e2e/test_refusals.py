"""A box where something is wrong: `make up` names it and what to do, and nothing runs by half.

One stopped stack for all tests. What a real engine can't be brought to is in tests/unit/test_up.py.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import PORTS, Box
from tests.e2e.conftest import clone

pytestmark = pytest.mark.e2e
SECRETS = ("service.env", "storage.env", "grafana.env", "ray.token", "token")


@pytest.fixture(scope="module")
def idle(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that was never up, or is down again: image and secrets, no container, no volume."""
    box = Box(clone(tmp_path_factory), engine, tmp_path_factory.mktemp("data"))
    try:
        # It makes the secrets before it looks for room; and builds the image only afterwards.
        assert "make room" in box.refusal(EVERSTEP_MIN_FREE_GB="1000000")
        commit = box.run("git", "rev-parse", "HEAD").strip()
        box.run("env", f"EVERSTEP_COMMIT={commit}", "docker", "compose", "build")
        yield box
    finally:
        box.remove()


@pytest.fixture(autouse=True)
def nothing_runs(idle: Box) -> Iterator[None]:
    """Before and after each test."""
    assert idle.compose("ps", "--all", "--quiet") == ""
    yield
    assert idle.compose("--profile", "*", "ps", "--all", "--quiet") == ""


@pytest.mark.parametrize("variable", [*PORTS, "GRAFANA_PORT"])
def test_each_port_that_is_taken_is_named(idle: Box, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = idle.refusal(**{variable: port, "COMPOSE_PROFILES": "grafana"})
    assert f"port {port} of 127.0.0.1 is taken" in said
    assert f"set {variable} to another" in said


def test_too_little_space_is_named(idle: Box) -> None:
    assert "make room" in idle.refusal(EVERSTEP_MIN_FREE_GB="1000000")


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_is_missing_is_named(idle: Box, name: str) -> None:
    secret = idle.clone / ".everstep/compose" / name
    kept = secret.read_bytes()
    secret.unlink()
    try:
        assert f"lacks {name}" in idle.refusal()
        if name.endswith(".env") and name != "grafana.env":  # compose by itself, too
            assert name in idle.compose_refusal("up", "--detach")
    finally:
        secret.write_bytes(kept)


def test_a_box_without_a_gpu_is_told_of_the_other_form(idle: Box) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("needs a box without a GPU")
    said = idle.refusal(COMPOSE_FILE="docker-compose.yml")
    assert "no NVIDIA GPU answers" in said
    assert "docker-compose.cpu.yml" in said


def test_a_gpu_that_the_engine_does_not_know_is_named(idle: Box, tmp_path: Path) -> None:
    if "nvidia" in idle.run("docker", "info", "--format", "{{json .Runtimes}}"):
        pytest.skip("needs an engine without the NVIDIA container toolkit")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{idle.environment['PATH']}"
    said = idle.refusal(COMPOSE_FILE="docker-compose.yml", PATH=path)
    assert "install nvidia-container-toolkit" in said


def test_another_address_without_tls_is_refused_by_up_and_by_the_service(idle: Box) -> None:
    plain = {"EVERSTEP_BIND": "0.0.0.0", "EVERSTEP_TLS": ""}
    said = idle.refusal(**plain)
    assert "would send tokens in the clear" in said
    assert "EVERSTEP_TLS=yes" in said
    alone = idle.service_refusal(**plain)
    assert "0.0.0.0 is not this machine alone, and tokens would be sent in the clear" in alone
    assert "EVERSTEP_TLS" in alone


def test_another_address_without_a_token_is_refused_by_up_and_by_the_service(idle: Box) -> None:
    secret = idle.clone / ".everstep/compose/service.env"
    kept = secret.read_text()
    secret.write_text("".join(x for x in kept.splitlines(True) if "ADMIN_TOKEN" not in x))
    served = {"EVERSTEP_BIND": "0.0.0.0", "EVERSTEP_TLS": "yes"}
    try:
        assert "service.env has no EVERSTEP_ADMIN_TOKEN" in idle.refusal(**served)
        assert "set EVERSTEP_ADMIN_TOKEN and EVERSTEP_SECRET" in idle.service_refusal(**served)
    finally:
        secret.write_text(kept)


def test_wrong_keys_of_the_store_stop_the_stack_again(idle: Box) -> None:
    override = idle.clone / "wrong-keys.yml"
    override.write_text(
        "services: {service: {environment: {AWS_SECRET_ACCESS_KEY: not-the-key}}}\n"
    )
    files = f"{idle.environment['COMPOSE_FILE']}:{override}"
    said = idle.refusal(COMPOSE_FILE=files)
    assert "access denied" in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "not-the-key" not in said
    assert idle.compose("ps", "--quiet") == "", "nothing runs by half"
    idle.remove()


def test_down_takes_grafana_along_and_down_with_volumes_leaves_nothing(idle: Box) -> None:
    """As `make up` leaves it: with the profile. Created only: its image isn't everywhere."""
    idle.environment["COMPOSE_PROFILES"] = "grafana"
    image = "grafana/grafana:11.6.0"
    there = subprocess.run(
        ["docker", "image", "inspect", image],
        env=idle.environment,
        capture_output=True,
        check=False,
    )
    if there.returncode:
        idle.run("docker", "tag", "everstep:local", image)
    try:
        for command in (["make", "down"], ["docker", "compose", "down", "--volumes"]):
            idle.compose("create", "--no-build")
            assert "grafana" in idle.compose("ps", "--all", "--services").split()
            idle.run(*command)
            assert idle.leftovers("ps", "--all") == idle.leftovers("network", "ls") == ""
        assert idle.leftovers("volume", "ls") == ""
    finally:
        idle.environment["COMPOSE_PROFILES"] = ""
        if there.returncode:
            idle.run("docker", "rmi", image)
