"""`everstep cluster`: tables for people, proto names for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from everstep.cli.__main__ import run
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import FakeTrainingService


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as made:
        monkeypatch.setenv("EVERSTEP_ADDRESS", made.address)
        monkeypatch.setenv("EVERSTEP_TOKEN", "secret")
        yield made


def found(ago_s: int = 0) -> pb.GetClusterResponse:
    share = pb.NodeShare(job_id="JOB1", job_name="d12", workers=1, gpus=1, cpus=2)
    device = pb.DeviceSample(
        index=0,
        name="NVIDIA GeForce RTX 4070",
        memory_used_bytes=9_000_000_000,
        memory_total_bytes=12_000_000_000,
        utilization_ratio=0.97,
        temperature_celsius=71,
    )
    return pb.GetClusterResponse(
        nodes=[
            pb.Node(
                id="a" * 56, address="10.0.0.1", gpus=2, gpus_free=1, cpus=8, cpus_free=6,
                gpu_type="GeForce-RTX-4070", shares=[share], devices=[device], job_ids=["JOB1"],
            ),
            pb.Node(id="b" * 56, address="10.0.0.2", cpus=4, unused_because="it is being drained"),
        ],
        seen_time=Timestamp(seconds=int(time.time()) - ago_s),
        waiting=[pb.WaitingJob(job_id="JOB2", job_name="big", reason="needs 4 GPU")],
    )  # fmt: skip


def test_the_tables_say_what_is_free_who_holds_it_and_why_others_wait(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(GetCluster=[found()])
    assert run(["cluster"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "aaaaaaaaaaaa 10.0.0.1 1 of 2 GeForce-RTX-4070 6 of 8 JOB1 (1 x)",
        "bbbbbbbbbbbb 10.0.0.2 0 of 0 0 of 4 unused: it is being drained",
        "10.0.0.1 0 NVIDIA GeForce RTX 4070 9 GB of 12 GB 97% 71 C",
        "JOB2 big needs 4 GPU",
    ):
        assert words in said
    assert "W" not in said.split("71 C")[1].split("waiting")[0]


def test_what_is_old_is_said_to_be(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    for ago_s, words in ((0, ""), (185, "Ray has not answered for 3 min")):
        service.script(GetCluster=[found(ago_s)])
        assert run(["cluster"]) == 0
        assert words in (said := capsys.readouterr().err)
        assert bool(said) is bool(words)


def test_json_has_the_names_of_the_proto(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(GetCluster=[found()])
    assert run(["cluster", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["nodes"][0]["shares"][0]["workers"] == 1
    assert told["waiting"][0]["job_id"] == "JOB2"
    assert "power_watts" not in told["nodes"][0]["devices"][0]
