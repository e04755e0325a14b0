"""Client over real gRPC against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import everstep
from everstep import patience
from everstep.connection import Endpoint
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import Failure, FakeTrainingService, refusal, violations

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "restarting")


@pytest.fixture
def service() -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as fake:
        yield fake


@pytest.fixture
def client(service: FakeTrainingService) -> Iterator[everstep.Client]:
    with everstep.Client(service.address, token="secret") as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnecting doesn't wait."""
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.002)


def state(cursor: int, name: str) -> pb.WatchJobResponse:
    event = pb.Event(kind=pb.EVENT_KIND_STATE_CHANGED, state=pb.JobState.Value(f"JOB_STATE_{name}"))
    return pb.WatchJobResponse(cursor=cursor, event=event)


def point(cursor: int) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(cursor=cursor, point=pb.MetricPoint(step=cursor))


def job(name: str) -> pb.GetJobResponse:
    return pb.GetJobResponse(job=pb.Job(id="J", state=pb.JobState.Value(f"JOB_STATE_{name}")))


def test_calls_carry_the_token(service: FakeTrainingService, client: everstep.Client) -> None:
    service.script(GetJob=[job("RUNNING")])
    assert client.get("J").state == pb.JOB_STATE_RUNNING
    assert service.tokens == ["Bearer secret"]


def test_every_call_has_a_deadline_and_a_watch_has_none(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(
        GetJob=[job("SUCCEEDED")],
        CancelJob=[pb.CancelJobResponse()],
        VerifyCheckpoint=[pb.VerifyCheckpointResponse()],
        WatchJob=[[state(1, "SUCCEEDED")]],
    )
    client.get("J")
    client.cancel("J")
    client.verify("J@1")
    list(client.watch("J"))
    deadlines = service.deadlines_s
    bounds = {"GetJob": 30.0, "CancelJob": 600.0, "VerifyCheckpoint": 3600.0}
    for method, bound in bounds.items():
        left = deadlines[method]
        assert left is not None
        assert abs(left - bound) < 20  # gRPC rounds up
    assert deadlines["WatchJob"] is None or deadlines["WatchJob"] > 1e8


def test_unavailable_is_retried_with_the_same_request_id(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(SubmitJob=[AWAY, pb.SubmitJobResponse(job=pb.Job(id="J"))])
    assert client.submit({}).job.id == "J"
    first, second = service.requests["SubmitJob"]
    assert first.request_id == second.request_id != ""
    client.submit({})
    assert service.requests["SubmitJob"][2].request_id != first.request_id


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE")]
)
def test_no_other_status_is_retried(
    service: FakeTrainingService, client: everstep.Client, code: grpc.StatusCode
) -> None:
    service.script(GetJob=[Failure(code), pb.GetJobResponse()])
    with pytest.raises(everstep.EverstepError):
        client.get("J")
    assert len(service.requests["GetJob"]) == 1


def test_a_spec_may_be_given_in_three_forms(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(PlanJob=[pb.PlanJobResponse(plan=pb.Plan(steps=7))])
    for spec in (
        {"model": {"depth": 4}},
        everstep.JobSpec.parse({"model": {"depth": 4}}),
        pb.JobSpec(model=pb.ModelSpec(depth=4)),
    ):
        assert client.plan(spec).steps == 7
    sent = [request.spec for request in service.requests["PlanJob"]]
    assert [spec.model.depth for spec in sent] == [4, 4, 4]
    assert [spec.model.HasField("head_dim") for spec in sent] == [False, True, False]


def test_every_violation_arrives_whoever_finds_it(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(PlanJob=[violations(("a.b", "1: too low"), ("c", "2: too high"))])
    with pytest.raises(everstep.InvalidSpecError) as caught:
        client.plan({})
    assert caught.value.violations == [("a.b", "1: too low"), ("c", "2: too high")]
    assert str(caught.value) == "a.b: 1: too low\nc: 2: too high"
    with pytest.raises(everstep.InvalidSpecError) as caught:
        client.plan({"modle": {}, "batch": {"total_batch_size": 3}})
    assert [found.field for found in caught.value.violations] == ["modle", "batch.total_batch_size"]
    assert len(service.requests["PlanJob"]) == 1


def test_inheriting_leaves_contradictions_to_the_service_but_not_nulls(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(PlanJob=[pb.PlanJobResponse()])
    client.plan({"start": {"from": "J@5"}, "batch": {"total_batch_size": 3}}, inherit=True)
    with pytest.raises(everstep.InvalidSpecError) as caught:
        client.plan({"optimizer": {"grad_clip_norm": None}, "model": {"x": 1}}, inherit=True)
    fields = [found.field for found in caught.value.violations]
    assert fields == ["optimizer.grad_clip_norm", "model.x"]


@pytest.mark.parametrize(
    ("failure", "kind", "reason"),
    [
        (refusal(grpc.StatusCode.FAILED_PRECONDITION, "JUMP"), everstep.RefusedError, "JUMP"),
        (refusal(grpc.StatusCode.ALREADY_EXISTS, "REUSED"), everstep.RefusedError, "REUSED"),
        (Failure(grpc.StatusCode.UNIMPLEMENTED), everstep.RefusedError, "UNIMPLEMENTED"),
        (refusal(grpc.StatusCode.UNAUTHENTICATED, "U"), everstep.UnauthenticatedError, "U"),
        (refusal(grpc.StatusCode.PERMISSION_DENIED, "F"), everstep.PermissionDeniedError, "F"),
        (Failure(grpc.StatusCode.NOT_FOUND), everstep.NotFoundError, None),
        (Failure(grpc.StatusCode.INVALID_ARGUMENT), everstep.InvalidRequestError, None),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED), everstep.DeadlineError, None),
        (Failure(grpc.StatusCode.INTERNAL), everstep.EverstepError, None),
    ],
)
def test_each_status_is_an_error_named_for_what_to_do(
    service: FakeTrainingService,
    client: everstep.Client,
    failure: Failure,
    kind: type[everstep.EverstepError],
    reason: str | None,
) -> None:
    service.script(GetJob=[failure])
    with pytest.raises(everstep.EverstepError) as caught:
        client.get("J")
    assert type(caught.value) is kind
    assert getattr(caught.value, "reason", None) == reason


def test_list_reads_every_page(service: FakeTrainingService, client: everstep.Client) -> None:
    first = pb.ListJobsResponse(jobs=[pb.Job(id="A"), pb.Job(id="B")], next_page_token="t")
    service.script(ListJobs=[first, pb.ListJobsResponse(jobs=[pb.Job(id="C")])])
    found = client.list([pb.JOB_STATE_RUNNING])
    assert [item.id for item in found] == ["A", "B", "C"]
    requests = service.requests["ListJobs"]
    assert [request.page_token for request in requests] == ["", "t"]
    assert all(list(request.states) == [pb.JOB_STATE_RUNNING] for request in requests)


@pytest.mark.usefixtures("quick")
def test_watch_goes_on_after_the_last_record_when_the_service_comes_back(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    broken = Failure(grpc.StatusCode.UNAVAILABLE, after=[state(1, "RUNNING"), point(2)])
    service.script(WatchJob=[broken, AWAY, AWAY, [point(3), state(4, "SUCCEEDED")]])
    assert [record.cursor for record in client.watch("J")] == [1, 2, 3, 4]
    cursors = [request.cursor for request in service.requests["WatchJob"]]
    assert cursors == [0, 2, 2, 2]


@pytest.mark.usefixtures("quick")
def test_watch_does_not_take_a_stopping_service_for_the_end_of_the_job(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(
        WatchJob=[[point(1)], [state(2, "FAILED")]], GetJob=[job("RUNNING"), job("FAILED")]
    )
    assert [record.cursor for record in client.watch("J")] == [1, 2]


@pytest.mark.usefixtures("quick")
def test_watch_of_a_job_that_ended_long_ago_ends(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(WatchJob=[[]], GetJob=[job("SUCCEEDED")])
    assert list(client.watch("J", cursor=9)) == []
    assert service.requests["WatchJob"][0].cursor == 9


@pytest.mark.usefixtures("quick")
def test_watch_gives_up_when_its_patience_ends(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(WatchJob=[AWAY])
    with pytest.raises(everstep.ServiceUnreachableError):
        list(client.watch("J", patience_s=0.0))


def said(attempt: int, rank: int, line: str) -> pb.StreamLogsResponse:
    return pb.StreamLogsResponse(attempt=attempt, rank=rank, line=line)


@pytest.mark.usefixtures("quick")
def test_logs_that_are_followed_go_on_over_a_restart_and_tell_each_line_once(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    before = [said(1, 0, "a"), said(1, 0, "a"), said(1, 1, "b")]
    broken = Failure(grpc.StatusCode.UNAVAILABLE, after=before)
    # Ranks come in another order than live, each rank's lines in the same.
    again = [said(1, 0, "a"), said(1, 0, "a"), said(1, 0, "c"), said(1, 1, "b"), said(2, 0, "a")]
    service.script(
        StreamLogs=[broken, AWAY, again[:2], again], GetJob=[job("RUNNING"), job("SUCCEEDED")]
    )
    found = [(each.attempt, each.rank, each.line) for each in client.logs("J", follow=True)]
    assert found == [(1, 0, "a"), (1, 0, "a"), (1, 1, "b"), (1, 0, "c"), (2, 0, "a")]


def test_logs_that_are_not_followed_say_at_once_that_the_service_is_away(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(StreamLogs=[Failure(grpc.StatusCode.UNAVAILABLE, after=[said(1, 0, "a")])])
    with pytest.raises(everstep.ServiceUnreachableError):
        list(client.logs("J"))


def test_watch_passes_other_errors_on(
    service: FakeTrainingService, client: everstep.Client
) -> None:
    service.script(WatchJob=[Failure(grpc.StatusCode.NOT_FOUND, "no job 'J'")])
    with pytest.raises(everstep.NotFoundError, match="no job 'J'"):
        list(client.watch("J"))


def test_nobody_listening_is_said_with_the_address() -> None:
    service = FakeTrainingService()  # its port is taken, but nobody answers there
    address = service.address
    with service:
        pass
    with (
        everstep.Client(address) as client,
        pytest.raises(everstep.ServiceUnreachableError, match=address),
    ):
        client.get("J")


def test_the_service_of_a_state_folder_is_found_with_its_token(tmp_path: Path) -> None:
    (tmp_path / "service.json").write_text(json.dumps({"address": "127.0.0.1:1"}))
    (tmp_path / "token").write_text("abc\n")
    here = Endpoint("127.0.0.1:1", "abc")
    assert Endpoint.of_state(tmp_path) == here
    assert Endpoint.find(environ={"EVERSTEP_STATE": str(tmp_path)}) == here
    assert everstep.Client.from_state(tmp_path).address == "127.0.0.1:1"
    elsewhere = Endpoint.find("far:2", environ={"EVERSTEP_STATE": str(tmp_path)})
    assert elsewhere == Endpoint("far:2", None)
    given = {"EVERSTEP_ADDRESS": "far:2", "EVERSTEP_TOKEN": "t", "EVERSTEP_CA_CERT": "/ca.pem"}
    assert Endpoint.find(environ=given) == Endpoint("far:2", "t", Path("/ca.pem"))


def test_no_service_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(everstep.ServiceUnreachableError, match="everstep serve --standalone"):
        Endpoint.find(environ={"EVERSTEP_STATE": str(tmp_path)})
    (tmp_path / "service.json").write_text("{")
    with pytest.raises(everstep.ServiceUnreachableError, match=r"service\.json can't be read"):
        Endpoint.of_state(tmp_path)


def test_a_missing_certificate_is_said_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(everstep.ServiceUnreachableError, match=r"ca\.pem"):
        everstep.Client("far:2", ca_cert=tmp_path / "ca.pem")
