"""Batches, positions, prefetching and validation rows."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.corpus import CORPUS, TOKENIZER, reader_of, tokenizer_of, write_corpus
from trainer.data.loader import (
    START,
    EmptyDataError,
    Loader,
    Position,
    PositionError,
    Prefetcher,
    PrefetcherClosedError,
)
from trainer.data.validation import validation_set
from trainer.storage.binding import DataBinding, DataChangedError, bind

LINE = "The quick brown fox jumps over the lazy dog, again and again. "


@pytest.fixture(scope="module")
def corpus() -> DataBinding:
    return bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")


def loader(binding: DataBinding, cache: Path, **changes: object) -> Loader:
    options: dict[str, object] = {
        "T": 64,
        "rows_per_step": 8,
        "device_batch_size": 2,
        "order_seed": 0,
        **changes,
    }
    return Loader(reader_of(binding, cache), tokenizer_of(binding), **options)  # type: ignore[arg-type]


def test_a_step_has_shifted_inputs_and_targets(corpus: DataBinding, tmp_path: Path) -> None:
    step = loader(corpus, tmp_path).next_step()
    assert step.tokens == 8 * 64
    assert len(step.micro) == 4
    for x, y in step.micro:
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((2, 64), np.int32, (2, 64), np.int64)
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        assert x.flags["C_CONTIGUOUS"]
        assert y.flags["C_CONTIGUOUS"]
    bos = tokenizer_of(corpus).bos_id
    assert (step.micro[0][0][:, 0] == bos).all()


def test_a_batch_that_does_not_divide_is_refused(corpus: DataBinding, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a multiple"):
        loader(corpus, tmp_path, world_size=3)


def test_positions_survive_json_and_strange_ones_are_refused() -> None:
    position = Position(1, 2, 3, 4)
    assert Position.from_dict(position.to_dict()) == position
    strange = [{}, {**position.to_dict(), "row": -1}, {**position.to_dict(), "row": True}, None]
    for fields in strange:
        with pytest.raises(PositionError):
            Position.from_dict(fields)


def test_seed_and_epoch_change_the_order_but_not_the_rows(tmp_path: Path) -> None:
    groups = [[f"{number} {group} {LINE * 3}" for number in range(6)] for group in range(3)]
    binding = write_corpus(tmp_path / "data", [groups, groups[:2], groups[:1]])

    def epoch_rows(seed: int, epoch: int) -> list[bytes]:
        each = loader(
            binding,
            tmp_path,
            order_seed=seed,
            rows_per_step=1,
            device_batch_size=1,
            position=Position(epoch),
        )
        rows = []
        while True:
            step = each.next_step()
            if step.position_after.epoch != epoch:
                return rows
            rows.append(step.micro[0][0].tobytes())

    orders = [epoch_rows(0, 0), epoch_rows(0, 1), epoch_rows(1, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len(orders[0]) > 10


def test_data_without_a_whole_row_ends_in_an_error(tmp_path: Path) -> None:
    binding = write_corpus(tmp_path / "data", [[["a"], ["b"]], [["c"]], [["d"]]])
    with pytest.raises(EmptyDataError, match="no row of 65 tokens"):
        loader(binding, tmp_path).next_step()
    with pytest.raises(EmptyDataError):
        loader(binding, tmp_path, position=Position(5, 1, 1, 0)).next_step()
    hollow = write_corpus(tmp_path / "hollow", [[], [], [[LINE]]])  # no row group at all
    with pytest.raises(EmptyDataError):
        loader(hollow, tmp_path).next_step()


def loader_rows(binding: DataBinding, tmp_path: Path) -> list[bytes]:
    """The rows of the first epoch."""
    each = loader(binding, tmp_path, rows_per_step=1, device_batch_size=1)
    rows: list[bytes] = []
    while (step := each.next_step()).position_after.epoch == 0:
        rows.append(step.micro[0][0].tobytes())
    return rows


def test_shards_and_row_groups_without_a_row_are_passed_over(tmp_path: Path) -> None:
    full = [LINE * 20]
    binding = write_corpus(tmp_path / "data", [[["a"], full, [], ["b"]], [["c"]], [], [full]])
    first_epoch = loader_rows(binding, tmp_path)
    count = 4 * len(first_epoch)
    step = loader(binding, tmp_path, rows_per_step=count, device_batch_size=1).next_step()
    assert step.position_after.epoch == 3
    assert sorted(x.tobytes() for x, _ in step.micro) == sorted(4 * first_epoch)


def test_the_prefetcher_gives_what_the_loader_gives(corpus: DataBinding, tmp_path: Path) -> None:
    plain = loader(corpus, tmp_path)
    before = threading.active_count()
    with closing(Prefetcher(loader(corpus, tmp_path))) as ahead:
        for _ in range(4):
            expected, found = plain.next_step(), ahead.next_step()
            assert found.position_after == expected.position_after
            np.testing.assert_array_equal(found.micro[3][1], expected.micro[3][1])
    assert threading.active_count() == before
    ahead.close()
    with pytest.raises(PrefetcherClosedError):
        ahead.next_step()


def test_the_prefetcher_places_every_array_in_its_own_thread(
    corpus: DataBinding, tmp_path: Path
) -> None:
    threads: set[str] = set()

    def place(array: np.ndarray) -> np.ndarray:
        threads.add(threading.current_thread().name)
        return array + 1

    expected = loader(corpus, tmp_path).next_step()
    with closing(Prefetcher(loader(corpus, tmp_path), place)) as ahead:
        found = ahead.next_step()
    assert threads == {"data-prefetch"}
    assert (found.position_after, found.tokens) == (expected.position_after, expected.tokens)
    for (x, y), (x_found, y_found) in zip(expected.micro, found.micro, strict=True):
        np.testing.assert_array_equal(x_found, x + 1)
        np.testing.assert_array_equal(y_found, y + 1)


def test_the_prefetcher_raises_what_placing_raised(corpus: DataBinding, tmp_path: Path) -> None:
    def full(array: np.ndarray) -> np.ndarray:
        raise MemoryError("scripted: no pinned memory")

    with closing(Prefetcher(loader(corpus, tmp_path), full)) as ahead:
        for _ in range(2):
            with pytest.raises(MemoryError, match="scripted"):
                ahead.next_step()


def test_the_prefetcher_raises_what_the_loader_raised(tmp_path: Path) -> None:
    binding = write_corpus(tmp_path / "data", [[[LINE * 20]], [[LINE * 20]]])
    (tmp_path / "data" / "shard_0.parquet").write_bytes(b"changed")
    with closing(Prefetcher(loader(binding, tmp_path))) as ahead:
        for _ in range(2):
            with pytest.raises(DataChangedError):
                ahead.next_step()


def test_validation_rows_are_the_first_in_natural_order(
    corpus: DataBinding, tmp_path: Path
) -> None:
    reader, tokenizer = reader_of(corpus, tmp_path), tokenizer_of(corpus)
    few = validation_set(reader, tokenizer, rows=5, T=64)
    more = validation_set(reader, tokenizer, rows=50, T=64)
    assert len(few.rows) == 5
    np.testing.assert_array_equal(few.rows, more.rows[:5])
    batches = list(few.batches(2))
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert batches[0][0].dtype == np.int32
    parts = [x for rank in range(2) for x, _ in more.batches(4, rank, 2)]
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(
        bytes(x) for x in more.rows[:, :-1].astype(np.int32)
    )
    assert few.identity != more.identity
    assert few.identity == validation_set(reader, tokenizer, rows=5, T=64).identity
    assert few.identity != validation_set(reader, tokenizer, rows=5, T=32).identity


def test_validation_takes_all_rows_where_fewer_are_there(
    corpus: DataBinding, tmp_path: Path
) -> None:
    reader, tokenizer = reader_of(corpus, tmp_path), tokenizer_of(corpus)
    every = validation_set(reader, tokenizer, rows=10**9, T=64)
    again = validation_set(reader, tokenizer, rows=len(every.rows), T=64)
    assert again.identity == every.identity
    with pytest.raises(EmptyDataError, match="shard_00003"):
        validation_set(reader, tokenizer, rows=10**9, T=10**7)


def test_a_loader_begins_at_the_first_row(corpus: DataBinding, tmp_path: Path) -> None:
    assert loader(corpus, tmp_path).position == Position() == START
