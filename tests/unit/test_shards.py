"""Reading shards while the store or the disk is in trouble: what passes costs time, no attempt."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.corpus import tokenizer_of, write_corpus
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from trainer.contract.outcome import Outcome
from trainer.data import shards as module
from trainer.data.loader import Loader, Prefetcher
from trainer.data.shards import ShardReader
from trainer.failures import outcome_of
from trainer.storage import retry
from trainer.storage.binding import DataBinding, DataChangedError
from trainer.storage.object_store import StoreRefusedError, StoreUnavailableError, open_store

LINE = "The quick brown fox jumps over the lazy dog, again and again. "
SHARDS = [[["one", "two"]], [["three"]], [["four"]]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_S", 0.001)


class Bench:
    """A corpus in a store whose calls fail as scripted."""

    def __init__(self, folder: Path, shards: list[list[list[str]]] = SHARDS) -> None:
        self.binding: DataBinding = write_corpus(folder / "data", shards)
        inner = MemoryObjectStore()
        for path in (folder / "data").glob("*.parquet"):
            inner.put(path.name, path.read_bytes())
        self.store = FlakyStore(inner)
        self.cache = folder / "cache"

    def reader(self) -> ShardReader:
        return ShardReader(self.binding, self.store, self.cache)

    def loader(self, reader: ShardReader) -> Loader:
        return Loader(
            reader,
            tokenizer_of(self.binding),
            T=64,
            rows_per_step=1,
            device_batch_size=1,
            order_seed=0,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_store_that_is_away_for_a_while_only_takes_time(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    fault = bench.store.script("get_file", times=3)
    first = bench.binding.shards[0]
    with caplog.at_level("WARNING"):
        assert bench.reader().texts(first, 0) == ["one", "two"]
    assert fault.fired == 3
    assert caplog.text.count("scripted: get_file shard_0.parquet; the next try is in") == 3


def test_a_store_that_stays_away_ends_the_attempt_by_its_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DATA_BUDGET_S", 0.0)
    bench.store.away = True
    with pytest.raises(StoreUnavailableError, match="is away") as failure:
        bench.reader().row_groups(bench.binding.shards[0])
    assert outcome_of(failure.value) is Outcome.STORE_UNAVAILABLE


def test_a_prefetcher_that_waits_for_a_store_closes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_S", 3600.0)
    bench = Bench(tmp_path, [[[LINE * 20]], [[LINE * 20]]])
    waits = threading.Event()

    def away(*_: object) -> None:
        waits.set()
        raise StoreUnavailableError("scripted: the store is away")

    monkeypatch.setattr(bench.store, "get_file", away)
    before = threading.active_count()
    ahead = Prefetcher(bench.loader(bench.reader()))
    assert waits.wait(30.0)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 10.0
    assert threading.active_count() == before


class FailingOnce:
    """A function of the operating system or pyarrow that fails at its first call."""

    def __init__(self, real: Any, error: OSError) -> None:
        self.real = real
        self.error = error
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise self.error
        return self.real(*arguments)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOENT])
def test_passing_trouble_of_a_disk_only_takes_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opening = FailingOnce(module.pq.ParquetFile, OSError(number, os.strerror(number)))
    monkeypatch.setattr(module.pq, "ParquetFile", opening)
    reader = bench.reader()
    assert reader.row_groups(bench.binding.shards[0]) == 1
    assert opening.calls == 2
    reader.close()


def test_a_shard_that_may_not_be_read_is_refused_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = FailingOnce(module.pq.ParquetFile, PermissionError(errno.EACCES, "denied"))
    monkeypatch.setattr(module.pq, "ParquetFile", opening)
    with pytest.raises(StoreRefusedError, match=r"shard_0\.parquet: .*check the folder's rights"):
        bench.reader().row_groups(bench.binding.shards[0])
    assert opening.calls == 1


class Evicted(ShardReader):
    """Another process evicts a cached shard right before it is looked at, and right after."""

    def __init__(self, bench: Bench, after: bool) -> None:
        super().__init__(bench.binding, bench.store, bench.cache)
        self.after = after
        self.evictions = 0

    def _verify(self, shard: Any, path: Path) -> None:
        first = not self.evictions
        self.evictions += first
        if first and not self.after:
            path.unlink()
        super()._verify(shard, path)
        if first and self.after:
            path.unlink()


@pytest.mark.parametrize("after", [False, True])
def test_a_shard_that_another_process_evicts_is_fetched_again(bench: Bench, after: bool) -> None:
    shard = bench.binding.shards[0]
    before = bench.reader()
    assert before.row_groups(shard) == 1
    before.close()
    reader = Evicted(bench, after)
    assert reader.texts(shard, 0) == ["one", "two"]
    assert reader.evictions == 1
    assert bench.store.calls == ["get_file shard_0.parquet"] * 2
    reader.close()


def test_a_disk_that_is_not_mounted_yet_is_waited_for(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a box has started anew: a folder without anything is no data that changed."""
    folder, away = tmp_path / "data", tmp_path / "away"
    folder.rename(away)
    folder.mkdir()
    reader = ShardReader(bench.binding, open_store(bench.binding.source), bench.cache)
    shard = bench.binding.shards[0]
    with caplog.at_level("WARNING"), ThreadPoolExecutor(1) as pool:
        read = pool.submit(reader.texts, shard, 0)
        while not caplog.records and not read.done():
            time.sleep(0.001)
        folder.rmdir()
        away.rename(folder)
        assert read.result() == SHARDS[0][0]
    assert "is its disk mounted?" in caplog.text
    reader.close()
    (folder / shard.name).unlink()
    with pytest.raises(DataChangedError, match="vanished"):
        ShardReader(bench.binding, open_store(bench.binding.source), bench.cache).texts(shard, 0)
