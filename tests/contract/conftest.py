"""One of each S3 server for all contract tests of a run; one store of each kind."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.api import ADMIN, Api, served
from tests.fakes.control_plane import new_job
from tests.fakes.memory_store import MemoryObjectStore
from tests.servers import S3Server, moto, rclone, seaweedfs
from trainer.storage.object_store import ObjectStore, open_store

# What checkpoints may lie in. rclone's server has no conditional put; the rest it can do.
SUITABLE = ["memory", "local", "seaweedfs", "moto"]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The standard variables point at the server."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=[*SUITABLE, "rclone"])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """A store of each kind."""
    match request.param:
        case "memory":
            return MemoryObjectStore()
        case "local":
            return open_store(f"file:{tmp_path}/bucket/prefix")
        case kind:
            name = "s3_server" if kind == "seaweedfs" else f"{kind}_server"
            server: S3Server = request.getfixturevalue(name)
            for variable, value in server.environment.items():
                monkeypatch.setenv(variable, value)
            return open_store(f"s3://{server.bucket}/test/{secrets.token_hex(6)}")


@pytest.fixture
def store(any_store: ObjectStore) -> ObjectStore:
    """A store that checkpoints may lie in; tests ask for SUITABLE kinds of any_store."""
    return any_store


@pytest.fixture
async def api(trained: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """A service over a module's own `trained`, whose bucket has the job JOB; the CLI finds it."""
    async with served(trained) as made:
        if await made.plane.jobs.get("JOB") is None:
            await made.plane.add(new_job(1, id="JOB", request_id="JOB"))
        monkeypatch.setenv("EVERSTEP_ADDRESS", made.address)
        monkeypatch.setenv("EVERSTEP_TOKEN", ADMIN)
        yield made
