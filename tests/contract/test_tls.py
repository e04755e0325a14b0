"""The gRPC port over TLS: clients and trainers that trust the certificate, and those that don't."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from everstep import Client
from everstep.connection import Endpoint
from everstep.errors import ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from service.errors import StartError
from service.settings import Settings
from service.tls import Certificate, certificate, require_data_roots
from tests.fakes.api import ADMIN, Api, credential, served
from trainer.report import ServiceReporter

WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, signed by an authority of its own."""
    made = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    signed = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(made / "ca.crt")
    signed.cert_chain_pems[0].write_to_path(made / "server.crt")
    signed.private_key_pem.write_to_path(made / "server.key")
    return made


@pytest.fixture
async def api(tmp_path: Path, folder: Path) -> AsyncIterator[Api]:
    async with served(tmp_path, tls=Certificate.read(folder)) as made:
        yield made


async def test_a_client_that_trusts_the_certificate_is_served(api: Api, folder: Path) -> None:
    def jobs() -> list[pb.Job]:
        with Client(api.address, ADMIN, folder / "ca.crt") as client:
            return [*client.list()]

    assert await asyncio.to_thread(jobs) == []


async def test_a_client_that_does_not_is_told_that_nobody_answers(api: Api, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    trustme.CA().cert_pem.write_to_path(other)

    def jobs(cert: Path | None) -> Any:
        with Client(api.address, ADMIN, cert) as client:
            return [*client.list()]

    for cert in (other, None):
        with pytest.raises(ServiceUnreachableError):
            await asyncio.to_thread(jobs, cert)


async def test_a_trainer_reports_over_tls(api: Api, folder: Path) -> None:
    job_id = (await api.submit()).job.id
    hello = pb.Hello(job_id=job_id, attempt=1)
    authority = (folder / "ca.crt").read_text()
    reporter = ServiceReporter(api.address, authority, credential(job_id), hello)
    async with asyncio.timeout(WAIT_S):
        while not (await api.plane.lifecycle.get(job_id)).attempts:
            await asyncio.sleep(0.05)
    await asyncio.to_thread(reporter.close)


def test_the_state_folder_names_the_certificate(tmp_path: Path) -> None:
    facts = {"address": "127.0.0.1:1", "ca_cert": "tls/server.crt"}
    (tmp_path / "service.json").write_text(json.dumps(facts))
    (tmp_path / "token").write_text("secret\n")
    found = Endpoint.find(environ={"EVERSTEP_STATE": str(tmp_path)})
    assert found.ca_cert == tmp_path / "tls/server.crt"


@pytest.mark.parametrize(
    ("settings", "served_plain"),
    [
        ({}, True),
        ({"listen": "127.0.0.1:7070"}, True),
        ({"listen": "localhost:7070"}, True),
        ({"listen": "[::1]:7070"}, True),
        ({"listen": "0.0.0.0:7070"}, False),
        ({"listen": "10.0.0.1:7070"}, False),
        ({"listen": "box:7070"}, False),
        ({"listen": "0.0.0.0:7070", "published": "127.0.0.1"}, True),
        ({"listen": "0.0.0.0:7070", "published": "0.0.0.0"}, False),
        ({"listen": "0.0.0.0:7070", "published": "0.0.0.0", "plaintext": "yes"}, True),
    ],
)
def test_plaintext_stays_on_this_machine(settings: dict[str, str], served_plain: bool) -> None:
    made = Settings(**settings)  # type: ignore[arg-type] # as the environment gives them
    if served_plain:
        assert certificate(made) is None
    else:
        with pytest.raises(StartError, match=r"sent in the clear.*EVERSTEP_TLS"):
            certificate(made)


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({}, True),
        ({"listen": "0.0.0.0:7070", "published": "127.0.0.1"}, True),
        ({"listen": "0.0.0.0:7070", "data_roots": "/data"}, True),
        ({"listen": "0.0.0.0:7070"}, False),
        ({"listen": "10.0.0.1:7070", "tls": "/run/tls"}, False),
        ({"listen": "0.0.0.0:7070", "published": "0.0.0.0", "plaintext": "yes"}, False),
    ],
)
def test_who_serves_others_says_which_folders_they_may_name(
    settings: dict[str, str], starts: bool
) -> None:
    made = Settings(**settings)  # type: ignore[arg-type] # as the environment gives them
    if starts:
        require_data_roots(made)
    else:
        with pytest.raises(StartError, match=r"is not this machine alone.*EVERSTEP_DATA_ROOTS"):
            require_data_roots(made)


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StartError, match=r"server\.crt can't be read"):
        certificate(Settings(tls=tmp_path))
    for name in ("server.crt", "server.key"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    own = certificate(Settings(tls=tmp_path, listen="0.0.0.0:7070"))
    assert own is not None
    assert own.authority == tmp_path / "server.crt", "without ca.crt it vouches for itself"
    (tmp_path / "server.key").write_text("not a key")
    with pytest.raises(StartError, match=r"server\.key is not a PEM file"):
        certificate(Settings(tls=tmp_path))
