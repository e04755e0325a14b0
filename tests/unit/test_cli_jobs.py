"""Commands about jobs that exist, against scripted answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from everstep import client as client_module
from everstep import patience
from everstep.cli import output
from everstep.cli.__main__ import run
from everstep.cli.watch_view import LiveView, Pace
from everstep.specs import spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import Failure, FakeTrainingService
from trainer.contract.spec import JobSpec

NOW = Timestamp(seconds=1_800_000_000)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    with FakeTrainingService() as fake:
        monkeypatch.setenv("EVERSTEP_ADDRESS", fake.address)
        yield fake


def values(group: str, rate: float) -> pb.GroupValues:
    return pb.GroupValues(group=group, learning_rate=rate, momentum=0.95, weight_decay=0.1)


def job(name: str = "RUNNING", *, start: int | None = None, reason: str = "") -> pb.Job:
    made = pb.Job(
        id="JOB1",
        spec=spec_to_proto(JobSpec.parse({"name": "tiny", "schedule": {"num_iterations": 200}})),
        state=pb.JobState.Value(f"JOB_STATE_{name}"),
        desired_state=pb.JOB_STATE_RUNNING,
        reason=reason,
        step=150,
        create_time=NOW,
        latest=pb.MetricPoint(step=150, loss=3.25, loss_smoothed=3.5, tokens_per_s=1000),
        in_force=[values("matrix_8x8", 0.02)],
        validation_bpb=1.5,
        eta_s=3700,
    )
    made.attempts.add(
        number=1, start_time=NOW, end_time=NOW, start_step=100, outcome="CRASHED", message="boom"
    )
    if start is not None:
        made.start.CopyFrom(pb.CheckpointRef(job_id="PARENT", step=start, attempt=1))
    return made


def event(cursor: int, kind: str, **fields: object) -> pb.WatchJobResponse:
    number = pb.EventKind.Value(f"EVENT_KIND_{kind}")
    return pb.WatchJobResponse(
        cursor=cursor, time=NOW, attempt=1, event=pb.Event(kind=number, **fields)
    )


def point(cursor: int, step: int) -> pb.WatchJobResponse:
    measured = pb.MetricPoint(
        step=step,
        loss_smoothed=3.5,
        tokens_per_s=1234,
        step_s=2.0,
        groups=[values("wte", 0.5), values("matrix_8x8", 0.02)],
    )
    return pb.WatchJobResponse(cursor=cursor, time=NOW, point=measured)


def stream(end: str = "SUCCEEDED") -> list[pb.WatchJobResponse]:
    ref = pb.CheckpointRef(job_id="JOB1", step=150, attempt=1)
    final = pb.JobState.Value(f"JOB_STATE_{end}")
    return [
        event(1, "STATE_CHANGED", state=pb.JOB_STATE_RUNNING, message="attempt 1 trains"),
        event(2, "VALUES_IN_FORCE", step=101, groups=[values("matrix_8x8", 0.02)]),
        point(3, 101),
        point(4, 102),
        event(5, "CHECKPOINT_COMMITTED", checkpoint=ref, checkpoint_bytes=2_000_000),
        event(6, "EVALUATED", step=150, validation_bpb=1.25),
        event(7, "SAMPLED", step=150, message="Once\x1b[31m [red]upon"),
        event(8, "CHECKPOINT_FALLBACK", message="an older one is used"),
        event(9, "WARNING", message="mind\nthis"),
        event(10, "ATTEMPT_ENDED", step=200, outcome="COMPLETED", message="done"),
        event(11, "STATE_CHANGED", state=final, message="over"),
    ]


def watched(service: FakeTrainingService, end: str, *, start: int | None = None) -> None:
    first = pb.GetJobResponse(job=job(start=start))
    last = pb.GetJobResponse(job=job(end, reason="for a reason"))
    row = pb.RateRow(group="matrix_8x8", parent=values("matrix_8x8", 0.01))
    service.script(
        GetJob=[first, last],
        WatchJob=[stream(end)],
        PlanJob=[pb.PlanJobResponse(plan=pb.Plan(rates=[row]))],
    )


def test_watch_prints_every_event_as_text(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(service, "SUCCEEDED")
    assert run(["watch", "JOB1"]) == 0
    said = capsys.readouterr().out
    for words in (
        "RUNNING: attempt 1 trains",
        "matrix_8x8 0.02",
        "step 101/200  loss 3.5000  1,234 tok/s  matrices' rate 0.02  3 min 18 s left",
        "step 102/200",
        "checkpoint JOB1@150 committed, 2 MB",
        "validation at step 150: 1.2500 bits per byte",
        "Once?[31m [red]upon",
        "checkpoint_fallback: an older one is used",
        "warning: mind this",
        "attempt 1 ended at step 200: COMPLETED: done",
        "SUCCEEDED: over",
    ):
        assert words in said
    assert "\x1b" not in said


def test_watch_of_a_continuation_shows_old_and_new_values(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(service, "SUCCEEDED", start=100)
    assert run(["watch", "JOB1"]) == 0
    said = capsys.readouterr().out
    row = next(line.split() for line in said.splitlines() if line.startswith("matrix_8x8"))
    assert row == ["matrix_8x8", "0.01", "0.02", "x", "2", "0.95", "0.1"]


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
def test_watch_ends_with_1_when_the_job_does_not_succeed(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    watched(service, end)
    assert run(["watch", "JOB1"]) == 1
    assert capsys.readouterr().err == f"job JOB1 is {end}: for a reason\n"


def test_watch_as_json_is_a_record_a_line_and_resumes_at_a_cursor(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(service, "SUCCEEDED")
    broken = Failure(grpc.StatusCode.UNAVAILABLE, after=[point(4, 102)])
    service.script(WatchJob=[broken, stream()[4:]])
    assert run(["watch", "JOB1", "--cursor", "3", "-o", "json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [int(record["cursor"]) for record in records] == list(range(4, 12))
    assert records[0]["point"]["step"] == 102
    assert [request.cursor for request in service.requests["WatchJob"]] == [3, 4]


def test_submit_wait_follows_the_job(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(service, "FAILED")
    service.script(SubmitJob=[pb.SubmitJobResponse(job=job("QUEUED"))])
    assert run(["submit", "--wait"]) == 1
    assert "step 101/200" in capsys.readouterr().out
    watched(service, "SUCCEEDED")
    assert run(["submit", "--wait", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["state"] == "JOB_STATE_SUCCEEDED"


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back(
    service: FakeTrainingService,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    watched(service, "SUCCEEDED")
    monkeypatch.setattr(client_module.Client, "watch", interrupt)
    assert run(["watch", "JOB1", "--cursor", "7"]) == 130
    assert "everstep watch JOB1 --cursor 7" in capsys.readouterr().err
    assert "CancelJob" not in service.requests


def test_a_watch_that_is_cut_off_says_how_to_come_back(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [event(7, "WARNING", message="slow")]
    revoked = Failure(grpc.StatusCode.UNAUTHENTICATED, "no such token", after=said)
    service.script(
        SubmitJob=[pb.SubmitJobResponse(job=job())],
        GetJob=[pb.GetJobResponse(job=job())],
        WatchJob=[revoked],
    )
    assert run(["submit", "--wait", "-o", "json"]) == 4
    assert "everstep watch JOB1 --cursor 7" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_with_events_above_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, markup=False)
    with LiveView(console, job(), {}) as view:
        for record in stream():
            view.show(record)
    said = screen.getvalue()
    assert "102/200" in said
    assert "matrices' rate 0.02" in said
    assert "validation at step 150" in said


def test_get_shows_progress_values_and_attempts(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    found = job(start=100, reason="attempt 2 trains")
    found.goodput.MergeFrom(pb.Goodput(productive_s=5400, start_s=60, ratio=0.989))
    found.energy_joules = 9e5
    found.workers = 2
    found.spec.resources.workers.MergeFrom(pb.WorkersSpec(min=1, max=4, policy=pb.SIZING_ELASTIC))
    service.script(GetJob=[pb.GetJobResponse(job=found)])
    assert run(["get", "JOB1"]) == 0
    said = capsys.readouterr().out
    for words in (
        "JOB1  tiny",
        "RUNNING  attempt 2 trains",
        "workers    2 of 1 to 4, elastic",
        "150 of 200, 1 h 01 min left",
        "loss 3.5000",
        "1.5000 bits per byte",
        "PARENT@100",
        "matrix_8x8",
        "CRASHED",
        "boom",
        "productive 1 h 30 min, start 1 min  (goodput 98.9%)",
        "0.25 kWh",
    ):
        assert words in said


def test_list_is_a_table_and_json(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(ListJobs=[pb.ListJobsResponse(jobs=[job(), job("FAILED")])])
    assert run(["list", "--state", "running", "--state", "FAILED"]) == 0
    assert "150/200" in capsys.readouterr().out
    states = service.requests["ListJobs"][0].states
    assert list(states) == [pb.JOB_STATE_RUNNING, pb.JOB_STATE_FAILED]
    assert run(["list", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["jobs"]
    assert [item["state"] for item in shown] == ["JOB_STATE_RUNNING", "JOB_STATE_FAILED"]
    service.script(ListJobs=[pb.ListJobsResponse()])
    assert run(["list"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["list", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"jobs": []}


def test_cancel_and_pause_say_what_is_left_and_resume_says_the_state(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = pb.CheckpointRef(job_id="JOB1", step=150)
    left = pb.FinalCheckpoint(checkpoint=ref, manifest_sha256="0" * 64, reason="stopped")
    away = pb.FinalCheckpoint(checkpoint=ref, reason="stopped; the store is away")
    nothing = pb.FinalCheckpoint(reason="it never trained")
    service.script(
        CancelJob=[pb.CancelJobResponse(job=job("CANCELLED"), final_checkpoint=left)],
        PauseJob=[
            pb.PauseJobResponse(job=job("PAUSED"), final_checkpoint=nothing),
            pb.PauseJobResponse(job=job("PAUSED"), final_checkpoint=away),
        ],
        ResumeJob=[pb.ResumeJobResponse(job=job("QUEUED"))],
    )
    assert [run([command, "JOB1"]) for command in ("cancel", "pause", "pause", "resume")] == [0] * 4
    assert capsys.readouterr().out.splitlines() == [
        "JOB1 is CANCELLED; its last checkpoint is JOB1@150",
        "JOB1 is PAUSED; no checkpoint is known: it never trained",
        "JOB1 is PAUSED; its last checkpoint is JOB1@150: stopped; the store is away",
        "JOB1 is QUEUED",
    ]
    assert run(["cancel", "JOB1", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["final_checkpoint"]["checkpoint"]["step"] == 150


def test_checkpoints_are_listed_with_where_they_lie(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = pb.CheckpointRef(job_id="JOB1", step=1500, attempt=2)
    item = pb.Checkpoint(ref=ref, size_bytes=10**9, create_time=NOW, uri="s3://b/k")
    service.script(ListCheckpoints=[pb.ListCheckpointsResponse(checkpoints=[item])])
    assert run(["checkpoints", "JOB1"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert (row[:4], row[-1]) == (["1,500", "2", "1", "GB"], "s3://b/k")
    assert run(["checkpoints", "JOB1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["checkpoints"]
    assert shown[0]["size_bytes"] == "1000000000"


def test_serve_becomes_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replaced: list[list[str]] = []

    def replace(_path: str, command: list[str]) -> None:
        replaced.append(command)

    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.chdir(tmp_path)
    assert run(["serve", "--standalone", "--state", "here"]) == 0
    wanted = [sys.executable, "-P", "-m", "service", "--standalone", "--state", "here"]
    assert replaced == [wanted]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 01 s"), (3600, "1 h 00 min")],
)
def test_durations_are_told_in_the_units_that_matter(seconds: float, words: str) -> None:
    assert output.duration(seconds) == words
    assert output.duration(117_720) == "1 d 8 h"


@pytest.mark.parametrize(
    ("count", "words"),
    [(999, "999 B"), (999_700, "1 MB"), (999_499, "999 kB"), (2.04e9, "2.04 GB"), (5e12, "5 TB")],
)
def test_sizes_are_told_in_three_digits(count: float, words: str) -> None:
    assert output.size(count) == words


def test_a_reader_who_has_seen_enough_is_no_job_that_failed(service: FakeTrainingService) -> None:
    service.script(ListJobs=[pb.ListJobsResponse(jobs=[job()])])
    ours, theirs = os.pipe()
    os.close(ours)  # as `head` does once it has its lines
    command = [sys.executable, "-m", "everstep.cli", "list"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_locale_without_the_letters_loses_them_alone(service: FakeTrainingService) -> None:
    service.script(GetJob=[pb.GetJobResponse(job=job(reason="caf\u00e9"))])
    command = [sys.executable, "-m", "everstep.cli", "get", "JOB1"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"RUNNING  caf?" in done.stdout
    assert run(["get", "JOB\udcff"]) == 2


def test_the_time_left_in_a_watch_counts_validation() -> None:
    pace = Pace(job())
    for step in range(1, 101):
        pace.add(pb.WatchJobResponse(point=pb.MetricPoint(step=step, step_s=2.0)))
    last = pb.MetricPoint(step=100, step_s=2.0)
    assert "3 min 20 s left" in pace.facts(last)
    pace.add(event(1, "EVALUATED", evaluation_s=170.0))
    assert "6 min 10 s left" in pace.facts(last)
    pace.add(pb.WatchJobResponse(point=pb.MetricPoint(step=170, step_s=2.0)))  # thinned before it
    assert "1 min 30 s left" in pace.facts(pb.MetricPoint(step=170, step_s=2.0))


def test_update_sends_what_was_given_and_nothing_else(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(UpdateJob=[pb.UpdateJobResponse(job=job())])
    assert run(["update", "JOB1", "--priority", "0", "--no-keep-best"]) == 0
    assert run(["update", "JOB1", "--keep-last", "4", "-o", "json"]) == 0
    first, second = service.requests["UpdateJob"]
    assert first == pb.UpdateJobRequest(
        job_id="JOB1", priority=0, retention=pb.CheckpointSpec(keep_best=False)
    )
    assert second == pb.UpdateJobRequest(job_id="JOB1", retention=pb.CheckpointSpec(keep_last=4))
    assert "JOB1: priority 0; keeps the last 3" in capsys.readouterr().out


def test_delete_takes_checkpoints_along_only_when_told(service: FakeTrainingService) -> None:
    refused = Failure(grpc.StatusCode.FAILED_PRECONDITION, "has 2 checkpoints")
    service.script(DeleteJob=[refused, pb.DeleteJobResponse()])
    assert run(["delete", "JOB1"]) == 4
    assert run(["delete", "JOB1", "--checkpoints"]) == 0
    assert [each.delete_checkpoints for each in service.requests["DeleteJob"]] == [False, True]


def test_logs_are_printed_with_time_attempt_and_rank_or_as_json(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        pb.StreamLogsResponse(time=NOW, attempt=2, rank=rank, line=f"says\x1b rank {rank}")
        for rank in (0, 1)
    ]
    ended = pb.GetJobResponse(job=pb.Job(id="JOB1", state=pb.JOB_STATE_SUCCEEDED))
    service.script(StreamLogs=[lines], GetJob=[ended])
    assert run(["logs", "JOB1", "--attempt", "2", "--rank", "1", "-f"]) == 0
    asked = service.requests["StreamLogs"][0]
    assert (asked.job_id, asked.attempt, asked.rank, asked.follow) == ("JOB1", 2, 1, True)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == ["2/0 says? rank 0", "2/1 says? rank 1"]
    assert run(["logs", "JOB1", "-o", "json"]) == 0
    assert not service.requests["StreamLogs"][1].HasField("rank")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["line"] for each in told] == ["says\x1b rank 0", "says\x1b rank 1"]
