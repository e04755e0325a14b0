"""`compare` against scripted answers: curves on common steps, and figures that don't compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from everstep.cli.__main__ import run
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import FakeTrainingService


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as fake:
        monkeypatch.setenv("EVERSTEP_ADDRESS", fake.address)
        yield fake


def curve(name: str, rate: float, **fields: Any) -> pb.Curve:
    made: dict[str, Any] = {
        "job_id": f"01JOB{name}",
        "name": name,
        "loss_steps": [10, 20, 30],
        "loss": [5.0, 4.0 - rate, 3.0],
        "steps": [10, 20],
        "validation_bpb": [1.5, 1.25 - rate],
        "in_force": [pb.GroupValues(group="wte", learning_rate=rate)],
        "start_step": 0,
        "end_step": 30,
        "tokens": 7680,
        "train_s": 90.0,
        "evaluation_set": "A",
    }
    return pb.Curve(**{**made, **fields})


def answer(service: FakeTrainingService, *curves: pb.Curve, refused: str = "") -> None:
    difference = pb.SpecDifference(field="optimizer.embedding_lr", values=["0.1", "0.2"])
    service.script(
        CompareJobs=[
            pb.CompareJobsResponse(
                differences=[difference], curves=curves, validation_refused=refused
            )
        ]
    )


def test_differences_rates_tokens_time_and_both_curves_are_shown(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second was validated once more: common steps count.
    more = {"steps": [10, 20, 25], "validation_bpb": [1.5, 1.0, 0.5]}
    answer(service, curve("A", 0.1), curve("B", 0.2, **more))
    assert run(["compare", "01JOBA", "01JOBB"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    for row in (
        ["optimizer.embedding_lr", "0.1", "0.2"],
        ["tokens", "7,680", "7,680"],
        ["training", "time", "1", "min", "30", "s", "1", "min", "30", "s"],
        ["first", "rate:", "wte", "0.1", "0.2"],
        ["20", "3.9000", "3.8000", "*"],
        ["20", "1.1500", "1.0000", "*"],
    ):
        assert row in rows
    assert not any(row[:1] == ["25"] and "0.5000" in row for row in rows)
    braille = [line for line in shown.splitlines() if any("\u2800" < c <= "\u28ff" for c in line)]
    assert len(braille) >= 10  # two drawings, of loss and of bits per byte
    assert "\x1b" not in shown, "no colours in a pipe"


def test_figures_of_different_evaluation_sets_are_refused_and_not_drawn(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {"steps": [], "validation_bpb": []}
    refused = "validation figures were measured on different evaluation sets (A; B)"
    answer(service, curve("A", 0.1, **bare), curve("B", 0.2, **bare), refused=refused)
    assert run(["compare", "01JOBA", "01JOBB"]) == 0
    out, err = capsys.readouterr()
    assert f"not compared: {refused}" in err
    assert "bits/byte" not in out
    assert "loss at step" in out


def test_jobs_without_a_step_in_common_are_shown_side_by_side(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(service, curve("A", 0.1), curve("B", 0.2, loss_steps=[40], loss=[2.0]))
    assert run(["compare", "01JOBA", "01JOBB"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["40", "2.0000", "*"] in rows


def test_jobs_that_measured_nothing_yet_compare_by_their_specs(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {"steps": [], "validation_bpb": [], "loss_steps": [], "loss": []}
    answer(service, curve("A", 0.1, **bare), curve("B", 0.2, **bare))
    assert run(["compare", "01JOBA", "01JOBB"]) == 0
    assert "optimizer.embedding_lr" in capsys.readouterr().out
