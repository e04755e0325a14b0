"""`checkpoints --verify` and `--delete`, `lineage`, `metrics`, against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from everstep import client as client_module
from everstep.cli.__main__ import run
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import Failure, FakeTrainingService, refusal

NOW = Timestamp(seconds=1_800_000_000)


# A tree's lines, as rich draws them.
TEE, ELL, BAR = "\u251c\u2500\u2500", "\u2514\u2500\u2500", "\u2502"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as fake:
        monkeypatch.setenv("EVERSTEP_ADDRESS", fake.address)
        yield fake


def checkpoint(step: int, *, readable: bool = True) -> pb.Checkpoint:
    ref = pb.CheckpointRef(job_id="JOB1", step=step, attempt=2)
    if not readable:
        return pb.Checkpoint(ref=ref, uri=f"s3://b/{step}")
    return pb.Checkpoint(ref=ref, size_bytes=10**9, create_time=NOW, uri=f"s3://b/{step}")


def verified(step: int, *problems: str, readable: bool = True) -> pb.VerifyCheckpointResponse:
    return pb.VerifyCheckpointResponse(
        checkpoint=checkpoint(step, readable=readable), problems=problems
    )


def listing(*steps: int) -> list[pb.ListCheckpointsResponse]:
    return [pb.ListCheckpointsResponse(checkpoints=[checkpoint(step) for step in steps])]


def test_verifying_shows_each_checkpoint_as_ok(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(
        ListCheckpoints=listing(2000, 1000), VerifyCheckpoint=[verified(2000), verified(1000)]
    )
    assert run(["checkpoints", "JOB1", "--verify"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "verified" in head
    assert [row.split()[-2:] for row in rows] == [["ok", "s3://b/2000"], ["ok", "s3://b/1000"]]
    asked = [request.checkpoint for request in service.requests["VerifyCheckpoint"]]
    assert asked == ["JOB1@2000", "JOB1@1000"]


def test_a_bad_checkpoint_shows_what_is_wrong_and_ends_with_1(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [verified(2000, "part\x1b 0 torn", "part 1 gone", readable=False), verified(1000)]
    service.script(ListCheckpoints=listing(2000, 1000), VerifyCheckpoint=answers)
    assert run(["checkpoints", "JOB1", "--verify"]) == 1
    rows = capsys.readouterr().out.splitlines()[1:]
    assert "part? 0 torn; part 1 gone" in rows[0]
    assert rows[0].split()[:4] == ["2,000", "2", "?", "?"]
    assert " ok " in rows[1]
    service.script(VerifyCheckpoint=answers)
    assert run(["checkpoints", "JOB1", "--verify", "-o", "json"]) == 1
    shown = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [item["problems"] for item in shown] == [["part\x1b 0 torn", "part 1 gone"], []]
    assert shown[1]["checkpoint"]["ref"]["step"] == 1000


def test_a_checkpoint_pruned_while_others_are_verified_is_not_bad(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Failure(grpc.StatusCode.NOT_FOUND)
    service.script(ListCheckpoints=listing(2000, 1000), VerifyCheckpoint=[verified(2000), gone])
    assert run(["checkpoints", "JOB1", "--verify"]) == 0
    said = capsys.readouterr()
    assert said.err == "JOB1@1000 was deleted meanwhile\n"
    assert len(said.out.splitlines()) == 2


def test_deleting_says_so_or_why_not(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = refusal(grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_NEEDED", "JOB2 starts there")
    service.script(DeleteCheckpoint=[pb.DeleteCheckpointResponse()])
    assert run(["checkpoints", "JOB1", "--delete", "1000"]) == 0
    assert capsys.readouterr().out == "JOB1@1000 is deleted\n"
    assert service.requests["DeleteCheckpoint"][0].checkpoint == "JOB1@1000"
    assert run(["checkpoints", "JOB1", "--delete", "0", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    service.script(DeleteCheckpoint=[needed])
    assert run(["checkpoints", "JOB1", "--delete", "1000"]) == 4
    assert capsys.readouterr().err == "JOB2 starts there\n"


def test_verify_and_delete_exclude_each_other(service: FakeTrainingService) -> None:
    assert run(["checkpoints", "JOB1", "--verify", "--delete", "4"]) == 2
    assert run(["checkpoints", "JOB1", "--delete", "-4"]) == 2
    assert service.requests == {}


def test_lineage_is_a_tree_and_json(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    ancestors = [
        pb.Ancestor(job_id="JOB3", name="warm", start_step=2000, end_step=2500),
        pb.Ancestor(job_id="JOB2", name="", start_step=0, end_step=2000),
        pb.Ancestor(name="nanochat:/d12@900", end_step=900),
    ]
    forks = [
        pb.Fork(job_id="FORK2", name="b", parent_job_id="JOB2", start_step=1500, end_step=1600),
        pb.Fork(job_id="FORK1", name="a", parent_job_id="JOB2", start_step=1000, end_step=3000),
        pb.Fork(job_id="LATER", name="c", parent_job_id="FORK1", start_step=3000, end_step=3000),
    ]
    service.script(GetLineage=[pb.GetLineageResponse(ancestors=ancestors, forks=forks)])
    assert run(["lineage", "JOB3"]) == 0
    assert [row.rstrip() for row in capsys.readouterr().out.splitlines()] == [
        "nanochat:/d12@900",
        f"{ELL} JOB2  (nothing is left of it)  to step 2,000",
        f"    {TEE} JOB3  warm  steps 2,000 to 2,500",
        f"    {TEE} FORK1  a  steps 1,000 to 3,000",
        f"    {BAR}   {ELL} LATER  c  steps 3,000 to 3,000",
        f"    {ELL} FORK2  b  steps 1,500 to 1,600",
    ]
    assert run(["lineage", "JOB3", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["job_id"] for item in shown["ancestors"]] == ["JOB3", "JOB2", ""]
    assert [item["parent_job_id"] for item in shown["forks"]] == ["JOB2", "JOB2", "FORK1"]


def points(*steps: int) -> pb.ListMetricsResponse:
    return pb.ListMetricsResponse(
        points=[
            pb.MetricPoint(step=step, loss=3.25, loss_smoothed=3.5, tokens_per_s=1234, time=NOW)
            for step in steps
        ]
    )


def test_metrics_are_a_table_of_chosen_points_and_json(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(ListMetrics=[points(1000, 2000)])
    assert run(["metrics", "JOB1", "--from-step", "5", "--to-step", "9", "--points", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split()[:5] == ["1,000", "3.2500", "3.5000", "0", "1,234"]
    request = service.requests["ListMetrics"][0]
    assert (request.start_step, request.end_step, request.max_points) == (5, 9, 2)
    assert run(["metrics", "JOB1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["points"]
    assert [item["step"] for item in shown] == [1000, 2000]
    assert service.requests["ListMetrics"][1].max_points == 20
    service.script(ListMetrics=[points()])
    assert run(["metrics", "JOB1"]) == 0
    assert capsys.readouterr() == ("", "no points\n")


def test_all_points_of_a_long_job_come_in_several_answers(
    service: FakeTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "WINDOW_STEPS", 3)
    service.script(ListMetrics=[points(2, 8), points(2, 3, 4), points(5, 6, 7), points(8)])
    with Client() as client:
        assert [point.step for point in client.metrics("JOB1")] == [2, 3, 4, 5, 6, 7, 8]
    asked = [(r.start_step, r.end_step, r.max_points) for r in service.requests["ListMetrics"]]
    assert asked == [(0, 0, 2), (2, 4, 0), (5, 7, 0), (8, 8, 0)]
