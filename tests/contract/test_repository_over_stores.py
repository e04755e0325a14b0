"""The repository's promises over real stores: races, commits, damage, retention."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.conftest import SUITABLE
from tests.fakes.checkpoints import JOB, ref_to, save, upload
from trainer.storage import layout
from trainer.storage.object_store import ObjectStore
from trainer.storage.repository import CheckpointRepository, StaleWriterError
from trainer.storage.retention import Retention, prune

RIVALS = 6


pytestmark = pytest.mark.parametrize("any_store", SUITABLE, indirect=True)


def test_racing_attempts_get_numbers_of_their_own(store: ObjectStore) -> None:
    with ThreadPoolExecutor(RIVALS) as pool:
        claims = list(
            pool.map(lambda n: CheckpointRepository(store, JOB).claim(None, str(n)), range(RIVALS))
        )
    assert sorted(claim.attempt for claim in claims) == list(range(1, RIVALS + 1))
    assert [claim.host for claim in CheckpointRepository(store, JOB).claims()] == [
        claim.host for claim in sorted(claims, key=lambda claim: claim.attempt)
    ]


def test_a_job_lives_through_attempts_damage_and_pruning(
    store: ObjectStore, tmp_path: Path
) -> None:
    first, second = CheckpointRepository(store, JOB), CheckpointRepository(store, JOB)
    first.claim(None, "a")
    for step in (10, 20, 30, 40):
        save(first, tmp_path, step)
    late = upload(first, tmp_path, 50)
    key = layout.part_key(JOB, 40, 1, layout.part_name(1))
    store.put(key, store.get(key)[:-2])
    assert [error.part for error in second.verify(ref_to(40))] == [layout.part_name(1)]
    second.claim(ref_to(30), "b")
    with pytest.raises(StaleWriterError):
        first.commit(late)
    save(second, tmp_path, 40, attempt=2)
    assert first.current() == second.current()
    assert [(ref.step, ref.attempt) for ref in second.current()] == [
        (40, 2),
        (30, 1),
        (20, 1),
        (10, 1),
    ]
    pruned = prune(second, Retention(keep_last=2, keep_best=False))
    assert [(ref.step, ref.attempt) for ref in pruned.refs] == [(40, 1), (20, 1), (10, 1)]
    assert second.committed() == [ref_to(30), ref_to(40, 2)]
    for ref in second.current():
        assert second.verify(ref) == ()
