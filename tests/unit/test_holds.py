"""A checkpoint that another job starts from outlives its own job's pruning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.checkpoints import JOB, ref_to, save
from tests.fakes.memory_store import MemoryObjectStore
from trainer.storage import layout
from trainer.storage.object_store import NotFoundError
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention, prune

KEEP_TWO = Retention(keep_last=2, keep_best=False)


@pytest.fixture
def repository(tmp_path: Path) -> CheckpointRepository:
    """Five checkpoints of one attempt."""
    made = CheckpointRepository(MemoryObjectStore(), JOB)
    made.claim(None, "host")
    for step in (10, 20, 30, 40, 50):
        save(made, tmp_path, step)
    return made


def steps(repository: CheckpointRepository) -> list[int]:
    return [ref.step for ref in repository.current()]


def test_a_held_checkpoint_is_kept_and_its_neighbours_are_not(
    repository: CheckpointRepository,
) -> None:
    repository.hold(ref_to(20), "child")
    prune(repository, KEEP_TWO)
    assert steps(repository) == [50, 40, 20]
    assert repository.held() == {ref_to(20)}
    assert repository.verify(ref_to(20)) == ()


def test_holding_is_safe_to_repeat_and_by_many(repository: CheckpointRepository) -> None:
    for child in ("one", "two", "one"):
        repository.hold(ref_to(10), child)
    assert repository.held() == {ref_to(10)}
    assert len(repository.committed()) == 5, "a hold is no file of a checkpoint"


def test_what_was_pruned_can_not_be_held(repository: CheckpointRepository) -> None:
    prune(repository, KEEP_TWO)
    with pytest.raises(NotFoundError):
        repository.hold(ref_to(10), "child")
    assert list(repository.store.list(layout.checkpoint_prefix(JOB, 10, 1))) == []
    assert repository.held() == frozenset()


class TakenUp(MemoryObjectStore):
    """Somebody takes a checkpoint up once pruning has looked who needs it."""

    def __init__(self, take: Callable[[CheckpointRepository], object]) -> None:
        super().__init__()
        self.fired = False
        self._take = take

    def delete(self, key: str) -> None:
        if not self.fired and key == layout.manifest_key(JOB, 10, 1):
            self.fired = True
            self._take(CheckpointRepository(self, JOB))
        super().delete(key)


@pytest.mark.parametrize(
    "take",
    [
        lambda repository: repository.hold(ref_to(10), "child"),
        lambda repository: repository.claim(ref_to(10), "another host"),
    ],
    ids=["a job", "an attempt"],
)
def test_who_takes_a_checkpoint_up_while_it_is_pruned_wins(
    tmp_path: Path, take: Callable[[CheckpointRepository], object]
) -> None:
    store = TakenUp(take)
    repository = CheckpointRepository(store, JOB)
    repository.claim(None, "host")
    for step in (10, 20, 30, 40):
        save(repository, tmp_path, step)
    assert prune(repository, KEEP_TWO).refs == (ref_to(20),)
    assert store.fired
    assert steps(repository)[-1] == 10
    assert repository.verify(ref_to(10)) == ()
