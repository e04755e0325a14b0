"""Scripted faults of a real S3 server, between it and the checkpoints; each asserts that it fired.

Some go past boto3's own retries. What the disk does, full or torn, is in tests/unit/test_writer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.checkpoints import JOB, ref_to, save
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.s3_proxy import S3Proxy
from tests.servers import S3Server, seaweedfs
from tests.unit.test_writer import WAIT_S, Bench
from trainer.start import download
from trainer.storage.object_store import ObjectStore, open_store
from trainer.storage.repository import CheckpointRepository, Loaded
from trainer.storage.retry import patiently

TRIES = 3  # of boto3, within one call of ours


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with S3Proxy(server.endpoint).running() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        yield running


@pytest.fixture
def store(proxy: S3Proxy, server: S3Server, tmp_path: Path) -> ObjectStore:
    return open_store(f"s3://{server.bucket}/{tmp_path.name}")


@pytest.mark.parametrize("call", ["PUT part-", "PUT manifest.json", "HEAD part-", "GET prefix="])
@pytest.mark.parametrize("kind", ["latency", "cut", "500", "slow-down"])
def test_a_fault_while_saving_costs_time_alone(
    proxy: S3Proxy, store: ObjectStore, tmp_path: Path, kind: str, call: str
) -> None:
    bench = Bench(tmp_path, store=FlakyStore(store))
    method, text = call.split()
    beyond_boto3 = kind == "500" and text == "part-"
    fault = proxy.script(kind, method, text, times=TRIES if beyond_boto3 else 1)
    bench.save(3)
    assert bench.writer.drain(WAIT_S)
    bench.close()
    assert fault.fired == fault.times
    assert bench.commits() == bench.steps() == [3]
    assert bench.repository.verify(bench.repository.current()[0]) == ()


# Two parts are read side by side: of 500s, one of them uses up all of boto3's tries; of three wrong
# answers, one of them gets two.
@pytest.mark.parametrize(
    ("kind", "times"),
    [
        *(("latency", 1), ("cut", 1), ("500", 2 * TRIES - 1), ("slow-down", 1), ("torn", 1)),
        *(("flip", 1), ("flip", 3)),
    ],
)
def test_a_fault_while_loading_is_waited_out_or_passed_over(
    proxy: S3Proxy, store: ObjectStore, tmp_path: Path, kind: str, times: int
) -> None:
    repository = CheckpointRepository(store, JOB)
    repository.claim(None, "here")
    for step in (1, 2):
        save(repository, tmp_path, step)
    fault = proxy.script(kind, "GET", "0000000002/1/part-", times)

    def load() -> object:
        return repository.newest_loadable(
            lambda ref, manifest: download(repository, ref, manifest, tmp_path / "copies")
        )

    found = patiently(load, 60.0)
    assert isinstance(found, Loaded)
    assert fault.fired == fault.times
    if kind == "flip" and times > 1:  # wrong bytes once more: an older one is taken, and said
        assert found.ref == ref_to(1)
        assert "sha256" in found.rejected[0].reason
    else:
        assert found.ref == ref_to(2)
        assert found.rejected == ()
