"""Attempts that meet trouble: each ends with a name, a message and what was saved."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes.attempts import (
    LINE,
    Bucket,
    differing,
    process_settings_kept,
    ref_of,
    small_corpus,
)
from tests.fakes.corpus import write_corpus
from tests.fakes.reporter import RecordingReporter
from tests.unit.test_writer import Bench
from trainer import assembly
from trainer.attempt import _ended
from trainer.checkpoint.train_state import TrainState
from trainer.contract.outcome import Outcome
from trainer.distributed import World
from trainer.evaluate import EvaluationSums
from trainer.events import CheckpointCommitted, CheckpointPassedOver, Evaluated, Warned
from trainer.loop import LoopEnd
from trainer.start import Start
from trainer.storage.layout import manifest_key
from trainer.storage.manifest import CheckpointRef, Part

HORIZON = 12


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    with process_settings_kept():
        yield


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path)


def test_a_corrupt_checkpoint_is_passed_over_to_an_older_one_which_then_commits(
    bucket: Bucket,
) -> None:
    bucket.add("JOB")
    bucket.run("JOB")
    _, weights = bucket.checkpoint("JOB", HORIZON)
    newest = ref_of(bucket, "JOB", HORIZON)
    with bucket.part_file("JOB", newest).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    result, told = bucket.run("JOB")
    (passed,) = told.of(CheckpointPassedOver)
    assert passed.ref == newest
    assert "sha256" in passed.reason
    assert (result.outcome, result.checkpoint_step) == (Outcome.COMPLETED, HORIZON)
    current = bucket.repository("JOB").current()
    assert current[0] == CheckpointRef(job_id="JOB", step=HORIZON, attempt=2)
    assert newest not in current
    assert bucket.repository("JOB").verify(current[0]) == ()
    assert differing(weights, bucket.checkpoint("JOB", HORIZON)[1]) == []


def test_where_none_of_several_checkpoints_can_be_read_nothing_is_trained_over_them(
    bucket: Bucket,
) -> None:
    """As after a return to an older version, or with a disk that damages what it reads."""
    bucket.add("JOB")
    bucket.run("JOB", stop_at=HORIZON - 1)
    repository = bucket.repository("JOB")
    before = repository.current()
    assert len(before) >= 2
    for ref in before:
        key = manifest_key(ref.job_id, ref.step, ref.attempt)
        raw = repository.store.get(key)
        repository.store.put(key, raw.replace(b'"format_version": 1', b'"format_version": 2'))
    result, told = bucket.run("JOB")
    assert result.outcome is Outcome.CHECKPOINT_UNUSABLE
    assert f"none of {len(before)} checkpoints" in result.message
    assert "format_version 2" in result.message
    assert not told.points
    assert repository.current() == before
    assert [claim.attempt for claim in repository.claims()] == [1]


def test_a_first_checkpoint_that_is_damaged_costs_its_steps_alone(bucket: Bucket) -> None:
    bucket.add("JOB")
    bucket.run("JOB", stop_at=2)
    (first,) = bucket.repository("JOB").current()
    bucket.part_file("JOB", first).write_bytes(b"short")
    result, told = bucket.run("JOB")
    assert result.outcome is Outcome.COMPLETED
    assert [passed.ref for passed in told.of(CheckpointPassedOver)] == [first]
    assert told.points[0].step == 1


def test_what_jobs_that_were_killed_while_they_loaded_left_on_a_box_goes_after_its_time(
    bucket: Bucket,
) -> None:
    left = bucket.folder / "cache" / "restore" / "GONE-1"
    lately = left.with_name("LATELY-1")
    for folder in (left, lately):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    for path in (left / "part", left):
        os.utime(path, (0, 0))
    bucket.add("JOB")
    bucket.run("JOB", stop_at=1)
    assert (left.exists(), lately.exists()) == (False, True)


def doctored(bucket: Bucket, job_id: str, step: int, change: Any) -> None:
    """Commit, as a next attempt, a checkpoint whose tensors were changed but whose digests fit."""
    repository = bucket.repository(job_id)
    manifest, tensors = bucket.checkpoint(job_id, step)
    attempt = repository.claim(None, "surgeon").attempt
    path = bucket.folder / "doctored"
    save_file(change(tensors), path)
    part = Part.of_file(path, "part-00000.safetensors")
    ref = CheckpointRef(job_id=job_id, step=step, attempt=attempt)
    repository.upload_part(ref, part, path)
    repository.commit(manifest.model_copy(update={"attempt": attempt, "parts": (part,)}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_attempt_without_an_update(
    bucket: Bucket, value: float
) -> None:
    bucket.add("JOB")
    bucket.run("JOB", stop_at=4)
    poison = lambda tensors: {**tensors, "model.smear_lambda": torch.full((1,), value)}  # noqa: E731
    doctored(bucket, "JOB", 4, poison)
    before = bucket.repository("JOB").current()
    result, told = bucket.run("JOB")
    assert (result.outcome, result.step) == (Outcome.NOT_FINITE, 4)
    assert result.message.startswith("step 5: loss ")
    assert "no update was applied" in result.message
    assert result.message.endswith("the last good checkpoint is JOB@4")
    assert not told.points
    assert bucket.repository("JOB").current() == before


def test_a_validation_without_a_finite_figure_costs_no_checkpoint(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "evaluate", lambda *_: EvaluationSums(math.nan, 1))
    bucket.add("JOB")
    result, told = bucket.run("JOB")
    (measured,) = told.of(Evaluated)
    assert math.isnan(measured.bits_per_byte)
    assert (result.outcome, result.checkpoint_step) == (Outcome.COMPLETED, HORIZON)
    assert bucket.checkpoint("JOB", HORIZON)[0].validation_bpb is None


def test_a_checkpoint_of_another_model_is_unusable(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=2)
    bucket.add("CHILD", start=ref_of(bucket, "PARENT", 2), model={"depth": 4})
    result, _ = bucket.run("CHILD")
    assert result.outcome is Outcome.CHECKPOINT_UNUSABLE
    assert "transformer" in result.message or "model." in result.message


@pytest.mark.parametrize("lost", ["model.smear_lambda", "optimizer."])
def test_a_checkpoint_that_lacks_a_tensor_is_unusable(bucket: Bucket, lost: str) -> None:
    bucket.add("JOB")
    bucket.run("JOB", stop_at=2)
    without = lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(lost)}  # noqa: E731
    doctored(bucket, "JOB", 2, without)
    result, _ = bucket.run("JOB")
    assert result.outcome is Outcome.CHECKPOINT_UNUSABLE
    assert "missing" in result.message


def test_a_parents_corrupt_checkpoint_is_unusable(bucket: Bucket) -> None:
    bucket.add("PARENT")
    bucket.run("PARENT", stop_at=2)
    start = ref_of(bucket, "PARENT", 2)
    bucket.add("CHILD", start=start)
    bucket.part_file("PARENT", start).write_bytes(b"short")
    result, _ = bucket.run("CHILD")
    assert result.outcome is Outcome.CHECKPOINT_UNUSABLE
    assert "expected" in result.message


def test_a_shard_that_changed_is_named_and_how_far_training_got(bucket: Bucket) -> None:
    data = small_corpus(bucket.folder / "data")
    bucket.add("JOB", data=data)
    bucket.run("JOB", stop_at=1)
    other = write_corpus(bucket.folder / "other", [[["x" * 2000]], [["y" * 2000]], [["z"]]])
    for shard in other.shards:
        content = (bucket.folder / "other" / shard.name).read_bytes()
        (bucket.folder / "data" / shard.name).write_bytes(content)
    for cached in (bucket.folder / "cache" / "shards").rglob("*.parquet"):
        cached.unlink()
    result, _ = bucket.run("JOB")
    assert result.outcome is Outcome.DATA_CHANGED
    assert "shard_" in result.message


def test_a_failure_amid_training_says_at_which_step(bucket: Bucket) -> None:
    rows = [f"{n}: {LINE * 4}" for n in range(8)]
    folder = bucket.folder / "data"
    write_corpus(folder, [[rows], [rows], [rows], [rows]])
    for lost in sorted(folder.iterdir())[:3]:
        # The order of shards decides when it is met; of one the first step already is made.
        job_id = lost.stem.replace("_", "")
        bucket.add(job_id, data={"source": f"file:{folder}"}, schedule={"num_iterations": 1000})
        content = lost.read_bytes()
        lost.unlink()
        result, told = bucket.run(job_id)
        lost.write_bytes(content)
        for cached in (bucket.folder / "cache").rglob("*.parquet"):
            cached.unlink()
        assert result.outcome is Outcome.DATA_CHANGED
        assert lost.name in result.message
        assert result.step == len(told.points)
        if told.points:
            return
    raise AssertionError("no shard was met amid training")


def test_a_job_without_a_document_is_invalid(bucket: Bucket) -> None:
    result, _ = bucket.run("NOBODY")
    assert (result.outcome, result.attempt) == (Outcome.INVALID_JOB, 0)
    assert "spec.json" in result.message


def test_a_validation_set_smaller_than_asked_for_is_used_whole_and_said(bucket: Bucket) -> None:
    evaluate = {"every": 0, "tokens": 64 * 1000}
    bucket.add("JOB", data=small_corpus(bucket.folder / "data"), evaluate=evaluate)
    result, told = bucket.run("JOB")
    assert result.outcome is Outcome.COMPLETED
    (warned,) = told.of(Warned)
    assert warned.message.startswith("evaluate.tokens asks for 1000 rows of 64 tokens")
    (evaluated,) = told.of(Evaluated)
    assert math.isfinite(evaluated.bits_per_byte)


def test_documents_longer_than_the_context_and_empty_shards_are_trained_through(
    bucket: Bucket,
) -> None:
    folder = bucket.folder / "data"
    write_corpus(folder, [[[LINE * 200]], [], [[""], [LINE * 200, "a"]], [[LINE * 40]]])
    bucket.add("JOB", data={"source": f"file:{folder}"})
    result, told = bucket.run("JOB")
    assert result.outcome is Outcome.COMPLETED
    assert [point.step for point in told.points] == list(range(1, HORIZON + 1))


def test_data_without_a_whole_row_is_invalid(bucket: Bucket) -> None:
    folder = bucket.folder / "data"
    write_corpus(folder, [[["a"]], [[LINE * 20]]])
    bucket.add("JOB", data={"source": f"file:{folder}"})
    result, _ = bucket.run("JOB")
    assert result.outcome is Outcome.INVALID_JOB
    assert "no row of 65 tokens" in result.message


def test_a_writer_whose_claim_was_taken_over_ends_as_stale(bucket: Bucket) -> None:
    bucket.add("JOB", schedule={"num_iterations": 100_000}, checkpoint={"every_steps": 1})
    repository = bucket.repository("JOB")

    class TakenOver(RecordingReporter):
        def event(self, event: Any) -> None:
            super().event(event)
            if len(self.of(CheckpointCommitted)) == 1 and len(repository.claims()) == 1:
                repository.claim(None, "elsewhere")

    result, _ = bucket.run("JOB", reporter=TakenOver())
    assert (result.outcome, result.attempt) == (Outcome.STALE_WRITER, 1)
    assert result.step < 1000


def test_a_card_that_cuda_misses_is_a_lost_worker_and_no_training_on_the_cpu(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bucket.add("JOB")
    result, reporter = bucket.run("JOB", has_card=True)
    assert (result.outcome, result.attempt) == (Outcome.WORKER_LOST, 0)
    assert "CUDA has no device" in result.message
    assert reporter.points == []


class _OneOfTwo(World):
    """A rank whose fellow says what a test lets it."""

    others: tuple[bool, ...] = ()

    def all_true(self, *values: bool) -> list[bool]:
        return [own and other for own, other in zip(values, self.others, strict=True)]


@pytest.mark.parametrize(
    ("others", "outcome", "words"),
    [
        ((True, True, True), Outcome.COMPLETED, "done"),
        ((False, True, True), Outcome.STORE_UNAVAILABLE, "stays on the boxes' disks"),
        ((False, True, False), Outcome.STORE_UNAVAILABLE, "not every disk took it"),
        ((True, False, True), Outcome.STALE_WRITER, "a newer attempt"),
    ],
)
def test_an_attempt_ends_as_its_least_lucky_rank_does(
    tmp_path: Path, others: tuple[bool, ...], outcome: Outcome, words: str
) -> None:
    bench = Bench(tmp_path)
    bench.save(3)
    world = _OneOfTwo()
    object.__setattr__(world, "others", others)
    start = Start(1, None, TrainState(step=3), None, ())
    result = _ended(bench.writer, world, start, LoopEnd(Outcome.COMPLETED, "done"))
    assert (result.outcome, result.step) == (outcome, 3)
    assert words in result.message
    assert result.checkpoint_step == (None if outcome is Outcome.STALE_WRITER else 3)
    bench.close()
