"""Attempts that run out of memory or stand still: what is noted, said, and done next."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fakes.attempts import Bucket, differing, process_settings_kept
from tests.fakes.reporter import RecordingReporter
from trainer import attempt
from trainer.attempt import AttemptContext, run_attempt
from trainer.contract.outcome import EXIT_CODES, AttemptResult, Outcome
from trainer.distributed import World
from trainer.events import Point, Warned
from trainer.failures import outcome_of
from trainer.runtime import NoCardError
from trainer.watchdog import FIRST_STEPS_S, LEARN_STEPS, SURE_FACTOR, Stall, Watchdog

HORIZON = 12


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    with process_settings_kept():
        yield


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path)


class Exhausting(RecordingReporter):
    """Asks for more memory than any machine has, once a step is reached."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self._at = at_step

    def point(self, point: Point) -> None:
        super().point(point)
        if point.step == self._at:
            torch.empty(1 << 60, dtype=torch.uint8)


def test_out_of_memory_before_training_is_paid_from_the_budget_of_restarts(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.add("JOB")

    def exhausted(*_: object) -> None:
        raise MemoryError("for what the attempt starts from")

    monkeypatch.setattr(attempt, "_start", exhausted)
    result, _ = bucket.run("JOB")
    assert result.counts
    assert "out of memory before training began" in result.message


def test_out_of_memory_halves_the_device_batch_down_to_one_row_and_then_fails(
    bucket: Bucket,
) -> None:
    spec = bucket.add("JOB", batch={"device_batch_size": 4}, checkpoint={"every_steps": 1})
    ends, warnings = [], []
    for step in (3, 6, 9):
        result, told = bucket.run("JOB", reporter=Exhausting(step))
        ends.append((result.outcome, result.step))
        warnings.append([event.message for event in told.of(Warned)])
    assert ends == [
        (Outcome.OUT_OF_MEMORY, 3),
        (Outcome.OUT_OF_MEMORY, 6),
        (Outcome.OUT_OF_MEMORY_AT_ONE_ROW, 9),
    ]
    assert warnings[0] == []
    for said, rows in zip(warnings[1:], (2, 1), strict=True):
        (message,) = said
        assert message.startswith(f"device_batch_size {rows} instead of 4")
        assert f"the step stays {spec.batch.total_batch_size} tokens" in message
        assert "another order" in message
    assert "not even one row fits" in result.message


def test_a_lowered_device_batch_trains_the_same_tokens_and_outlives_host_and_service(
    bucket: Bucket,
) -> None:
    """It is in the bucket: an attempt that is told nothing goes on with it."""
    for job_id in ("WHOLE", "LOWERED"):
        bucket.add(job_id)
    _, whole = bucket.run("WHOLE")
    result, first = bucket.run("LOWERED", reporter=Exhausting(5))
    assert (result.outcome, result.checkpoint_step) == (Outcome.OUT_OF_MEMORY, None)
    assert "device_batch_size 2 does not fit, the next attempt takes 1" in result.message
    assert bucket.repository("LOWERED").too_large() == 2
    assert bucket.run("LOWERED", stop_at=8)[0].outcome is Outcome.STOPPED
    result, last = bucket.run("LOWERED")
    assert (result.outcome, result.attempt) == (Outcome.COMPLETED, 3)
    assert last.of(Warned)[0].message.startswith("device_batch_size 1 instead of 2")
    one, other = (bucket.checkpoint(job_id, HORIZON)[0] for job_id in ("WHOLE", "LOWERED"))
    assert one.state["position"] == other.state["position"]
    assert one.state["tokens"] == other.state["tokens"]
    assert [point.loss for point in first.points] == [point.loss for point in whole.points[:5]]
    for point in last.points:  # sums in another order
        assert point.loss == pytest.approx(whole.points[point.step - 1].loss, rel=1e-2)


def test_attempts_at_one_lowered_batch_agree_to_the_bit(bucket: Bucket) -> None:
    for job_id in ("ONE", "OTHER"):
        bucket.add(job_id)
        bucket.run(job_id, reporter=Exhausting(1))
    bucket.run("ONE")
    bucket.run("OTHER", stop_at=7)
    bucket.run("OTHER")
    one, other = (bucket.checkpoint(job_id, HORIZON)[1] for job_id in ("ONE", "OTHER"))
    assert differing(one, other) == []


class Frozen(RecordingReporter):
    """Holds the training thread at a step until it is let go."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self._at = at_step
        self.let_go = threading.Event()

    def point(self, point: Point) -> None:
        super().point(point)
        if point.step == self._at:
            assert self.let_go.wait(300), "the watchdog did not end the attempt"


def test_an_attempt_that_stands_still_says_where_every_rank_is_and_ends(bucket: Bucket) -> None:
    bucket.add("JOB")
    reporter = Frozen(LEARN_STEPS + 1)
    ends: list[AttemptResult] = []
    exits: list[int] = []

    def end_process(status: int) -> None:
        exits.append(status)
        reporter.let_go.set()

    run_attempt(
        AttemptContext(
            job_id="JOB",
            storage_uri=bucket.uri,
            cache_dir=str(bucket.folder / "cache"),
            host="here",
            threads=1,
            reporter=reporter,
            stacks=lambda rank, text: {0: text, 1: "rank 1's place"},
            on_stall=ends.append,
            end_process=end_process,
            stall_floor_s=0.0,
            watch_tick_s=0.05,
        ),
        World(),
    )
    assert exits == [EXIT_CODES[Outcome.STALLED]]
    (result,) = ends
    assert (result.outcome, result.attempt, result.step) == (Outcome.STALLED, 1, LEARN_STEPS + 1)
    own, other = (event.message for event in reporter.of(Warned))
    assert "rank 0 is at" in own
    assert "self.let_go.wait(300)" in own, "the line that the training thread is at"
    assert other.endswith("rank 1 is at\nrank 1's place")


def watched(steps: int, step_s: float = 1.0) -> Watchdog:
    dog = Watchdog(lambda stall: None, floor_s=30.0, tick_s=10.0)
    for _ in range(steps):
        dog.step(step_s)
    return dog


def test_a_step_is_late_after_the_floor_and_many_times_the_median() -> None:
    dog = watched(LEARN_STEPS)
    assert [bool(dog.tick()) for _ in range(4)] == [False, False, True, False]
    slow = watched(LEARN_STEPS, step_s=4.0)  # 20 times that is 80 s
    assert [bool(slow.tick()) for _ in range(9)] == [False] * 7 + [True, False]
    dog.step(1.0)
    assert dog.tick() is None, "a step has come: it was only slow"


def test_a_late_step_ends_the_attempt_only_where_it_stays_away() -> None:
    dog = watched(LEARN_STEPS)
    found = [stall for _ in range(6) if isinstance(stall := dog.tick(), Stall)]
    assert [(stall.silent_s, stall.sure) for stall in found][:2] == [
        (30.0, False),
        (30.0 * SURE_FACTOR // 10 * 10 + 10, True),
    ]


def test_a_first_step_that_takes_an_hour_is_no_longer_taken_for_compiling() -> None:
    dog = watched(LEARN_STEPS - 1)
    found = [stall for _ in range(600) if isinstance(stall := dog.tick(), Stall)]
    assert (found[0].silent_s, found[0].sure) == (FIRST_STEPS_S, False)
    assert found[1].sure
    assert "one of its first steps" in found[0].words
    dog.step(1.0)
    assert dog.tick() is None


def test_compiling_waiting_and_saving_are_never_taken_for_a_standstill() -> None:
    compiling = watched(LEARN_STEPS - 1)
    assert [compiling.tick() for _ in range(100)] == [None] * 100
    dog = watched(LEARN_STEPS)
    with dog.elsewhere():
        assert [dog.tick() for _ in range(100)] == [None] * 100
    assert dog.tick() is None


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError(), Outcome.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Outcome.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Outcome.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), Outcome.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), Outcome.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), Outcome.WORKER_LOST),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), Outcome.WORKER_LOST),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), Outcome.WORKER_LOST),
        (torch.AcceleratorError("HIP error: invalid device"), Outcome.WORKER_LOST),
        (NoCardError("no device"), Outcome.WORKER_LOST),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Outcome.CODE_ERROR),
        (torch.distributed.DistBackendError("NCCL error in: x"), Outcome.COLLECTIVE_FAILED),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] closed"), Outcome.COLLECTIVE_FAILED),
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.STORE_UNAVAILABLE),
        (RuntimeError("no such device"), Outcome.CODE_ERROR),
    ],
)
def test_errors_are_named_by_what_they_mean(error: Exception, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome
