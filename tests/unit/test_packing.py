"""Packing: nanochat's rule over a row group, and an order that no library can change."""

from __future__ import annotations

import numpy as np

from trainer.data.packing import PackReport, pack, shuffled


def documents(*lengths: int) -> list[list[int]]:
    """Documents whose tokens tell document and place apart."""
    return [[100 * index + at for at in range(length)] for index, length in enumerate(lengths)]


def test_the_largest_that_fits_comes_first_and_the_shortest_is_cropped() -> None:
    rows, report = pack(documents(3, 7, 2, 9), T=9)
    # 9 fills all but one place, which the shortest document's first token takes; then 7 and 3.
    assert rows.tolist() == [
        [*range(300, 309), 200],
        [*range(100, 107), *range(0, 3)],
    ]
    assert report == PackReport(tokens=21, kept_tokens=20, cropped_tokens=1, dropped_tokens=0)
    assert rows.dtype == np.int32


def test_a_document_longer_than_a_row_goes_on_with_its_first_token_in_front() -> None:
    rows, report = pack(documents(25), T=9)
    assert rows.tolist() == [[0, *range(10, 19)], [*range(10)]]
    # 25 tokens and the first one twice again; the last piece, 7 long, fills no row.
    assert report == PackReport(27, 20, 0, 7)


def test_the_last_incomplete_row_is_dropped_and_counted() -> None:
    rows, report = pack(documents(10, 4), T=9)
    assert rows.shape == (1, 10)
    assert report == PackReport(14, 10, 0, 4)
    rows, report = pack(documents(3), T=9)
    assert rows.shape == (0, 10)
    assert report == PackReport(3, 0, 0, 3)
    rows, report = pack([], T=9)
    assert rows.shape == (0, 10)
    assert report == PackReport()


def test_the_shuffle_is_the_one_recorded() -> None:
    # BLAKE2b is a standard, so this order is for ever; stored positions depend on it.
    assert shuffled(8, "rows", 0, 0, "shard_0.parquet", 3) == RECORDED
    assert shuffled(8, "rows", 0, 1, "shard_0.parquet", 3) != RECORDED
    assert shuffled(0, "x") == []
    assert sorted(shuffled(1000, "x", 7)) == list(range(1000))


RECORDED = [4, 2, 1, 3, 7, 5, 6, 0]
