"""A rank's log in the bucket: whole, in order, and never in the way of training."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from tests.fakes.memory_store import MemoryObjectStore
from trainer import logs as logs_module
from trainer.logs import LogShipper
from trainer.storage.layout import LogKey, log_key, parse_log
from trainer.storage.logs import new_pieces, read_piece
from trainer.storage.object_store import LocalObjectStore, ObjectStore, StoreUnavailableError

JOB = "job1"
FIRST = LogKey(1, 0, 1)
log = logging.getLogger("trainer.somewhere")


class AwayAtFirst(MemoryObjectStore):
    """A store whose first puts fail; counts them."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.left = failures

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        if self.left:
            self.left -= 1
            raise StoreUnavailableError("away, as scripted")
        super().put(key, data, if_none_match)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ship at once."""
    monkeypatch.setattr(logs_module, "SHIP_S", 0.01)


def texts(store: ObjectStore, **only: int) -> list[str]:
    keys = new_pieces(store, JOB, frozenset(), only.get("attempt"), only.get("rank"))
    return [line.text for key in keys for line in read_piece(store, JOB, key)]


def test_lines_come_back_in_order_by_attempt_and_rank(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    for attempt, rank in ((2, 0), (1, 1), (1, 0)):
        shipper = LogShipper(store, JOB, LogKey(attempt, rank, 1))
        log.info("attempt %d rank %d", attempt, rank)
        log.warning("two\nlines")
        shipper.close()
    found = texts(store)
    assert found[0] == "INFO trainer.somewhere: attempt 1 rank 0"
    assert found[1:3] == ["WARNING trainer.somewhere: two", "lines"]
    assert [text for text in found if "attempt" in text] == [
        f"INFO trainer.somewhere: attempt {attempt} rank {rank}"
        for attempt, rank in ((1, 0), (1, 1), (2, 0))
    ]
    assert len(texts(store, attempt=1)) == 6
    assert len(texts(store, attempt=1, rank=1)) == 3


def test_a_traceback_is_shipped(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    shipper = LogShipper(store, JOB, FIRST)
    try:
        raise ValueError("as scripted")
    except ValueError:
        log.exception("failed")
    shipper.close()
    assert "ValueError: as scripted" in texts(store)[-1]


def test_a_store_that_is_away_costs_no_line() -> None:
    store = AwayAtFirst(failures=3)
    shipper = LogShipper(store, JOB, FIRST)
    for number in range(50):
        log.info("line %d", number)
    while store.left:
        log.info("and another")
    shipper.close()
    assert store.left == 0, "the scripted failures fired"
    found = texts(store)
    assert [text for text in found if "line" in text] == [
        f"INFO trainer.somewhere: line {number}" for number in range(50)
    ]
    pieces = new_pieces(store, JOB, frozenset())
    assert [key.sequence for key in pieces] == list(range(1, len(pieces) + 1))


def test_a_piece_that_the_store_kept_without_saying_so_stays_as_it_was() -> None:
    kept = threading.Event()

    class Forgets(MemoryObjectStore):
        def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
            super().put(key, data, if_none_match)
            if not kept.is_set():
                log.info("said meanwhile")
                kept.set()
                raise StoreUnavailableError("the answer was lost, as scripted")

    store = Forgets()
    shipper = LogShipper(store, JOB, FIRST)
    log.info("said before")
    assert kept.wait(10)
    read = store.get(log_key(JOB, FIRST))
    shipper.close()
    assert store.get(log_key(JOB, FIRST)) == read
    assert [text.rpartition(": ")[2] for text in texts(store)] == ["said before", "said meanwhile"]


def test_a_reader_that_comes_back_sees_only_what_is_new() -> None:
    store = MemoryObjectStore()
    first = LogKey(1, 0, 1)
    store.put(log_key(JOB, first), b'{"time": 1.0, "text": "a"}\n')
    assert new_pieces(store, JOB, frozenset()) == [first]
    second = LogKey(1, 0, 2)
    store.put(log_key(JOB, second), b'{"time": 2.0, "text": "b"}\n')
    assert new_pieces(store, JOB, frozenset({first})) == [second]
    assert list(read_piece(store, JOB, LogKey(1, 0, 3))) == []
    assert parse_log(log_key(JOB, second)) == second
    assert parse_log(f"jobs/{JOB}/spec.json") is None
