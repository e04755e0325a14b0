"""What a plan takes from the cluster and from the parent: rates, free memory, what changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from everstep.v1 import everstep_pb2 as pb
from service import events
from service.jobs import Job
from service.planning import Resolved
from tests.fakes.control_plane import TINY, ControlPlane, changed, control_plane
from tests.fakes.corpus import write_corpus
from tests.unit.test_lifecycle import checkpoint, submit
from trainer.contract.memory import estimate_memory
from trainer.contract.shape import ModelShape
from trainer.contract.speed import work_of
from trainer.contract.violations import SpecError
from trainer.data.tokenizer import train_tokenizer
from trainer.storage.object_store import open_store
from trainer.storage.tokenizer_files import write_tokenizer_files

FREE_BYTES = 420 * 10**6


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def trained(plane: ControlPlane, job: Job, step_s: float, **device: Any) -> Job:
    """The job has reported points, and what it ran on."""
    points = [
        pb.MetricPoint(step=step, step_s=step_s + wait, data_wait_s=wait)
        for step, wait in enumerate((0.0, 0.5, 0.25), 1)
    ]
    began = pb.Event(
        kind=pb.EVENT_KIND_VALUES_IN_FORCE, step=1, device=pb.DeviceInfo(name="cpu", **device)
    )
    records = [events.event_record(began, 1.0, 1)]
    records += [events.point_record(point, 1.0, 1) for point in points]
    await plane.records.append(job.id, records)
    return job


async def planned(plane: ControlPlane, inherit: bool = False, **sections: Any) -> Resolved:
    data = sections if inherit else changed(TINY, **sections)
    return await plane.lifecycle.plan(data, inherit)


async def test_a_rate_measured_here_is_used_and_its_job_named(plane: ControlPlane) -> None:
    assert (await planned(plane)).plan.time is None
    near = await trained(plane, await submit(plane), 2.0)
    far = await submit(plane, batch={"total_batch_size": 2560}, request="far")
    await trained(plane, far, 30.0)
    same = (await planned(plane)).plan.time
    assert same is not None
    assert same.step_s == pytest.approx(2.0)
    assert f"measured here: job {near.id} takes 2 s a step" in same.basis
    assert "FLOPs by this plan's count" in same.basis
    twice = (await planned(plane, batch={"total_batch_size": 512})).plan
    assert twice.time is not None
    shape: ModelShape = twice.shape
    factor = work_of(twice.spec, shape, 1) / work_of(near.spec, shape, 1)
    assert 1 < factor < 2
    assert twice.time.step_s == pytest.approx(2.0 * factor)
    assert near.id in twice.time.basis


async def test_rates_of_another_kind_of_job_say_nothing(plane: ControlPlane) -> None:
    await trained(plane, await submit(plane), 2.0)
    other = {"resources": {"gpus_per_worker": 0, "cpus_per_worker": 1}}
    assert (await planned(plane, **other)).plan.time is None
    assert (await planned(plane, precision={"compute": "bf16"})).plan.time is None


async def test_the_plan_compares_memory_with_what_was_free_for_a_job_here(
    plane: ControlPlane,
) -> None:
    assert (await planned(plane)).plan.memory.device_bytes is None
    await trained(plane, await submit(plane), 2.0, memory_bytes=10**9, free_bytes=FREE_BYTES)
    small = (await planned(plane)).plan
    assert small.memory.device_bytes == FREE_BYTES
    assert not any(text.startswith("memory:") for text in small.warnings)
    rows = {"device_batch_size": 4096, "total_batch_size": 4096 * 64}
    large = (await planned(plane, batch=rows)).plan
    assert large.memory.peak_bytes > FREE_BYTES
    (said,) = [text for text in large.warnings if text.startswith("memory:")]
    most = large.memory.largest_batch
    assert most
    assert f"batch.device_batch_size {most} fits" in said
    fitting = changed(large.spec.to_dict(), batch={"device_batch_size": most})
    again = (await planned(plane, **fitting)).plan
    assert again.memory.peak_bytes <= FREE_BYTES
    doubled = changed(fitting, batch={"device_batch_size": 2 * most})
    spec = (await planned(plane, **doubled)).plan.spec
    assert estimate_memory(spec, large.shape).peak_bytes > FREE_BYTES


async def test_a_card_that_jobs_ran_on_is_planned_for(plane: ControlPlane) -> None:
    device = pb.DeviceInfo(
        name="NVIDIA GeForce RTX 4070", memory_bytes=12_282 << 20, free_bytes=11_000 << 20
    )
    event = pb.Event(kind=pb.EVENT_KIND_VALUES_IN_FORCE, step=1, device=device)
    gpu = {"resources": {"gpus_per_worker": 1}, "precision": {"compute": "bf16"}}
    job = await submit(plane, **gpu)
    point = pb.MetricPoint(step=1, step_s=0.5)
    records = [events.event_record(event, 1.0, 1), events.point_record(point, 1.0, 1)]
    await plane.records.append(job.id, records)
    plan = (await planned(plane, **gpu)).plan
    assert plan.memory.device_bytes == 11_000 << 20
    assert plan.time is not None
    flops = plan.flops_per_token * 256
    assert plan.time.mfu_ratio == pytest.approx(flops / (0.5 * 58.3e12))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": {"num_iterations": 300}}, []),
        (
            {"optimizer": {"grad_clip_norm": 1.0}, "precision": {"embeddings": "fp32"}},
            [
                "not as in the parent: optimizer.grad_clip_norm None -> 1.0, "
                "precision.embeddings compute -> fp32"
            ],
        ),
        ({"evaluate": {"every": 7}}, ["not as in the parent: evaluate.every 0 -> 7"]),
    ],
)
async def test_what_a_continuation_changes_beside_its_rates_is_said(
    plane: ControlPlane, changes: dict[str, Any], words: list[str]
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    made = await planned(plane, True, start={"from": f"{parent.id}@5"}, **changes)
    assert [text for text in made.plan.warnings if text.startswith("not as in")] == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"optimizer": {"scalar_lr": 0.01}}, []),
        ({"data": {"order_seed": 5}}, ["data"]),
        ({"evaluate": {"tokens": 128}}, ["evaluation set"]),
        ({"model": {"max_seq_len": 32}, "evaluate": {"tokens": 128}}, ["data"]),
        ({"data": {"source": "other"}}, ["data", "evaluation set"]),
    ],
)
async def test_other_data_or_another_evaluation_set_is_said(
    plane: ControlPlane, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    if changes.get("data", {}).get("source"):
        write_corpus(tmp_path / "other", [[["One text. " * 90]], [["Another text. " * 90]]])
        changes = {"data": {"source": f"file:{tmp_path / 'other'}"}}
    made = await planned(plane, True, start={"from": f"{parent.id}@5"}, **changes)
    said = [text for text in made.plan.warnings if text.startswith(("data:", "evaluation set:"))]
    assert [text.partition(":")[0] for text in said] == words


async def test_another_tokenizer_of_the_same_size_is_other_data(
    plane: ControlPlane, tmp_path: Path
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    size = (await planned(plane)).binding.tokenizer.vocab_size
    letters = "abcdefghijklmnop"
    text = " ".join(letters[a] + letters[b] + letters[a - b] for a in range(16) for b in range(16))
    made = train_tokenizer([text], size)
    assert made.vocab_size == size
    write_tokenizer_files(made, open_store(f"file:{tmp_path}"))
    change = {"tokenizer": f"file:{tmp_path}"}
    found = await planned(plane, True, start={"from": f"{parent.id}@5"}, data=change)
    said = [text.partition(":")[0] for text in found.plan.warnings]
    assert {"data", "evaluation set"} <= set(said)


async def test_who_allowed_a_jump_once_allowed_no_other(plane: ControlPlane) -> None:
    parent = await submit(plane, guards={"allow_lr_jump": True, "max_lr_jump": 3.0})
    checkpoint(plane, parent, 5)
    hot = {"start": {"from": f"{parent.id}@5"}, "optimizer": {"matrix_lr": 10.0}}
    made = await planned(plane, True, **hot)
    assert made.plan.jumps
    assert made.spec.guards.max_lr_jump == 3.0
    assert not (await planned(plane, True, **hot, guards={"allow_lr_jump": True})).plan.jumps


async def test_a_tokenizer_whose_size_does_not_fit_the_weights_is_refused(
    plane: ControlPlane, tmp_path: Path
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    smaller = train_tokenizer(["Some text to learn pairs from."], 300)
    write_tokenizer_files(smaller, open_store(f"file:{tmp_path}"))
    change = {"tokenizer": f"file:{tmp_path}"}
    with pytest.raises(SpecError, match=rf"data\.tokenizer.*vocab_size {smaller.vocab_size}.*768"):
        await planned(plane, True, start={"from": f"{parent.id}@5"}, data=change)


async def test_all_rates_but_smear_scaled_by_one_factor_is_said_with_the_factor(
    plane: ControlPlane,
) -> None:
    parent = await submit(plane)
    checkpoint(plane, parent, 5)
    rates = parent.spec.to_dict()["optimizer"]
    lower = {name: rates[name] / 4 for name in ("embedding_lr", "unembedding_lr", "matrix_lr")} | {
        "scalar_lr": rates["scalar_lr"] / 4
    }
    start = {"from": f"{parent.id}@5"}
    made = await planned(plane, True, start=start, optimizer=lower)
    assert "all rates but smear's are 0.25 times those in force, smear's 1 times" in (
        made.plan.warnings
    )
    for plain in ({}, {name: rate / 4 for name, rate in rates.items() if name.endswith("lr")}):
        same = await planned(plane, True, start=start, optimizer=plain)
        assert not any("smear's" in text for text in same.plan.warnings)
