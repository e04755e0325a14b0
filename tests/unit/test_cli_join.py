"""`everstep cluster join`: the command that it prints, run against boxes that aren't there."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from everstep.cli.__main__ import run

ROOT = Path(__file__).parents[2]
# A box by ssh is a folder here; docker writes down how it was called.
SSH = """#!/bin/sh
echo "$1" >>"$BOXES/asked"
shift
mkdir -p "$BOXES/home" && cd "$BOXES/home" && exec sh -c "$*"
"""
DOCKER = """#!/bin/sh
echo "$* HEAD=$EVERSTEP_HEAD IP=$EVERSTEP_IP in $(basename "$PWD")" >>"$BOXES/called"
case $1 in save) echo image ;; load) cat >"$BOXES/loaded" ;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a check'out"
    secrets = folder / ".everstep/compose"
    secrets.mkdir(parents=True)
    (folder / "deploy").mkdir()
    (folder / "deploy/worker.compose.yml").write_text("name: everstep-worker\n")
    (secrets / "ray.token").write_text("the token")
    (secrets / "storage.env").write_text("AWS_SECRET_ACCESS_KEY=the key\n")
    (secrets / "service.env").write_text("EVERSTEP_ADMIN_TOKEN=not for workers\n")
    return folder


def test_the_one_command_brings_image_file_and_secrets_and_starts_the_worker(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster", "join", "me@10.0.0.2", "--head", "10.0.0.1", "--checkout", str(checkout)]
    assert run(words) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert "the token" not in command
    assert "the key" not in command
    for name, text in (("ssh", SSH), ("docker", DOCKER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BOXES": str(tmp_path)}
    subprocess.run(["sh", "-ec", command], env=environment, check=True)
    assert (tmp_path / "asked").read_text().split() == ["me@10.0.0.2"] * 2
    assert (tmp_path / "loaded").read_text() == "image\n"
    there = tmp_path / "home/everstep-worker"
    assert sorted(path.name for path in there.iterdir()) == [
        "ray.token",
        "storage.env",
        "worker.compose.yml",
    ]
    assert there.stat().st_mode & 0o077 == 0  # nobody else gets in
    called = (tmp_path / "called").read_text().splitlines()
    assert called[-1] == (
        "compose -f worker.compose.yml up --detach HEAD=10.0.0.1 IP=10.0.0.2 in everstep-worker"
    )


def test_what_is_missing_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EVERSTEP_HEAD", raising=False)
    assert run(["cluster", "join", "box", "--checkout", str(checkout)]) == 2
    assert "--head" in capsys.readouterr().err
    (checkout / ".everstep/compose/ray.token").unlink()
    assert run(["cluster", "join", "box", "--head", "h", "--checkout", str(checkout)]) == 2
    assert "ray.token is not there" in " ".join(capsys.readouterr().err.split())


def test_words_of_the_shell_in_an_address_stay_words(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster", "join", "box; rm -rf x", "--head", "$(id)", "--checkout", str(checkout)]
    assert run(words) == 0
    parts = shlex.split(capsys.readouterr().out)
    assert "box; rm -rf x" in parts
    assert any("EVERSTEP_HEAD='$(id)' " in part for part in parts)


def test_the_file_that_is_sent_is_ours() -> None:
    assert (ROOT / "deploy/worker.compose.yml").is_file()


def test_what_the_stack_was_told_of_its_store_goes_along(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster", "join", "me@10.0.0.2", "--head", "10.0.0.1", "--checkout", str(checkout)]
    (checkout / ".env").write_text("# ports\nEVERSTEP_S3_PORT=9333\nEVERSTEP_DATA='/my data'\n")
    assert run(words) == 0
    said = shlex.split(capsys.readouterr().out)[-1]
    assert "AWS_ENDPOINT_URL_S3=http://10.0.0.1:9333 EVERSTEP_DATA='/my data' docker" in said
    monkeypatch.setenv("HOME", "/home/me")
    (checkout / ".env").write_text(
        'export EVERSTEP_DATA="$HOME/my data" # here\nEVERSTEP_SHM=8gb # all\n'
    )
    assert run(words) == 0
    said = shlex.split(capsys.readouterr().out)[-1]
    assert "EVERSTEP_DATA='/home/me/my data' EVERSTEP_SHM=8gb docker" in said
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example")
    assert run(words) == 0
    assert "AWS_ENDPOINT_URL_S3=https://store.example " in capsys.readouterr().out
