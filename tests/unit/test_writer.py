"""The background writer: what it commits, what it gives up, and what it does about trouble."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn

from tests.fakes.checkpoints import StillOptimizer
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from tests.fakes.reporter import RecordingReporter
from trainer.checkpoint import shares
from trainer.checkpoint import writer as module
from trainer.checkpoint.snapshot import Snapshots
from trainer.checkpoint.spool import ABANDONED_S, Spool, salvage, sweep
from trainer.checkpoint.train_state import TrainState
from trainer.checkpoint.writer import CheckpointWriter, Provenance, Upcoming, Waits
from trainer.distributed import World
from trainer.events import CheckpointCommitted, Warned
from trainer.storage import layout
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention, put_in_force

WAIT_S = 20.0


class Model(nn.Module):
    """Two parameters that a test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.arange(4.0))


class Bench:
    """A rank's writer over a scripted store, with attempt 1 claimed."""

    def __init__(
        self,
        folder: Path,
        keep_last: int = 10,
        world: World | None = None,
        store: FlakyStore | None = None,
    ) -> None:
        self.store = store or FlakyStore(MemoryObjectStore())
        self.repository = CheckpointRepository(self.store, "JOB")
        if not self.repository.claims():
            self.repository.claim(None, "here")
        self.reporter = RecordingReporter()
        self.scratch = folder / "spool"
        self.model = Model()
        self.writer = CheckpointWriter(
            self.repository,
            Provenance(1, "0" * 64, None, {"data": "d"}, {"torch": "t"}),
            Retention(keep_last, 0, False),
            Snapshots(self.model, StillOptimizer(world or World()), world or World()),
            Spool(self.scratch, "JOB"),
            self.reporter,
            world or World(),
        )

    def save(self, step: int, upcoming: Upcoming | None = None) -> None:
        self.writer.wait_for_room()
        said = upcoming or self.writer.upcoming(self.writer.well)
        self.model.a.data.fill_(float(step))
        taken = self.writer.snapshots.take(TrainState(step=step, validation_bpb=1.5))
        self.writer.save(taken, Waits(0.25), said)

    def steps(self) -> list[int]:
        return sorted(ref.step for ref in self.repository.current())

    def commits(self) -> list[int]:
        return [event.ref.step for event in self.reporter.of(CheckpointCommitted)]

    def warnings(self) -> list[str]:
        return [event.message for event in self.reporter.of(Warned)]

    def on_disk(self) -> list[int]:
        return [ref.step for ref in Spool(self.scratch, "JOB").refs()]

    def close(self) -> None:
        self.store.gate.set()
        self.writer.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pauses", lambda: itertools.repeat(0.005))
    monkeypatch.setattr(module, "SHARE_POLL_S", 0.005)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_snapshot_becomes_a_checkpoint_that_can_be_trusted(bench: Bench) -> None:
    bench.save(5)
    assert bench.writer.drain(WAIT_S)
    (ref,) = bench.repository.current()
    assert bench.writer.committed == ref
    manifest = bench.repository.manifest(ref)
    assert (manifest.state["step"], manifest.validation_bpb) == (5, 1.5)
    assert bench.repository.verify(ref) == ()
    (part,) = manifest.parts
    tensors = load(b"".join(bench.repository.open_part(ref, part)))
    assert tensors["model.a"].tolist() == [5.0] * 3
    assert part.tensors == ("model.a", "model.b")
    (event,) = bench.reporter.of(CheckpointCommitted)
    assert (event.ref, event.size_bytes, event.stall_s) == (ref, manifest.size_bytes, 0.25)
    assert bench.on_disk() == []  # the store has it
    bench.close()
    assert list(bench.scratch.iterdir()) == []


def test_large_state_is_divided_into_parts_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "PART_BYTES", 16)
    divided = Bench(bench.scratch / "other", store=bench.store)
    divided.save(5)
    assert divided.writer.drain(WAIT_S)
    divided.close()
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


def test_what_was_given_up_leaves_nothing_in_the_store(bench: Bench) -> None:
    for step in (1, 2):
        fault = bench.store.script(f"put jobs/JOB/checkpoints/{step:010d}", times=10**6)
        bench.save(step)
        bench.reporter.wait_for(lambda number=step: len(bench.reporter.events) == number)
        assert fault.fired
    bench.save(3)
    assert bench.writer.drain(WAIT_S)
    assert bench.commits() == [3]
    there = {info.key for info in bench.store.list(layout.checkpoints_prefix("JOB"))}
    assert {named.step for key in there if (named := layout.parse_checkpoint(key))} == {3}


def test_trouble_is_told_once_and_tried_again_until_the_store_is_back(bench: Bench) -> None:
    fault = bench.store.script("put_file", times=5)
    bench.save(7)
    assert bench.writer.drain(WAIT_S)
    assert fault.fired == 5
    assert bench.steps() == bench.commits() == [7]
    (warning,) = bench.warnings()
    assert warning.startswith("checkpoint at step 7: scripted")
    assert warning.endswith("safe on this box's disk")


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
    in_the_way = bench.scratch / "JOB" / "3-1" / "part-00000-00000.safetensors"
    in_the_way.mkdir(parents=True)
    bench.save(3)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    assert not bench.writer.well
    in_the_way.rmdir()
    assert bench.writer.drain(WAIT_S)
    assert len(bench.warnings()) == 1
    assert bench.commits() == [3]


def test_a_full_disk_is_trouble_like_any_other(bench: Bench) -> None:
    """The file lies on a device that is always full: a real ENOSPC."""
    full = bench.scratch / "JOB" / "3-1" / "part-00000-00000.safetensors"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    bench.save(3)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    assert "No space left" in bench.warnings()[0]
    bench.save(4)  # memory for it is there, and it takes the place of the other
    assert bench.writer.drain(WAIT_S)
    assert bench.commits() == [4]


def test_the_newest_checkpoint_is_on_disk_while_the_store_is_away(bench: Bench) -> None:
    bench.store.away = True
    for step in (1, 2, 3, 4, 5):
        bench.save(step)
        wait_until(lambda step=step: bench.on_disk()[:1] == [step])
    assert bench.writer.snapshots.room
    wait_until(lambda: bench.on_disk() == [5, 4])  # the older ones go a moment later


def test_a_disk_that_fills_up_keeps_the_newest_checkpoint_that_is_whole(bench: Bench) -> None:
    bench.store.away = True
    bench.save(1)
    bench.reporter.wait_for(lambda: len(bench.reporter.events) == 1)
    for step in (2, 3, 4):
        full = bench.scratch / "JOB" / f"{step}-1" / "part-00000-00000.safetensors"
        full.parent.mkdir(parents=True)
        full.symlink_to("/dev/full")
        bench.save(step)
        begun = f"checkpoint at step {step}: "
        bench.reporter.wait_for(lambda begun=begun: begun in " ".join(bench.warnings()))
    assert sum("No space left" in words for words in bench.warnings()) == 3
    spool = Spool(bench.scratch, "JOB")
    assert [ref.step for ref in spool.refs() if spool.shares(ref)] == [1]


def test_what_only_the_disk_has_is_stored_by_the_next_attempt_on_this_box(
    bench: Bench,
) -> None:
    bench.save(1)
    assert bench.writer.drain(WAIT_S)
    bench.store.away = True
    bench.save(2)
    bench.reporter.wait_for(lambda: len(bench.warnings()) == 1)
    bench.close()
    bench.store.away = False
    spool = Spool(bench.scratch, "JOB")
    assert salvage(spool, bench.repository, commits=False) == []
    assert [ref.step for ref in salvage(spool, bench.repository, commits=True)] == [2]
    assert bench.steps() == [1, 2]
    assert bench.repository.verify(bench.repository.current()[0]) == ()
    assert salvage(spool, bench.repository, commits=True) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "superseded"])
def test_what_can_not_be_trusted_on_disk_is_not_stored(bench: Bench, harm: str) -> None:
    bench.store.away = True
    bench.save(2)
    bench.reporter.wait_for(lambda: len(bench.warnings()) == 1)
    bench.close()
    bench.store.away = False
    path = bench.scratch / "JOB" / "2-1" / "part-00000-00000.safetensors"
    whole = path.read_bytes()
    if harm == "flip":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(whole[:-1])
    else:
        bench.repository.claim(None, "elsewhere")
    for commits in (False, True):
        assert salvage(Spool(bench.scratch, "JOB"), bench.repository, commits) == []
    assert bench.steps() == []


def test_ranks_write_a_share_each_and_the_first_commits(tmp_path: Path) -> None:
    store = FlakyStore(MemoryObjectStore())
    ranks = [Bench(tmp_path / str(r), world=World(r, 2, r), store=store) for r in range(2)]
    first, second = ranks
    first.save(1)
    wait_until(lambda: any("put_file" in call for call in store.calls))
    assert first.commits() == []  # it waits for the other's share
    second.save(1, Upcoming(-1, ()))
    for rank in ranks:
        assert rank.writer.drain(WAIT_S)
    assert first.steps() == first.commits() == [1]
    manifest = first.repository.manifest(first.repository.current()[0])
    assert [part.tensors for part in manifest.parts] == [("model.b",), ("model.a",)]
    assert first.repository.verify(manifest.ref) == ()
    assert (first.on_disk(), second.on_disk()) == ([], [1])
    second.writer.forget(1)
    assert second.on_disk() == []
    for rank in ranks:
        rank.close()


def test_a_rank_that_is_done_leaves_the_box_what_another_still_uploads(tmp_path: Path) -> None:
    stores = [FlakyStore(MemoryObjectStore()) for _ in range(2)]
    stores[1].inner = stores[0].inner
    first, second = (
        Bench(tmp_path, world=World(r, 2, r), store=store) for r, store in enumerate(stores)
    )
    stores[0].gate.clear()
    for step in (1, 2, 3):
        upcoming = first.writer.upcoming(well=True)
        for rank in (first, second):
            rank.save(step, upcoming)
        wait_until(lambda step=step: first.on_disk()[:1] == [step] and second.writer.on_disk)
    assert second.writer.drain(WAIT_S)
    assert 1 in first.on_disk(), "the first rank uploads it"
    stores[0].gate.set()
    assert first.writer.drain(WAIT_S)
    assert first.commits() == [1, 3]
    assert first.warnings() == []
    for rank in (first, second):
        rank.close()


def test_a_share_that_a_full_disk_never_took_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FlakyStore(MemoryObjectStore())
    first, second = ranks = [
        Bench(tmp_path / str(r), world=World(r, 2, r), store=store) for r in range(2)
    ]
    full = second.scratch / "JOB" / "1-1" / "part-00001-00000.safetensors"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")

    def save(step: int) -> None:
        upcoming = first.writer.upcoming(all(rank.writer.well for rank in ranks))
        for rank in ranks:
            rank.save(step, upcoming)

    both_in_memory = threading.Event()
    write = second.writer._spool.write

    def late(*given: Any) -> Any:
        assert both_in_memory.wait(WAIT_S)
        return write(*given)

    monkeypatch.setattr(second.writer._spool, "write", late)
    save(1)
    save(2)
    both_in_memory.set()
    wait_until(lambda: second.writer.on_disk)
    assert "No space left" in second.warnings()[0]
    assert not second.writer.well, "the others wait for what will not come"
    save(3)
    assert first.writer.drain(WAIT_S)
    assert first.commits() == [3]
    assert all(rank.writer.well for rank in ranks)
    for rank in ranks:
        rank.close()


def test_in_trouble_the_first_rank_lets_go_of_what_is_under_way(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.save(1)
    assert bench.store.waits.wait(WAIT_S)
    assert bench.writer.upcoming(well=True) == Upcoming(-1, (1,))
    assert bench.writer.upcoming(well=False) == Upcoming(-1, ())


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
        bench.close()


def test_another_retention_counts_from_the_next_checkpoint_on(bench: Bench) -> None:
    for step in (1, 2, 3, 4):
        bench.save(step)
        assert bench.writer.drain(WAIT_S)
    assert bench.steps() == [1, 2, 3, 4]
    put_in_force(bench.repository, Retention(2, 0, False))
    bench.save(5)
    assert bench.writer.drain(WAIT_S)
    wait_until(lambda: bench.steps() == [4, 5])


def test_a_retention_that_can_not_be_read_deletes_nothing(bench: Bench) -> None:
    bench.store.put(layout.retention_key("JOB"), b"torn")
    for step in (1, 2, 3):
        bench.save(step)
        assert bench.writer.drain(WAIT_S)
    wait_until(lambda: len(bench.warnings()) > 0)
    assert "retention.json is not JSON" in bench.warnings()[0]
    assert bench.steps() == [1, 2, 3]


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.005)


def test_what_a_job_that_never_comes_back_left_on_a_box_goes_after_its_time(
    tmp_path: Path,
) -> None:
    for job_id in ("MINE", "GONE", "LATELY"):
        (tmp_path / job_id / "4-1").mkdir(parents=True)
        (tmp_path / job_id / "4-1" / "part").write_bytes(b"x")
    now = time.time() + ABANDONED_S
    os.utime(tmp_path / "LATELY" / "4-1", (now - 60, now - 60))
    sweep(tmp_path, "MINE", now - 60)
    assert len(list(tmp_path.iterdir())) == 3
    sweep(tmp_path, "MINE", now + 60)
    assert {path.name for path in tmp_path.iterdir()} == {"MINE", "LATELY"}
    sweep(tmp_path / "nothing", "MINE", now)
