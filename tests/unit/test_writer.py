"""The background writer: what it commits, what it gives up, and what it does about trouble."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from tests.fakes.reporter import RecordingReporter
from trainer.checkpoint import writer as module
from trainer.checkpoint.train_state import Snapshot
from trainer.checkpoint.writer import CheckpointWriter, Provenance
from trainer.events import CheckpointCommitted, Warned
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention

WAIT_S = 20.0


class Bench:
    """A writer over a scripted store, with attempt 1 claimed."""

    def __init__(self, folder: Path, keep_last: int = 10) -> None:
        self.store = FlakyStore(MemoryObjectStore())
        self.repository = CheckpointRepository(self.store, "JOB")
        self.repository.claim(None, "here")
        self.reporter = RecordingReporter()
        self.scratch = folder / "spool"
        self.writer = CheckpointWriter(
            self.repository,
            Provenance(1, "0" * 64, None, {"data": "d"}, {"torch": "t"}),
            Retention(keep_last, 0, False),
            self.scratch,
            self.reporter,
        )

    def save(self, step: int) -> None:
        tensors = {"model.a": torch.full((3,), float(step)), "model.b": torch.arange(4.0)}
        self.writer.save(Snapshot(tensors, {"step": step}, step, 1.5), 0.25)

    def steps(self) -> list[int]:
        return sorted(ref.step for ref in self.repository.current())

    def commits(self) -> list[int]:
        return [event.ref.step for event in self.reporter.of(CheckpointCommitted)]

    def warnings(self) -> list[str]:
        return [event.message for event in self.reporter.of(Warned)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(module, "BACKOFF_S", (0.005,))
    made = Bench(tmp_path)
    yield made
    made.store.gate.set()
    made.writer.close()


def test_a_snapshot_becomes_a_checkpoint_that_can_be_trusted(bench: Bench) -> None:
    bench.save(5)
    assert bench.writer.drain(WAIT_S)
    (ref,) = bench.repository.current()
    assert bench.writer.committed == ref
    manifest = bench.repository.manifest(ref)
    assert (manifest.state, manifest.validation_bpb) == ({"step": 5}, 1.5)
    assert bench.repository.verify(ref) == ()
    (part,) = manifest.parts
    tensors = load(b"".join(bench.repository.open_part(ref, part)))
    assert tensors["model.a"].tolist() == [5.0] * 3
    assert part.tensors == ("model.a", "model.b")
    (event,) = bench.reporter.of(CheckpointCommitted)
    assert (event.ref, event.size_bytes, event.stall_s) == (ref, manifest.size_bytes, 0.25)
    assert list(bench.scratch.iterdir()) == []


def test_large_state_is_divided_into_parts_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 16)
    bench.save(5)
    assert bench.writer.drain(WAIT_S)
    manifest = bench.repository.manifest(bench.repository.current()[0])
    assert [part.tensors for part in manifest.parts] == [("model.a",), ("model.b",)]


def test_the_newest_snapshot_takes_the_place_of_one_that_waits(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.save(1)
    assert bench.store.waits.wait(WAIT_S)
    for step in (2, 3, 4):
        bench.save(step)
    bench.store.gate.set()
    assert bench.writer.drain(WAIT_S)
    assert bench.steps() == bench.commits() == [1, 4]


def test_trouble_is_told_once_and_tried_again_until_the_store_is_back(bench: Bench) -> None:
    fault = bench.store.script("put_file", times=5)
    bench.save(7)
    assert bench.writer.drain(WAIT_S)
    assert fault.fired == 5
    assert bench.steps() == bench.commits() == [7]
    (warning,) = bench.warnings()
    assert warning.startswith("checkpoint at step 7: scripted")


def test_a_newer_snapshot_ends_the_tries_for_an_older_one(bench: Bench) -> None:
    bench.store.away = True
    bench.save(1)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    bench.save(2)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 2)
    bench.store.away = False
    assert bench.writer.drain(WAIT_S)
    assert bench.commits() == [2]


@pytest.mark.parametrize("call", ["put_file", "head", "list", "put "])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_answer_lost_at_any_call_costs_nothing(bench: Bench, call: str, after: bool) -> None:
    fault = bench.store.script(f"{call}", times=1, after=after)
    bench.save(3)
    assert bench.writer.drain(WAIT_S)
    assert fault.fired == 1
    assert bench.commits() == bench.steps() == [3]
    assert bench.repository.verify(bench.repository.current()[0]) == ()


def test_a_claim_that_can_not_be_read_is_trouble_like_any_other(bench: Bench) -> None:
    bench.store.put("jobs/JOB/attempts/2.json", b"{torn")
    bench.save(3)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    assert "not JSON" in bench.warnings()[0]
    bench.store.delete("jobs/JOB/attempts/2.json")
    assert bench.writer.drain(WAIT_S)
    assert bench.commits() == [3]


def test_a_scratch_folder_that_takes_no_file_is_trouble_like_any_other(bench: Bench) -> None:
    in_the_way = bench.scratch / "JOB-1-3" / "part-00000.safetensors"
    in_the_way.mkdir(parents=True)
    bench.save(3)
    assert bench.writer.drain(WAIT_S)
    assert len(bench.warnings()) == 1
    assert bench.commits() == [3]


def test_a_stale_writer_says_so_and_commits_nothing(bench: Bench) -> None:
    bench.save(1)
    assert bench.writer.drain(WAIT_S)
    bench.repository.claim(bench.repository.current()[0], "elsewhere")
    bench.save(2)
    assert bench.writer.drain(WAIT_S)
    assert bench.writer.stale
    assert bench.steps() == [1]
    assert bench.writer.committed is not None
    assert bench.writer.committed.step == 1


def test_draining_is_bounded_while_the_store_is_away(bench: Bench) -> None:
    bench.store.away = True
    bench.save(1)
    assert not bench.writer.drain(0.05)
    assert bench.writer.committed is None


def test_closing_gives_up_what_waits_and_what_is_tried_again(bench: Bench) -> None:
    bench.store.away = True
    bench.save(1)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    closing = threading.Thread(target=bench.writer.close)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    bench.store.away = False
    assert bench.steps() == []


def test_draining_an_idle_writer_returns_at_once(bench: Bench) -> None:
    assert bench.writer.drain(0.0)


def test_old_checkpoints_go_and_trouble_with_that_is_only_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_last=2)
    try:
        for step in (1, 2, 3):
            bench.save(step)
            assert bench.writer.drain(WAIT_S)
        assert bench.steps() == [2, 3]
        fault = bench.store.script("delete", times=1)
        bench.save(4)
        assert bench.writer.drain(WAIT_S)
        assert fault.fired == 1
        assert bench.commits() == [1, 2, 3, 4]
        assert "old checkpoints stay" in bench.warnings()[0]
        bench.save(5)
        assert bench.writer.drain(WAIT_S)
        assert bench.steps() == [4, 5]
    finally:
        bench.writer.close()
