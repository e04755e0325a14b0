"""Whole attempts of a tiny model in this process: not one step is lost, and ends have names."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.fakes.attempts import Bucket, differing, process_settings_kept, ref_of, small_corpus
from tests.fakes.reporter import PacingReporter, RecordingReporter
from trainer.contract.outcome import AttemptResult, Outcome
from trainer.distributed import World
from trainer.events import (
    CheckpointCommitted,
    Directive,
    Evaluated,
    Sampled,
    ValuesInForce,
    Warned,
)

HORIZON = 12
RATES = {
    "embedding_lr": 0.05,
    "unembedding_lr": 0.002,
    "matrix_lr": 0.004,
    "scalar_lr": 0.1,
    "smear_lr": 0.3,
    "weight_decay": 0.1,
}


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    with process_settings_kept():
        yield


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path)


@pytest.mark.parametrize(("precision", "stops"), [("fp32", (1, 2, 3, 4, 5)), ("bf16", (3,))])
def test_a_run_stopped_at_any_step_ends_as_the_undisturbed_one(
    bucket: Bucket, precision: str, stops: tuple[int, ...]
) -> None:
    data = small_corpus(bucket.folder / "data")
    sections = {
        "data": data,
        "precision": {"compute": precision},
        "schedule": {"num_iterations": 6},
        "optimizer": {"grad_clip_norm": 1.0},
    }
    bucket.add("WHOLE", **sections)
    result, told = bucket.run("WHOLE")
    assert result == AttemptResult(1, Outcome.COMPLETED, "reached the horizon, step 6", 6, 6)
    whole, weights = bucket.checkpoint("WHOLE", 6)
    losses = [point.loss for point in told.points]
    assert whole.state["position"]["epoch"] >= 2  # type: ignore[index, operator, call-overload]
    for stop_at in stops:
        job_id = f"STOPPED{stop_at}"
        bucket.add(job_id, **sections)
        first, before = bucket.run(job_id, stop_at)
        assert (first.outcome, first.step, first.checkpoint_step) == (
            Outcome.STOPPED,
            stop_at,
            stop_at,
        )
        second, after = bucket.run(job_id)
        assert (second.outcome, second.attempt) == (Outcome.COMPLETED, 2)
        assert [point.loss for point in before.points + after.points] == losses
        assert after.points[0].step == stop_at + 1
        manifest, resumed = bucket.checkpoint(job_id, 6)
        assert differing(weights, resumed) == []
        assert manifest.state == whole.state
        assert after.of(Evaluated) == told.of(Evaluated)


def test_what_was_lost_since_the_last_checkpoint_is_trained_again_to_the_bit(
    bucket: Bucket,
) -> None:
    bucket.add("JOB")
    bucket.run("JOB", stop_at=4)
    bucket.run("JOB")
    _, weights = bucket.checkpoint("JOB", HORIZON)
    for ref in bucket.repository("JOB").current():
        if ref.step > 4:  # as if the process had died before they were committed
            bucket.part_file("JOB", ref).with_name("manifest.json").unlink()
    result, told = bucket.run("JOB")
    assert (result.outcome, result.attempt) == (Outcome.COMPLETED, 3)
    assert told.points[0].step == 5
    assert differing(weights, bucket.checkpoint("JOB", HORIZON)[1]) == []


def test_an_attempt_at_the_horizon_has_nothing_left_to_do(bucket: Bucket) -> None:
    bucket.add("JOB")
    bucket.run("JOB")
    result, told = bucket.run("JOB")
    assert (result.outcome, result.attempt, result.step) == (Outcome.COMPLETED, 2, HORIZON)
    assert not told.points
    assert told.closed


def test_what_stops_training_between_steps_is_told_with_its_seconds(bucket: Bucket) -> None:
    bucket.add("JOB", evaluate={"every": 3, "tokens": 256}, sample={"every": 6})
    _, told = bucket.run("JOB")
    assert [event.step for event in told.of(Evaluated) if event.took_s > 0] == [3, 6, 9, 12]
    assert [event.step for event in told.of(Sampled) if event.took_s > 0] == [6, 12]
    assert [point.step for point in told.points if point.checkpoint_s > 0] == [5, 9]


def test_a_stop_before_the_first_step_leaves_no_checkpoint(bucket: Bucket) -> None:
    bucket.add("JOB")
    result, told = bucket.run("JOB", stop_at=0)
    assert (result.outcome, result.step, result.checkpoint_step) == (Outcome.STOPPED, 0, None)
    assert not told.points
    assert bucket.repository("JOB").current() == []


def test_the_first_step_tells_the_values_in_force_and_each_commit_is_told(bucket: Bucket) -> None:
    bucket.add("JOB")
    _, told = bucket.run("JOB")
    (values,) = told.of(ValuesInForce)
    assert values.step == 1
    assert values.groups == told.points[0].groups
    assert values.device is not None
    assert values.device.name == "cpu"
    assert values.device.memory_bytes is not None
    assert 0 < (values.device.free_bytes or 0) <= values.device.memory_bytes
    assert {point.mfu_ratio for point in told.points} == {None}, "a CPU's peak is not known"
    committed = [event.ref.step for event in told.of(CheckpointCommitted)]
    assert committed[-1] == HORIZON
    assert set(committed) <= {4, 8, 12}
    assert [point.step for point in told.points] == list(range(1, HORIZON + 1))
    assert told.points[-1].tokens == HORIZON * 256
    assert all(math.isfinite(point.loss) for point in told.points)


def test_a_continuation_with_nothing_changed_is_the_run_itself(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=4)
    _, parent = bucket.run("PARENT")
    bucket.add("CHILD", start=ref_of(bucket, "PARENT", 4))
    result, told = bucket.run("CHILD")
    assert result.outcome is Outcome.COMPLETED
    assert [p.loss for p in told.points] == [p.loss for p in parent.points]
    manifest, weights = bucket.checkpoint("CHILD", HORIZON)
    assert differing(weights, bucket.checkpoint("PARENT", HORIZON)[1]) == []
    assert manifest.parent == ref_of(bucket, "PARENT", 4)
    assert manifest.state["tokens"] == 8 * 256  # its own


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_job_cancelled_at_any_step_and_continued_ends_as_the_undisturbed_one(
    bucket: Bucket, precision: str
) -> None:
    """To cancel is to stop for good; the same spec then goes on as a job of its own."""
    sections: dict[str, Any] = {
        "data": small_corpus(bucket.folder / "data"),
        "precision": {"compute": precision},
        "schedule": {"num_iterations": HORIZON, "warmup_steps": 3, "warmdown_ratio": 0.5},
    }
    bucket.add("WHOLE", **sections)
    _, told = bucket.run("WHOLE")
    whole, weights = bucket.checkpoint("WHOLE", HORIZON)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown where the test fails
    cancelled_at = random.Random(seed).randint(1, HORIZON - 1)
    bucket.add("CANCELLED", **sections)
    stopped, before = bucket.run("CANCELLED", stop_at=cancelled_at)
    assert (stopped.outcome, stopped.checkpoint_step) == (Outcome.STOPPED, cancelled_at)
    bucket.add("CONTINUED", start=ref_of(bucket, "CANCELLED", cancelled_at), **sections)
    result, after = bucket.run("CONTINUED")
    assert (result.outcome, result.attempt) == (Outcome.COMPLETED, 1)
    assert [point.loss for point in before.points + after.points] == [
        point.loss for point in told.points
    ]
    manifest, continued = bucket.checkpoint("CONTINUED", HORIZON)
    assert differing(weights, continued) == []
    for field in ("position", "in_force", "counters", "loss_smoothed"):
        assert manifest.state[field] == whole.state[field], field


def test_a_continuation_trains_with_its_own_rates_decay_and_horizon(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=8)
    bucket.run("PARENT")
    start = ref_of(bucket, "PARENT", 8)
    horizon = 20
    bucket.add(
        "CHILD",
        start=start,
        optimizer=RATES,
        schedule={"num_iterations": horizon, "warmdown_ratio": 0.9},
    )
    _, told = bucket.run("CHILD", stop_at=12)
    assert bucket.run("CHILD")[0].step == horizon
    (values,) = told.of(ValuesInForce)
    # By the formulas of the reference, not by our own code: width 32, 256 tokens a step.
    k, m = math.sqrt(256 / 524288), math.sqrt(768 / 32)
    left = (horizon - 8) / 18
    multiplier = left + (1 - left) * 0.05
    base = {
        "lm_head": 0.002 * k * m,
        "wte": 0.05 * k * m,
        "value_embeds": 0.05 * k * m / 2,
        "resid": 0.1 * k / 100,
        "x0": 0.1 * k,
        "smear": 0.3,
    }
    for group, found in values.groups.items():
        expected = base.get(group, 0.004 * k) * multiplier
        assert found.lr == pytest.approx(expected, rel=1e-12, abs=0), group
    position = bucket.checkpoint("PARENT", 8)[0].state["position"]
    assert told.points[0].step == 9
    assert not told.of(Warned)
    # The data goes on where the parent stood: its first loss is the parent's at that step.
    bucket.add("SAME", start=start)
    _, same = bucket.run("SAME")
    assert told.points[0].loss == same.points[0].loss
    assert position != bucket.checkpoint("CHILD", horizon)[0].state["position"]
    # And one step moves the weights by other amounts.
    assert differing(bucket.checkpoint("CHILD", 12)[1], bucket.checkpoint("PARENT", 12)[1])


def test_a_continuation_on_other_data_begins_at_its_first_row_and_says_so(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=4)
    start = ref_of(bucket, "PARENT", 4)
    bucket.add("CHILD", start=start, data={"order_seed": 1})
    _, told = bucket.run("CHILD", stop_at=5)
    assert "begins at its first row" in told.of(Warned)[0].message
    bucket.add("FRESH", data={"order_seed": 1})
    bucket.run("FRESH", stop_at=1)
    positions = [
        bucket.checkpoint(job, step)[0].state["position"]
        for job, step in (("CHILD", 5), ("FRESH", 1))
    ]
    assert positions[0] == positions[1]


def test_a_continuation_that_is_resumed_keeps_its_schedule(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=4)
    start = ref_of(bucket, "PARENT", 4)
    for job in ("WHOLE", "RESUMED"):
        bucket.add(job, start=start, schedule={"anchor": "continue"}, optimizer=RATES)
    bucket.run("WHOLE")
    bucket.run("RESUMED", stop_at=7)
    bucket.run("RESUMED")
    assert (
        differing(bucket.checkpoint("WHOLE", HORIZON)[1], bucket.checkpoint("RESUMED", HORIZON)[1])
        == []
    )


def pacing(stop_at: int | None = None) -> PacingReporter:
    return PacingReporter({} if stop_at is None else {stop_at: Directive.STOP})


def one_rank(
    folder: str, rank: int, stop_at: int | None = None
) -> tuple[AttemptResult, RecordingReporter]:
    """A rank of two."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        world = World(rank, 2, rank)
        reporter = pacing(stop_at) if world.is_first else None
        return Bucket(Path(folder)).run("RESIZED", stop_at, world, reporter)
    finally:
        dist.destroy_process_group()


def test_one_then_two_then_one_worker_train_what_one_does(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "data": small_corpus(bucket.folder / "data"),
        "schedule": {"num_iterations": 6},
        "checkpoint": {"every_steps": 1},
    }
    for job_id in ("ONE", "RESIZED"):
        bucket.add(job_id, **sections)
    _, alone = bucket.run("ONE", reporter=pacing())
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.test_attempt", str(bucket.folder)],
        cwd=root,
        env=environment,
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    told = [bucket.run("RESIZED", reporter=pacing(stop_at=2))]
    # Told after step 3, it travels with the sums of step 4.
    told.append(one_rank(str(bucket.folder), 0, stop_at=3))
    assert other.wait(timeout=120) == 0
    told.append(bucket.run("RESIZED", reporter=pacing()))
    assert [result.step for result, _ in told] == [2, 4, 6]
    points = [point for _, reporter in told for point in reporter.points]
    for point, own in zip(points, alone.points, strict=True):
        assert (point.step, point.tokens) == (own.step, own.tokens)
        assert point.loss == pytest.approx(own.loss, rel=1e-6)
    for step in range(1, 7):  # the same tokens in the same order
        positions = [
            bucket.checkpoint(job, step)[0].state["position"] for job in ("ONE", "RESIZED")
        ]
        assert positions[0] == positions[1]
    # Both jobs have the very same state at step 2: one step of two workers is one of one.
    assert differing(bucket.checkpoint("ONE", 2)[1], bucket.checkpoint("RESIZED", 2)[1]) == []
    (_, weights), (two, shared) = (bucket.checkpoint(job, 3) for job in ("ONE", "RESIZED"))
    for name, tensor in weights.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-6, atol=1e-6)
    written = [(part.name[:10], part.size_bytes) for part in two.parts]
    assert [rank for rank, _ in written] == ["part-00000", "part-00001"]
    assert written[1][1] > written[0][1] / 2, "each wrote about half"
    assert list((bucket.folder / "cache" / "spool").iterdir()) == []


if __name__ == "__main__":
    sys.exit(one_rank(sys.argv[1], 1)[0].outcome is not Outcome.STOPPED)
