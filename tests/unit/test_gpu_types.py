"""Jobs that want GPUs of one type: where they go, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest

from service.jobs import Job
from service.placement import GPU_TYPE, Node
from service.scheduler import decide
from tests.fakes.control_plane import new_job
from tests.fakes.ray_cluster import machine
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError


def node(number: int, kind: str, gpus: int = 1) -> Node:
    return machine(number, gpus=gpus, cpus=8, labels={GPU_TYPE: kind} if kind else {})


def wants(number: int, kind: str | None, workers: int = 1, **changes: Any) -> Job:
    resources: dict[str, Any] = {
        "gpus_per_worker": 1,
        "cpus_per_worker": 2,
        "workers": {"min": workers, "max": workers},
        **({"gpu_type": kind} if kind else {}),
    }
    batch = {"total_batch_size": 1536}  # divides among three
    spec = {"resources": resources, "batch": batch}
    return new_job(number, spec=spec, submission=number, **changes)


def placed(*jobs: Job, on: list[Node]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    found = decide(jobs, [], on)
    return {move.job.id: move.job.placement for move in found.start}, found.waiting


@pytest.mark.parametrize("spelled", ["RTX 4070", "NVIDIA GeForce RTX 4070", "rtx4070"])
def test_a_job_goes_where_its_type_is_however_it_is_spelled(spelled: str) -> None:
    nodes = [node(1, "GeForce-RTX-4090"), node(2, "GeForce-RTX-4070"), node(3, "")]
    started, _ = placed(wants(1, spelled), on=nodes)
    assert started == {"JOB1": ("node2",)}


def test_a_type_is_not_another_that_begins_like_it() -> None:
    started, waiting = placed(wants(1, "RTX 4070"), on=[node(1, "GeForce-RTX-4070-Ti")])
    assert not started
    lacks = "no node has GPUs of type RTX 4070: there are GeForce-RTX-4070-Ti"
    assert waiting["JOB1"] == f"place 1 in the queue: {lacks}"


def test_who_wants_any_type_takes_any() -> None:
    started, _ = placed(wants(1, None), on=[node(1, "")])
    assert started == {"JOB1": ("node1",)}


def test_workers_of_one_job_share_a_type() -> None:
    nodes = [node(1, "H100"), node(2, "H200"), node(3, "H100")]
    started, _ = placed(wants(1, "H100", workers=2), on=nodes)
    assert set(started["JOB1"]) == {"node1", "node3"}
    started, waiting = placed(wants(1, "H100", workers=3), on=nodes)
    assert not started
    assert "needs 3 GPU, the cluster has 2" in waiting["JOB1"]


def test_one_that_waits_for_its_type_says_which_and_is_no_obstacle_where_there_is_none() -> None:
    nodes = [node(1, "H100"), node(2, "H200", gpus=4)]
    started, waiting = placed(wants(1, "H100"), wants(2, "H100"), on=nodes)
    assert list(started) == ["JOB1"]
    assert waiting["JOB2"] == (
        "place 2 in the queue: needs 1 GPU of type h100 and 2 CPU, free are 0 and 6 of 1 and 8"
    )
    started, _ = placed(wants(1, "A100"), wants(2, "H100"), on=nodes)
    assert list(started) == ["JOB2"]


def test_a_type_without_a_gpu_is_a_contradiction() -> None:
    with pytest.raises(SpecError, match="gpu_type: 'H100': needs gpus_per_worker: 1"):
        JobSpec.parse({"resources": {"gpus_per_worker": 0, "gpu_type": "H100"}})
