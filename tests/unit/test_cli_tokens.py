"""`everstep token`, against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from everstep.cli.__main__ import run
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import FakeTrainingService, refusal

NOW = Timestamp(seconds=1_800_000_000)
ALICE = pb.Token(id="T1", name="alice", role=pb.ROLE_SUBMIT, create_time=NOW)
BOB = pb.Token(id="T2", name="bob", role=pb.ROLE_READ, create_time=NOW, revoke_time=NOW)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as fake:
        monkeypatch.setenv("EVERSTEP_ADDRESS", fake.address)
        yield fake


def test_create_prints_the_secret_alone_on_stdout(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(CreateToken=[pb.CreateTokenResponse(token=ALICE, secret="evt1_s")])
    assert run(["token", "create", "alice", "--role", "submit"]) == 0
    said = capsys.readouterr()
    assert said.out == "evt1_s\n"
    assert "alice" in said.err
    asked = service.requests["CreateToken"][0]
    assert (asked.name, asked.role) == ("alice", pb.ROLE_SUBMIT)
    assert run(["token", "create", "alice"]) == 2, "the role must be said"


def test_list_shows_which_are_revoked(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(ListTokens=[pb.ListTokensResponse(tokens=[ALICE, BOB])])
    assert run(["token", "list"]) == 0
    alice, bob = capsys.readouterr().out.splitlines()[-2:]
    assert "submit" in alice
    assert bob.count("2027") == alice.count("2027") + 1
    assert run(["token", "list", "-o", "json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["tokens"]] == [
        "alice",
        "bob",
    ]


def test_revoke_names_it_and_a_refusal_exits_with_4(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = refusal(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN", "needs a token of role admin")
    service.script(RevokeToken=[pb.RevokeTokenResponse(token=BOB), denied])
    assert run(["token", "revoke", "bob"]) == 0
    assert "bob is revoked" in capsys.readouterr().out
    assert run(["token", "revoke", "bob"]) == 4
    assert "role admin" in capsys.readouterr().err
