"""`everstep plan --offline` of continuations: the real program over real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from everstep.cli.__main__ import run
from tests.fakes.attempts import Bucket, process_settings_kept
from tests.fakes.control_plane import TINY
from tests.fakes.nanochat import NATIVE, SPEC

NOWHERE = "127.0.0.1:1"  # a service that must not be asked


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_ADDRESS", NOWHERE)
    monkeypatch.delenv("EVERSTEP_STORAGE", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """A bucket in which JOB has a checkpoint at step 4."""
    bucket = Bucket(tmp_path_factory.mktemp("trained"))
    bucket.add("JOB", schedule={"num_iterations": 12})
    with process_settings_kept():
        bucket.run("JOB", stop_at=4)
    return bucket


def test_a_continuation_shows_the_rates_in_force_at_its_start(
    trained: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERSTEP_STORAGE", trained.uri)
    given = ["--from", "JOB@4", "--set", "schedule.num_iterations=20"]
    assert run(["plan", "--offline", *given, "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["start"]["job_id"], made["start_step"], made["steps"]) == ("JOB", 4, 16)
    assert made["spec"]["model"]["depth"] == TINY["model"]["depth"]
    assert all(row["parent"]["learning_rate"] > 0 for row in made["rates"])
    assert [each["job_id"] for each in made["lineage"]] == ["JOB"]


def test_a_rate_that_jumps_is_refused_as_submit_would(
    trained: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERSTEP_STORAGE", trained.uri)
    given = ["--from", "JOB@4", "--set", "optimizer.smear_lr=9"]
    assert run(["plan", "--offline", *given]) == 4
    assert "smear" in capsys.readouterr().out


def test_nanochats_checkpoint_needs_its_folder_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        **SPEC,
        "data": TINY["data"],
        "start": {"from": f"nanochat:file:{NATIVE}@15"},
        "resources": {"gpus_per_worker": 0},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert run(["plan", "--offline", str(tmp_path / "spec.yaml"), "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["start_step"], made["steps"]) == (15, 2)
    assert all("parent" in row for row in made["rates"])


@pytest.mark.parametrize(
    ("storage", "start", "words"),
    [
        (None, "JOB@4", "EVERSTEP_STORAGE must name the bucket"),
        ("bucket", "JOB@5", "has at steps: 4"),
        ("bucket", "NOBODY@5", "there is no such job"),
    ],
)
def test_what_cannot_be_read_is_refused_by_field(
    trained: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    storage: str | None,
    start: str,
    words: str,
) -> None:
    if storage:
        monkeypatch.setenv("EVERSTEP_STORAGE", trained.uri)
    assert run(["plan", "--offline", "--from", start]) == 2
    said = capsys.readouterr().err
    assert "start.from" in said
    assert words in said
    assert "Traceback" not in said
