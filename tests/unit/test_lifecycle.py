"""Use cases over a local folder: whole jobs or none, and refusals that say what to change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    JobNotFoundError,
    LearningRateJumpError,
    PreconditionError,
    RequestReusedError,
    StorageAwayError,
)
from service.jobs import Desired, Job
from service.store import JobStore
from tests.fakes.control_plane import TINY, ControlPlane, changed, control_plane, new_job
from tests.fakes.corpus import write_corpus
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from tests.fakes.ray_cluster import machine
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import GroupValues, InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.states import JobState
from trainer.contract.violations import SpecError
from trainer.storage.layout import part_name
from trainer.storage.manifest import CheckpointRef, Manifest, Part
from trainer.storage.object_store import StoreUnavailableError, open_store
from trainer.storage.repository import CheckpointRepository

DIGEST = "d" * 64


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def submit(
    plane: ControlPlane, inherit: bool = False, request: str = "", **sections: Any
) -> Job:
    """Submit TINY with changes; with inherit only the changes."""
    data = sections if inherit else changed(TINY, **sections)
    return (await plane.lifecycle.submit(data, inherit, request, DIGEST))[0].job


async def refused(plane: ControlPlane, **sections: Any) -> dict[str, str]:
    """Violations by field, of a submission that must leave nothing behind."""
    before = sorted(info.key for info in plane.store.list(""))
    queued = await plane.jobs.counts()
    with pytest.raises(SpecError) as caught:
        await submit(plane, **sections)
    assert sorted(info.key for info in plane.store.list("")) == before
    assert await plane.jobs.counts() == queued
    found: dict[str, str] = {}
    for violation in caught.value.violations:
        found[violation.field] = f"{found.get(violation.field, '')}{violation}\n"
    return found


def checkpoint(plane: ControlPlane, job: Job, step: int, scale: float = 1.0) -> CheckpointRef:
    """Commit a checkpoint whose update used the job's base rates times scale."""
    repository = CheckpointRepository(plane.store, job.id)
    binding = repository.document().binding
    assert binding is not None
    shape = ModelShape.of(job.spec.model, binding.tokenizer.vocab_size)
    values = {
        group.name: GroupValues(group.lr * scale, group.betas[0], group.weight_decay)
        for group in param_groups(job.spec, shape)
    }
    in_force = InForce(step - 1, scale, 0.9, 0.1, values, 0.5)
    attempt = repository.claim(None, "host").attempt
    ref = CheckpointRef(job_id=job.id, step=step, attempt=attempt)
    path = Path(plane.store.uri.removeprefix("file:")).parent / "part"
    path.write_bytes(b"weights")
    part = Part.of_file(path, part_name(0))
    repository.upload_part(ref, part, path)
    repository.commit(
        Manifest(
            job_id=job.id,
            step=step,
            attempt=attempt,
            parts=(part,),
            state={"in_force": in_force.to_dict()},
            spec_sha256=DIGEST,
            identity={},
            versions={},
            created_at=datetime.now(UTC),
        )
    )
    return ref


async def test_a_submission_makes_the_document_and_then_the_job(tmp_path: Path) -> None:
    store = FlakyStore(MemoryObjectStore())
    async with control_plane(tmp_path, store=store) as plane:
        job = await submit(plane)
        assert await plane.job(job.id) == job
        assert (job.state, job.desired, job.submission) == (JobState.QUEUED, Desired.RUNNING, 1)
        document = await plane.storage.document(job.id)
        assert JobSpec.parse(document.spec) == job.spec == JobSpec.parse(TINY)
        assert document.binding is not None
        assert document.binding.validation.name == "shard_00003.parquet"
        assert await plane.states(job.id) == ["QUEUED"]
        lost = store.script("put jobs/")
        with pytest.raises(StorageAwayError, match="scripted"):
            await submit(plane)
        assert lost.fired == 1
        assert [view.job.id for view in await plane.lifecycle.page([], None, 10)] == [job.id]


async def test_the_same_request_gives_the_same_job_and_no_second_document(
    plane: ControlPlane,
) -> None:
    first = await submit(plane, request="R")
    keys = [info.key for info in plane.store.list("")]
    again, made = await plane.lifecycle.submit(TINY, False, "R", DIGEST)
    assert (again.job, made) == (first, None)
    assert [info.key for info in plane.store.list("")] == keys


async def test_the_same_request_at_the_same_time_makes_one_job(plane: ControlPlane) -> None:
    jobs = await asyncio.gather(*(submit(plane, request="R") for _ in range(4)))
    assert len({job.id for job in jobs}) == 1
    assert [info.key for info in plane.store.list("jobs/")] == [f"jobs/{jobs[0].id}/spec.json"]


@pytest.mark.parametrize("nth", [1, 2])
async def test_a_start_whose_hold_or_document_gets_no_answer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    store = open_store(f"file:{tmp_path}/bucket")
    async with control_plane(tmp_path, store=store) as plane:
        parent = await submit(plane)
        checkpoint(plane, parent, 3)
        puts: list[str] = []
        really = store.put

        def put(key: str, data: bytes, if_none_match: bool = False) -> None:
            really(key, data, if_none_match)
            puts.append(key)
            if len(puts) == nth:
                raise StoreUnavailableError("scripted: no answer")

        before = sorted(info.key for info in store.list(""))
        monkeypatch.setattr(store, "put", put)
        with pytest.raises(StorageAwayError, match="no answer"):
            await submit(plane, start={"from": f"{parent.id}@3"})
        assert len(puts) == nth
        assert sorted(info.key for info in store.list("")) == before


async def test_a_submission_that_the_database_does_not_take_leaves_nothing(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 3)

    async def full(*_: object) -> None:
        raise OSError("scripted: the disk is full")

    before = sorted(info.key for info in plane.store.list(""))
    monkeypatch.setattr(JobStore, "insert", full)
    with pytest.raises(OSError, match="disk is full"):
        await submit(plane, start={"from": f"{parent.id}@3"})
    assert sorted(info.key for info in plane.store.list("")) == before


async def test_a_submission_whose_caller_hangs_up_is_made_whole(tmp_path: Path) -> None:
    store = FlakyStore(open_store(f"file:{tmp_path}/bucket"))
    async with control_plane(tmp_path, store=store) as plane:
        parent = await submit(plane)
        checkpoint(plane, parent, 3)
        start = {"from": f"{parent.id}@3"}
        store.gate.clear()
        asked = asyncio.create_task(submit(plane, request="R", start=start))
        assert await asyncio.to_thread(store.waits.wait, 30)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        again = asyncio.create_task(submit(plane, request="R", start=start))
        store.gate.set()
        job = await again
        made = [view.job.id for view in await plane.lifecycle.page([], None, 10)]
        assert made == [job.id, parent.id]
        keys = [info.key for info in store.list("")]
        assert sum("held-by-" in key for key in keys) == 1
        assert f"jobs/{parent.id}/checkpoints/{3:010d}/1/held-by-{job.id}" in keys
        assert sum(key.endswith("spec.json") for key in keys) == 2


async def test_a_submission_answers_what_get_shows(plane: ControlPlane) -> None:
    view, _ = await plane.lifecycle.submit(TINY, False, "R", DIGEST)
    assert view == await plane.lifecycle.get(view.job.id)
    checkpoint(plane, view.job, 3)
    start = changed(TINY, start={"from": f"{view.job.id}@3"})
    forked, _ = await plane.lifecycle.submit(start, False, "F", DIGEST)
    assert forked.progress.step == 3
    assert forked == await plane.lifecycle.get(forked.job.id)


async def test_another_request_under_the_same_id_is_refused(plane: ControlPlane) -> None:
    await submit(plane, request="R")
    with pytest.raises(RequestReusedError, match="'R'"):
        await plane.lifecycle.submit(TINY, False, "R", "e" * 64)


async def test_requests_without_an_id_are_different_requests(plane: ControlPlane) -> None:
    assert (await submit(plane)).id != (await submit(plane)).id


@pytest.mark.parametrize(
    ("sections", "field", "said"),
    [
        ({"data": {"source": "file:/nowhere"}}, "data.source", "no such folder"),
        ({"data": {"tokenizer": "file:/nowhere"}}, "data.tokenizer", "/nowhere"),
        ({"data": {"validation": "other.parquet"}}, "data.validation", "not one of the 4 shards"),
        ({"data": {"source": "builtin:bible"}}, "data.source", "builtin:python-docs"),
        ({"data": {"tokenizer": "builtin:python-docs"}}, "data.tokenizer", "vocabulary size"),
        ({"data": {"tokenizer": "builtin:python-docs-\u00b2"}}, "data.tokenizer", "512 to 65536"),
        ({"data": {"tokenizer": "builtin:python-docs-" + "9" * 900}}, "data.tokenizer", "65536"),
        ({"data": {"source": "s3://b/x"}}, "data.source", "s3://bucket"),
        ({"model": {"vocab_size": 50}}, "model.vocab_size", "the tokenizer has 768"),
        ({"start": {"from": "NOBODY@5"}}, "start.from", "there is no such job"),
        ({"start": {"from": "nanochat:/x@5"}}, "start.from", "meta_000005.json is missing"),
    ],
)
async def test_what_a_spec_refers_to_and_is_not_there_is_named(
    plane: ControlPlane, sections: dict[str, Any], field: str, said: str
) -> None:
    found = await refused(plane, **sections)
    assert set(found) == {field}
    assert said in found[field]


async def test_more_than_the_cluster_has_is_refused_with_what_it_has(plane: ControlPlane) -> None:
    await plane.tick()
    needs = {"gpus_per_worker": 1, "cpus_per_worker": 64}
    found = await refused(plane, resources=needs, data={"source": "file:/nowhere"})
    assert set(found) == {"resources.gpus_per_worker", "resources.cpus_per_worker", "data.source"}
    assert "the cluster has 0" in found["resources.gpus_per_worker"]
    assert "needs 64 CPU, the cluster has 4" in found["resources.cpus_per_worker"]
    plane.cluster.machines = [machine(1, gpus=1, cpus=64)]
    await plane.tick()
    await submit(plane, resources=needs)


async def test_a_worker_larger_than_any_node_is_refused_whatever_the_cluster_has_in_all(
    plane: ControlPlane,
) -> None:
    plane.cluster.machines = [machine(1, gpus=1, cpus=2), machine(2, gpus=1, cpus=2)]
    await plane.tick()
    found = await refused(plane, resources={"gpus_per_worker": 1, "cpus_per_worker": 4})
    assert (
        "a worker must fit on one node, the largest has 2 CPU"
        in (found["resources.cpus_per_worker"])
    )
    three = {"workers": {"min": 3, "max": 3}, "gpus_per_worker": 0, "cpus_per_worker": 1}
    batch = {"device_batch_size": 1, "total_batch_size": 64 * 3}
    plane.cluster.machines = [machine(1, cpus=1), machine(2, cpus=1), machine(3, cpus=1)]
    await plane.tick()
    await submit(plane, resources=three, batch=batch)
    plane.cluster.machines = [machine(1, cpus=3), machine(2, cpus=3)]
    await plane.tick()
    found = await refused(plane, resources={**three, "cpus_per_worker": 2}, batch=batch)
    assert "the cluster has places for 2" in found["resources.workers.min"]


async def test_a_job_that_waits_for_nodes_is_queued_with_what_is_missing(
    plane: ControlPlane,
) -> None:
    await plane.tick()
    job = await submit(plane, resources={"cpus_per_worker": 64, "wait_for_nodes": True})
    await plane.tick()
    waiting = await plane.job(job.id)
    assert waiting.state is JobState.QUEUED
    assert (
        waiting.reason == "place 1 in the queue: with 1 worker it needs 64 CPU, the cluster has 4"
    )
    plane.cluster.machines = [machine(1, cpus=64)]
    await plane.tick()
    assert (await plane.job(job.id)).state is JobState.STARTING


async def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    plane: ControlPlane,
) -> None:
    parent = await submit(plane)
    found = await refused(plane, start={"from": f"{parent.id}@latest"})
    assert "has at steps: none" in found["start.from"]
    checkpoint(plane, parent, 5)
    found = await refused(plane, start={"from": f"{parent.id}@6"})
    assert "has at steps: 5" in found["start.from"]


async def test_a_model_that_does_not_fit_the_checkpoint_is_refused(plane: ControlPlane) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    found = await refused(
        plane, model={"depth": 4}, start={"from": f"{parent.id}@5"}, data={"validation": "x"}
    )
    assert set(found) == {"data.validation"}  # without its data the shape is unknown
    found = await refused(plane, model={"depth": 4}, start={"from": f"{parent.id}@5"})
    assert "n_embd 64, but" in found["model"]


async def test_a_horizon_at_or_before_the_start_is_refused(plane: ControlPlane) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 12)
    found = await refused(plane, start={"from": f"{parent.id}@12"})
    assert "12: the horizon must be after the start, step 12" in found["schedule.num_iterations"]


async def test_a_store_that_is_away_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    store = FlakyStore(MemoryObjectStore())
    async with control_plane(tmp_path, store=store) as plane:
        store.away = True
        for sections in ({}, {"start": {"from": "JOB@5"}}):
            with pytest.raises(StorageAwayError, match="scripted"):
                await submit(plane, **sections)
        assert await plane.jobs.counts() == {}
        assert store.inner.snapshot() == {}  # type: ignore[attr-defined]


async def test_a_continuation_inherits_what_it_does_not_say(plane: ControlPlane) -> None:
    parent = await submit(plane, name="parent", optimizer={"matrix_lr": 0.01})
    ref = checkpoint(plane, parent, 5)
    child = await submit(
        plane,
        inherit=True,
        start={"from": f"{parent.id}@latest"},
        schedule={"num_iterations": 40},
        optimizer={"scalar_lr": 0.02},
    )
    assert child.start == ref
    expected = changed(
        parent.spec.to_dict(),
        start={"from": f"{parent.id}@latest"},
        optimizer={"scalar_lr": 0.02},
        schedule={"num_iterations": 40},
    )
    assert child.spec == JobSpec.parse(expected)
    document = await plane.storage.document(child.id)
    assert document.in_force is not None
    assert document.in_force["step"] == 4
    assert document.start == ref


@pytest.mark.parametrize("start", [None, "JOB", "NOBODY@5", 5, "a" * 65 + "@5"])
async def test_inheriting_from_nobody_is_refused(plane: ControlPlane, start: object) -> None:
    with pytest.raises(SpecError, match=r"start\.from"):
        await plane.lifecycle.plan({"start": {"from": start}} if start else {}, True)


async def test_a_continuation_keeps_the_parents_binding_of_the_same_data(
    plane: ControlPlane, tmp_path: Path
) -> None:
    text = "Some text that repeats itself. " * 40
    source = tmp_path / "data"
    write_corpus(source, [[[text]], [[text]]])
    parent = await submit(plane, data={"source": f"file:{source}"})
    checkpoint(plane, parent, 5)
    (source / "shard_9.parquet").write_bytes((source / "shard_0.parquet").read_bytes())
    child = await submit(plane, inherit=True, start={"from": f"{parent.id}@5"})
    binding = (await plane.storage.document(child.id)).binding
    assert binding == (await plane.storage.document(parent.id)).binding
    fresh = await submit(plane, data={"source": f"file:{source}"})
    assert (await plane.storage.document(fresh.id)).binding != binding


async def test_a_jump_of_the_rates_lists_every_group_with_old_new_and_ratio(
    plane: ControlPlane,
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5, scale=0.1)
    start = {"from": f"{parent.id}@5"}
    before = [info.key for info in plane.store.list("")]
    with pytest.raises(LearningRateJumpError) as caught:
        await submit(plane, start=start, optimizer={"smear_lr": 0.01})
    said = str(caught.value)
    resolved = await plane.lifecycle.plan(changed(TINY, start=start), False)
    for row in resolved.plan.rates:
        assert row.parent is not None
        line = f"{row.group}: {row.parent.lr:.6g} -> {row.points[0][1].lr:.6g}, 10 times"
        assert (line in said) == (row.group != "smear")
    for way_out in ("anchor: continue", "allow_lr_jump", f"{parent.id}@5"):
        assert way_out in said
    assert [info.key for info in plane.store.list("")] == before
    assert (await submit(plane, start=start, guards={"allow_lr_jump": True})).start is not None


async def test_planning_creates_nothing(plane: ControlPlane) -> None:
    resolved = await plane.lifecycle.plan(TINY, False)
    assert resolved.plan.steps == 12
    assert list(plane.store.list("")) == []
    assert await plane.jobs.counts() == {}


async def test_a_job_that_nobody_knows_is_not_found(plane: ControlPlane) -> None:
    for call in (plane.lifecycle.get, plane.lifecycle.cancel, plane.lifecycle.checkpoints):
        with pytest.raises(JobNotFoundError):
            await call("NOBODY")


async def test_cancel_waits_for_the_end_and_is_safe_to_repeat(plane: ControlPlane) -> None:
    job = await submit(plane)
    cancelling = asyncio.create_task(plane.lifecycle.cancel(job.id))
    while (await plane.job(job.id)).desired is not Desired.CANCELLED:
        await asyncio.sleep(0)
    assert not cancelling.done()
    with pytest.raises(PreconditionError, match="being cancelled"):
        await plane.lifecycle.resume(job.id)
    await plane.tick()
    view, manifest = await asyncio.wait_for(cancelling, 30)
    assert (view.job.state, manifest) == (JobState.CANCELLED, None)
    again, _ = await asyncio.wait_for(plane.lifecycle.cancel(job.id), 30)
    assert again.job == view.job
    with pytest.raises(PreconditionError, match="CANCELLED"):
        await plane.lifecycle.pause(job.id)


async def test_a_job_that_ended_is_not_resumed(plane: ControlPlane) -> None:
    job = await plane.add(new_job(1, state=JobState.SUCCEEDED))
    with pytest.raises(PreconditionError, match="SUCCEEDED"):
        await plane.lifecycle.resume(job.id)


async def test_a_watch_goes_on_across_states_and_ends_with_the_job(plane: ControlPlane) -> None:
    job = await submit(plane)

    async def watch(cursor: int) -> list[int]:
        return [record.cursor async for record in plane.lifecycle.watch(job.id, cursor)]

    from_start, from_two = (asyncio.create_task(watch(cursor)) for cursor in (0, 2))
    await plane.tick()
    await plane.want(job.id, Desired.CANCELLED)
    plane.cluster.lose((job.id, 1))
    await plane.tick()
    assert await asyncio.wait_for(from_start, 30) == [1, 2, 3, 4]
    assert await asyncio.wait_for(from_two, 30) == [3, 4]
    assert await asyncio.wait_for(watch(4), 30) == []
