"""Claim, commit, what is current, verified reading, retention; crash points enumerated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.checkpoints import JOB, ref_to, save, upload
from tests.fakes.memory_store import CrashError, CrashingStore, MemoryObjectStore
from trainer.storage import layout
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest
from trainer.storage.object_store import AlreadyExistsError, StoreUnavailableError
from trainer.storage.repository import (
    CheckpointRepository,
    CorruptCheckpointError,
    Loaded,
    NotClaimedError,
    NothingLoadable,
    StaleWriterError,
)
from trainer.storage.retention import Retention, prune, sweep_orphans, to_delete

KEEP_TWO = Retention(keep_last=2, keep_best=False)


@pytest.fixture
def store() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
def repository(store: MemoryObjectStore) -> CheckpointRepository:
    return CheckpointRepository(store, JOB)


def part_key(ref: CheckpointRef, index: int = 0) -> str:
    return layout.part_key(ref.job_id, ref.step, ref.attempt, layout.part_name(index))


def load_whole(repository: CheckpointRepository) -> Callable[[CheckpointRef, Manifest], int]:
    def load(ref: CheckpointRef, manifest: Manifest) -> int:
        for part in manifest.parts:
            list(repository.open_part(ref, part))
        return ref.step

    return load


def test_attempts_are_numbered_from_one(repository: CheckpointRepository) -> None:
    assert repository.claim(None, "a").attempt == 1
    assert repository.claim(ref_to(5), "b").attempt == 2
    assert [claim.host for claim in repository.claims()] == ["a", "b"]


def test_a_lost_race_chooses_the_start_again(store: MemoryObjectStore, tmp_path: Path) -> None:
    ours, theirs = CheckpointRepository(store, JOB), CheckpointRepository(store, JOB)
    asked = []

    def newest() -> CheckpointRef | None:
        if not asked:  # between our look and our put another attempt claims and commits
            theirs.claim(None, "rival")
            save(theirs, tmp_path, 10)
        asked.append(1)
        current = ours.current()
        return current[0] if current else None

    claim = ours.claim(newest, "us")
    assert (claim.attempt, claim.start, len(asked)) == (2, ref_to(10), 2)


def test_a_claim_answered_twice_is_still_ours(store: MemoryObjectStore) -> None:
    class EchoingStore(MemoryObjectStore):
        """Loses the answer to a put that it carried out, as a retrying client sees it."""

        def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
            super().put(key, data, if_none_match)
            raise AlreadyExistsError(key)

    assert CheckpointRepository(EchoingStore(), JOB).claim(None, "a").attempt == 1


def test_a_checkpoint_exists_with_its_manifest(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    manifest = upload(repository, tmp_path, 10)
    assert repository.current() == []
    repository.commit(manifest)
    repository.commit(manifest)  # a repetition is no error
    assert repository.current() == [manifest.ref]
    assert repository.manifest(manifest.ref) == manifest
    with pytest.raises(AlreadyExistsError):
        repository.commit(manifest.model_copy(update={"validation_bpb": 1.0}))


def test_falling_back_and_training_again_never_meets_own_older_commits(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    for step in (10, 20, 30):
        save(repository, tmp_path, step)
    repository.claim(ref_to(10), "h")
    assert repository.current() == [ref_to(10)]
    save(repository, tmp_path, 20, attempt=2)
    repository.claim(ref_to(20, 2), "h")
    save(repository, tmp_path, 20, attempt=3)
    assert repository.current() == [ref_to(20, 3), ref_to(10)]


@pytest.mark.parametrize("start", [None, ref_to(99, 1, "PARENT")])
def test_starting_afresh_supersedes_everything(
    repository: CheckpointRepository, tmp_path: Path, start: CheckpointRef | None
) -> None:
    repository.claim(start, "h")
    save(repository, tmp_path, 10)
    repository.claim(start, "h")
    assert repository.current() == []


def test_a_stale_writer_is_stopped(store: MemoryObjectStore, tmp_path: Path) -> None:
    old, new = CheckpointRepository(store, JOB), CheckpointRepository(store, JOB)
    old.claim(None, "old")
    manifest = upload(old, tmp_path, 10)
    new.claim(None, "new")
    with pytest.raises(StaleWriterError, match="attempt 2 on new"):
        old.commit(manifest)
    assert old.committed() == []
    with pytest.raises(NotClaimedError):
        old.check_writer(3)


def test_nobody_commits_for_a_job_that_was_deleted(
    store: MemoryObjectStore, tmp_path: Path
) -> None:
    repository = CheckpointRepository(store, JOB)
    repository.claim(None, "host")
    assert repository.claims()
    for info in list(store.list(f"jobs/{JOB}/")):
        store.delete(info.key)
    manifest = upload(repository, tmp_path, 20)  # a part is on its way
    with pytest.raises(NotClaimedError):
        repository.commit(manifest)
    assert repository.committed() == []


def test_a_stale_commit_that_slips_through_does_not_count(
    store: MemoryObjectStore, tmp_path: Path
) -> None:
    old, new = CheckpointRepository(store, JOB), CheckpointRepository(store, JOB)
    old.claim(None, "old")
    save(old, tmp_path, 10)
    late = upload(old, tmp_path, 20)
    new.claim(ref_to(10), "new")
    store.put(layout.manifest_key(JOB, 20, 1), late.encode())
    assert old.current() == new.current() == [ref_to(10)]


def test_a_commit_without_its_parts_is_refused(
    repository: CheckpointRepository, store: MemoryObjectStore, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    manifest = upload(repository, tmp_path, 10)
    store.delete(part_key(manifest.ref))
    with pytest.raises(CorruptCheckpointError, match="found nothing"):
        repository.commit(manifest)


def truncate(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"x"


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("damage", [truncate, lengthen, flip, None])
def test_damage_is_found_while_reading_and_passed_over(
    repository: CheckpointRepository,
    store: MemoryObjectStore,
    tmp_path: Path,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    repository.claim(None, "h")
    older, newer = (save(repository, tmp_path, step) for step in (10, 20))
    if damage:
        store.put(part_key(newer), damage(store.get(part_key(newer))))
    else:
        store.delete(part_key(newer))
    part = repository.manifest(newer).parts[0]
    with pytest.raises(CorruptCheckpointError, match="part-00000"):
        repository.read_part(newer, part, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert [error.part for error in repository.verify(newer)] == ["part-00000-00000.safetensors"]
    assert repository.verify(older) == ()

    loaded = repository.newest_loadable(load_whole(repository))
    assert isinstance(loaded, Loaded)
    assert (loaded.ref, loaded.value) == (older, 10)
    assert [rejected.ref for rejected in loaded.rejected] == [newer]
    assert "part-00000" in loaded.rejected[0].reason


def test_two_swapped_parts_are_found(
    repository: CheckpointRepository, store: MemoryObjectStore, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    ref = save(repository, tmp_path, 10)
    first, second = store.get(part_key(ref, 0)), store.get(part_key(ref, 1))
    store.put(part_key(ref, 0), second)
    store.put(part_key(ref, 1), first)
    assert len(repository.verify(ref)) == 2


def test_a_torn_or_misplaced_manifest_is_passed_over(
    repository: CheckpointRepository, store: MemoryObjectStore, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    refs = [save(repository, tmp_path, step) for step in (10, 20, 30)]
    raw = store.get(layout.manifest_key(JOB, 10, 1))
    store.put(layout.manifest_key(JOB, 30, 1), raw[:50])
    store.put(layout.manifest_key(JOB, 20, 1), raw)
    loaded = repository.newest_loadable(load_whole(repository))
    assert isinstance(loaded, Loaded)
    assert loaded.ref == refs[0]
    assert len(loaded.rejected) == 2
    assert len(repository.verify(refs[1])) == 1


def test_nothing_loadable_is_a_value_and_store_trouble_is_not(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    assert repository.newest_loadable(load_whole(repository)) == NothingLoadable(())
    repository.claim(None, "h")
    save(repository, tmp_path, 10)

    def unreachable(*_: object) -> None:
        raise StoreUnavailableError("away")

    with pytest.raises(StoreUnavailableError):
        repository.newest_loadable(unreachable)


def test_checkpoints_that_are_pruned_while_they_are_read_are_chosen_anew(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    save(repository, tmp_path, 10)
    newer = iter((20, 30))

    def load(ref: CheckpointRef, manifest: Manifest) -> int:
        for step in newer:
            save(repository, tmp_path, step)
        prune(repository, KEEP_TWO)
        return load_whole(repository)(ref, manifest)

    with pytest.raises(StoreUnavailableError, match="pruned while read"):
        repository.newest_loadable(load)
    assert next(newer, None) is None
    found = repository.newest_loadable(load)
    assert isinstance(found, Loaded)
    assert found.ref == ref_to(30)


def test_a_verified_part_is_the_file_that_was_uploaded(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    ref = save(repository, tmp_path, 10)
    repository.read_part(ref, repository.manifest(ref).parts[1], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"step 10 attempt 1 part 1"


def test_the_job_document_is_written_once(repository: CheckpointRepository) -> None:
    document = JobDocument(job_id=JOB, spec={"name": "x"}, start=ref_to(3, 1, "PARENT"))
    repository.save_document(document)
    repository.save_document(document)
    assert repository.document() == document
    with pytest.raises(AlreadyExistsError):
        repository.save_document(document.model_copy(update={"spec": {"name": "y"}}))


CURRENT = [ref_to(step) for step in (60, 50, 40, 30, 20, 10)]


@pytest.mark.parametrize(
    ("retention", "protected", "gone"),
    [
        (Retention(2, 0, False), [], [40, 30, 20, 10]),
        (Retention(1, 0, False), [], [40, 30, 20, 10]),  # never the last two
        (Retention(3, 0, False), [10], [30, 20]),
        (Retention(2, 20, False), [], [30, 10]),
        (Retention(2, 0, True), [], [40, 20, 10]),
        (Retention(99, 0, False), [], []),
    ],
)
def test_retention_keeps_what_it_says(
    retention: Retention, protected: list[int], gone: list[int]
) -> None:
    bpb = {ref_to(30): 0.7, ref_to(20): 0.7, ref_to(60): 0.9}
    doomed = to_delete(CURRENT, [], bpb, retention, [ref_to(step) for step in protected])
    assert [ref.step for ref in doomed] == gone


def test_a_superseded_checkpoint_stays_until_the_line_has_passed_it() -> None:
    superseded = [ref_to(55, 1), ref_to(65, 1)]
    assert to_delete(CURRENT[:1], superseded, {}, KEEP_TWO, []) == []
    assert to_delete(CURRENT[:2], superseded, {}, KEEP_TWO, []) == [ref_to(55, 1)]


def test_prune_keeps_the_start_of_the_latest_attempt(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    save(repository, tmp_path, 10)
    repository.claim(ref_to(10), "h")
    for step in (20, 30, 40):
        save(repository, tmp_path, step, attempt=2)
    assert prune(repository, KEEP_TWO).refs == (ref_to(20, 2),)
    assert repository.current() == [ref_to(40, 2), ref_to(30, 2), ref_to(10)]


def test_parts_that_nobody_can_commit_any_more_are_swept(
    repository: CheckpointRepository, store: MemoryObjectStore, tmp_path: Path
) -> None:
    repository.claim(None, "h")
    first = save(repository, tmp_path, 10)
    killed = upload(repository, tmp_path, 40).ref
    repository.claim(first, "h")
    given_up = upload(repository, tmp_path, 20, 2).ref
    on_its_way = upload(repository, tmp_path, 40, 2)
    newest = save(repository, tmp_path, 30, 2)
    later = upload(repository, tmp_path, 20, 3).ref
    assert set(sweep_orphans(repository, newest)) == {killed, given_up}
    repository.commit(on_its_way)
    for ref in (first, newest, on_its_way.ref):
        assert repository.verify(ref) == ()
    left = {layout.parse_checkpoint(info.key) for info in store.list("")} - {None}
    steps = {(named.step, named.attempt) for named in left if named}
    assert steps == {(ref.step, ref.attempt) for ref in (first, newest, on_its_way.ref, later)}


def prepare_claim(repository: CheckpointRepository, folder: Path) -> Callable[[], object]:
    return lambda: repository.claim(ref_to(20), "new")


def prepare_commit(repository: CheckpointRepository, folder: Path) -> Callable[[], object]:
    return lambda: save(repository, folder, 30)


def prepare_prune(repository: CheckpointRepository, folder: Path) -> Callable[[], object]:
    return lambda: prune(repository, KEEP_TWO)


def prepare_load(repository: CheckpointRepository, folder: Path) -> Callable[[], object]:
    return lambda: repository.newest_loadable(load_whole(repository))


Prepare = Callable[[CheckpointRepository, Path], Callable[[], object]]


@pytest.mark.parametrize(
    ("prepare", "new"),
    [
        (prepare_claim, {20, 10}),
        (prepare_commit, {30, 20, 10}),
        (prepare_prune, {20, 10}),
        (prepare_load, {20, 10}),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_store_call_leaves_the_old_state_or_the_new_one(
    prepare: Prepare, new: set[int], after: bool, tmp_path: Path
) -> None:
    crash_at = 0
    while True:
        inner = MemoryObjectStore()
        before = CheckpointRepository(inner, JOB)
        before.claim(None, "h")
        steps = (5, 10, 20) if prepare is prepare_prune else (10, 20)
        for step in steps:
            save(before, tmp_path, step)
        crashing = CrashingStore(inner, crash_at, after)
        act = prepare(CheckpointRepository(crashing, JOB), tmp_path)
        try:
            act()
        except CrashError:
            assert crashing.fired
        recovered = CheckpointRepository(inner, JOB)
        found = {ref.step for ref in recovered.current()}
        assert found in (set(steps), new), crashing.calls
        for ref in recovered.current():
            assert recovered.verify(ref) == (), crashing.calls
        # And the work can be done again to its end.
        claim = recovered.claim(recovered.current()[0], "h")
        save(recovered, tmp_path, 40, attempt=claim.attempt)
        prune(recovered, KEEP_TWO)
        assert recovered.current()[0] == ref_to(40, claim.attempt)
        if not crashing.fired:
            assert crash_at >= 3, "the operation made hardly any calls: nothing was tested"
            return
        crash_at += 1
