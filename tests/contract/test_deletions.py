"""DeleteJob as a client meets it, and as a service finds it that was killed in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.deletions import Deletions
from service.errors import StaleAttemptError
from service.jobs import Desired
from service.store import deletion_store
from tests.fakes.api import Api, credential, hello, points, reason, served
from tests.fakes.checkpoints import save
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from trainer.contract.states import FINAL, JobState
from trainer.storage import layout
from trainer.storage.manifest import CheckpointRef
from trainer.storage.object_store import ObjectStore
from trainer.storage.repository import CheckpointRepository

JOB = "JOB"
START = CheckpointRef(job_id="PARENT", step=10, attempt=1)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


async def left_behind(plane: ControlPlane, folder: Path, **changes: Any) -> None:
    """A job that trained and ended: checkpoints, a hold on its start, logs, rows."""
    await plane.add(new_job(1, id=JOB, request_id=JOB, **changes))
    repository = CheckpointRepository(plane.store, JOB)
    repository.claim(None, "host")
    for step in (20, 30):
        save(repository, folder, step)
    plane.store.put(layout.log_key(JOB, layout.LogKey(1, 0, 1)), b"{}\n")
    plane.store.put(layout.spec_key(JOB), b"{}")
    plane.store.put(layout.hold_key("PARENT", 10, 1, JOB), b"")


def of_job(store: ObjectStore) -> list[str]:
    held = [info.key for info in store.list("jobs/PARENT/")]
    return [info.key for info in store.list(f"jobs/{JOB}/")] + held


def request(checkpoints: bool = True, job_id: str = JOB) -> pb.DeleteJobRequest:
    return pb.DeleteJobRequest(job_id=job_id, delete_checkpoints=checkpoints)


async def test_a_deleted_job_leaves_nothing(api: Api, tmp_path: Path) -> None:
    await left_behind(api.plane, tmp_path, start=START)
    await api.report(credential(JOB), [hello(JOB), points(1, 2, 3)])
    await api.plane.want(JOB, Desired.CANCELLED)
    await api.plane.tick()
    assert "JOB" in str([*api.plane.metrics.step.collect()])
    await api.call("DeleteJob", request())
    assert of_job(api.plane.store) == []
    assert await api.plane.records.read(JOB, 0, 10) == []
    assert "JOB" not in str([*api.plane.metrics.step.collect()])
    gone = await api.refused("GetJob", pb.GetJobRequest(job_id=JOB))
    assert gone.code() is grpc.StatusCode.NOT_FOUND
    await api.call("DeleteJob", request())  # safe to repeat
    never = await api.refused("DeleteJob", request(job_id="NEVER"))
    assert never.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("state", [state for state in JobState if state not in FINAL])
async def test_a_job_that_is_not_final_is_cancelled_first(
    api: Api, tmp_path: Path, state: JobState
) -> None:
    await left_behind(api.plane, tmp_path, state=state)
    error = await api.refused("DeleteJob", request())
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "cancel it first" in (error.details() or "")
    assert len(of_job(api.plane.store)) > 5


async def test_checkpoints_go_only_where_that_is_asked_for(api: Api, tmp_path: Path) -> None:
    await left_behind(api.plane, tmp_path, state=JobState.SUCCEEDED)
    error = await api.refused("DeleteJob", request(checkpoints=False))
    assert "has 2 checkpoints, the newest JOB@30" in (error.details() or "")
    assert len(CheckpointRepository(api.plane.store, JOB).current()) == 2


async def test_a_job_is_kept_while_another_may_have_to_start_there(
    api: Api, tmp_path: Path
) -> None:
    await left_behind(api.plane, tmp_path, state=JobState.SUCCEEDED)
    start = CheckpointRef(job_id=JOB, step=20, attempt=1)
    await api.plane.add(new_job(2, start=start))
    error = await api.refused("DeleteJob", request())
    assert reason(error) == "JOB_IN_USE"
    assert "JOB2" in (error.details() or "")
    await api.plane.want("JOB2", Desired.CANCELLED)
    await api.plane.tick()
    await api.call("DeleteJob", request())
    lineage = await api.call("GetLineage", pb.GetLineageRequest(job_id="JOB2"))
    assert [each.job_id for each in lineage.ancestors] == ["JOB2", JOB]


def deletions(plane: ControlPlane) -> Deletions:
    return Deletions(plane.lifecycle, plane.jobs, plane.deletions, plane.storage, plane.metrics)


async def finished(plane: ControlPlane) -> None:
    """A service that starts anew carries through what was begun."""
    made = deletions(plane)
    running = asyncio.create_task(made.run())
    async with asyncio.timeout(30):
        while await plane.deletions.pending():
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.close()


async def test_a_deletion_that_stopped_anywhere_is_finished_by_the_next_start(
    tmp_path: Path,
) -> None:
    """Every deletion from the bucket fails once, before or after it took effect."""
    tried = 0
    for after in (False, True):
        for place in range(20):
            folder = tmp_path / f"{after}{place}"
            folder.mkdir()
            store = FlakyStore(MemoryObjectStore())
            async with control_plane(folder, store=store) as plane:
                await left_behind(plane, folder, state=JobState.FAILED, start=START)
                keys = sorted(of_job(store))
                if place >= len(keys):
                    break
                fault = store.script(f"delete {keys[place]}", after=after)
                made = deletions(plane)
                with pytest.raises(Exception, match="scripted"):
                    await made.delete(JOB, True, "admin")
                await made.close()
                assert fault.fired == 1
                tried += 1
            async with control_plane(folder, store=store) as plane:
                await finished(plane)
                assert of_job(store) == []
                assert await plane.jobs.get(JOB) is None
    assert tried == 20


async def test_nothing_is_deleted_before_the_tombstone(tmp_path: Path) -> None:
    store = FlakyStore(MemoryObjectStore())
    async with control_plane(tmp_path, store=store) as plane:
        await left_behind(plane, tmp_path, state=JobState.FAILED)
        begin: Callable[..., Any] = plane.deletions.begin

        async def watched(*arguments: Any) -> bool:
            assert not [call for call in store.calls if call.startswith("delete")]
            begun: bool = await begin(*arguments)
            return begun

        made = deletions(plane)
        made._deletions.begin = watched  # type: ignore[method-assign]
        await made.delete(JOB, True, "admin")
        assert of_job(store) == [layout.hold_key("PARENT", 10, 1, JOB)], "it had no start of ours"


async def test_a_store_that_is_away_is_told_and_the_deletion_goes_on_later(
    tmp_path: Path,
) -> None:
    store = FlakyStore(MemoryObjectStore())
    async with control_plane(tmp_path, store=store) as plane:
        await left_behind(plane, tmp_path, state=JobState.FAILED, start=START)
        store.script("list jobs/JOB/", times=1)
        made = deletions(plane)
        with pytest.raises(Exception, match="scripted"):
            await made.delete(JOB, True, "alice")
        job = await plane.job(JOB)
        assert job.reason == "is being deleted, asked for by alice"
        await made.delete(JOB, True, "alice")
        assert of_job(store) == []


async def test_nobody_starts_from_a_job_that_is_being_deleted(
    tmp_path: Path,
) -> None:
    store = FlakyStore(MemoryObjectStore())
    async with control_plane(tmp_path, store=store) as plane:
        await left_behind(plane, tmp_path, state=JobState.FAILED, start=START)
        store.script("list jobs/JOB/", times=1)
        made = deletions(plane)
        with pytest.raises(Exception, match="scripted"):
            await made.delete(JOB, True, "alice")
        with pytest.raises(Exception, match="is being deleted"):
            await plane.lifecycle.check_kept(CheckpointRef(job_id=JOB, step=30, attempt=1))


async def test_an_attempt_that_lives_on_is_told_to_stop_once_its_job_is_gone(
    tmp_path: Path,
) -> None:
    async with control_plane(tmp_path) as plane:
        await left_behind(plane, tmp_path)
        job = await plane.job(JOB)
        await plane.jobs.change(job, job.moved(JobState.STARTING, "starts", 0.0))
        await plane.trains(job)
        await plane.want(JOB, Desired.CANCELLED)
        await plane.tick()
        await deletions(plane).delete(JOB, True, "admin")
        with pytest.raises(StaleAttemptError, match="was deleted"):
            await plane.records.append_reported(JOB, 1, [(1, None)])


async def test_rows_that_went_by_half_go_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every transaction of a deletion fails once; only the first leaves the job as it was."""
    monkeypatch.setattr(deletion_store, "BATCH", 1)
    for place in range(20):
        folder = tmp_path / str(place)
        folder.mkdir()
        store = MemoryObjectStore()
        async with control_plane(folder, store=store) as plane:
            await left_behind(plane, folder, state=JobState.FAILED, start=START)
            told = [events.warning("one more", 0.0) for _ in range(3)]
            await plane.records.append(JOB, told)
            write, turns = plane.database.write, iter(range(100))

            def failing(write: Any = write, turns: Any = turns, place: int = place) -> Any:
                if next(turns) == place:
                    raise RuntimeError("scripted")
                return write()

            monkeypatch.setattr(plane.database, "write", failing)
            made = deletions(plane)
            try:
                await made.delete(JOB, True, "admin")
                break
            except RuntimeError:
                await made.close()
        async with control_plane(folder, store=store) as plane:
            await finished(plane)
            kept = await plane.jobs.get(JOB)
            assert (kept is not None) == (place == 0)
            assert bool(of_job(store)) == (place == 0)
            assert bool(await plane.records.read(JOB, 0, 10)) == (place == 0)
    assert place >= 6, "a tombstone, four records, the rest"
