"""GetCluster over the wire: machines, who holds what, what GPUs say, why jobs wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from service.placement import GPU_TYPE
from tests.fakes.api import Api, credential, details, hello, served
from tests.fakes.control_plane import TINY, changed
from tests.fakes.ray_cluster import FakeRayCluster, machine
from trainer.contract import build
from trainer.contract.outcome import AttemptResult, Outcome

GPU_JOB = {"resources": {"gpus_per_worker": 1, "cpus_per_worker": 2}}
MACHINES = [
    machine(1, gpus=2, cpus=8, labels={GPU_TYPE: "GeForce-RTX-4070"}),
    machine(2, cpus=4),
    machine(3, cpus=4, alive=False),
    machine(4),  # the one beside the service
]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path, FakeRayCluster(machines=list(MACHINES))) as made:
        yield made


async def look(api: Api) -> pb.GetClusterResponse:
    found = await api.call("GetCluster", pb.GetClusterRequest())
    assert isinstance(found, pb.GetClusterResponse)
    return found


async def test_before_ray_has_answered_nothing_is_made_up(api: Api) -> None:
    refused = await api.refused("GetCluster", pb.GetClusterRequest())
    assert refused.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_empty_cluster_shows_what_it_has_and_that_all_of_it_is_free(api: Api) -> None:
    await api.plane.tick()
    found = await look(api)
    assert [(node.id, node.address) for node in found.nodes] == [
        ("node1", "10.0.0.1"),
        ("node2", "10.0.0.2"),
    ]
    assert time.time() - found.seen_time.ToNanoseconds() / 1e9 < 10
    first, second = found.nodes
    assert (first.gpus, first.gpus_free, first.cpus, first.cpus_free) == (2, 2, 8, 8)
    assert first.gpu_type == "GeForce-RTX-4070"
    assert (second.gpus, second.cpus_free, second.gpu_type) == (0, 4, "")
    assert not first.devices
    assert not found.waiting


async def test_jobs_that_hold_resources_are_where_they_are_and_others_say_why_they_wait(
    api: Api,
) -> None:
    await api.plane.tick()
    two = {**GPU_JOB["resources"], "workers": {"min": 2, "max": 2}}
    running = (await api.submit(name="runs", resources=two)).job.id
    waiting = (await api.submit(name="waits", **GPU_JOB)).job.id
    await api.plane.tick()
    found = await look(api)
    first, second = found.nodes
    (share,) = first.shares
    assert (share.job_id, share.job_name, share.workers) == (running, "runs", 2)
    assert (share.gpus, share.cpus) == (2, 4)
    assert (first.gpus_free, first.cpus_free, list(first.job_ids)) == (0, 4, [running])
    assert not second.shares
    (queued,) = found.waiting
    assert (queued.job_id, queued.job_name) == (waiting, "waits")
    assert "needs 1 GPU" in queued.reason


async def test_a_type_that_no_node_has_is_refused_or_waited_for(api: Api) -> None:
    await api.plane.tick()
    wanted = {**GPU_JOB["resources"], "gpu_type": "H100"}
    spec = dict_to_proto(changed(TINY, resources=wanted))
    refused = await api.refused("SubmitJob", pb.SubmitJobRequest(spec=spec))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(refused, error_details_pb2.BadRequest).field_violations
    assert violation.field == "resources.gpu_type"
    assert "no node has GPUs of type H100: there are GeForce-RTX-4070" in violation.description
    await api.submit(resources={**wanted, "wait_for_nodes": True})
    await api.submit(resources={**wanted, "gpu_type": "RTX 4070"})
    await api.plane.tick()
    found = await look(api)
    (waits,) = found.waiting
    lacks = "no node has GPUs of type H100: there are GeForce-RTX-4070"
    assert waits.reason == f"place 1 in the queue: {lacks}"
    assert found.nodes[0].gpus_free == 1


async def test_what_gpus_say_stands_at_the_node_that_rank_0_is_on(api: Api) -> None:
    await api.plane.tick()
    job_id = (await api.submit(**GPU_JOB)).job.id
    await api.plane.tick()
    entry = pb.ReportEntry(sequence=1, point=pb.MetricPoint(step=1))
    entry.point.devices.add(index=1, memory_total_bytes=12 << 30, temperature_celsius=71)
    greeting = hello(job_id)
    greeting.hello.node_id = "node1"
    await api.report(credential(job_id), [greeting, pb.ReportRequest(entries=[entry])])
    first, second = (await look(api)).nodes
    (device,) = first.devices
    assert (device.index, device.temperature_celsius) == (1, 71)
    assert not device.HasField("power_watts")
    assert not second.devices
    api.plane.metrics.forget(job_id)
    assert not (await look(api)).nodes[0].devices


async def test_a_drained_node_is_left_by_its_jobs_and_taken_by_nobody_until_it_is_undone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machines = [machine(1, cpus=4), machine(2, cpus=4)]
    cluster = FakeRayCluster(machines=machines)
    async with served(tmp_path, cluster) as api:
        await api.plane.tick()
        first, second = [(await api.submit()).job.id for _ in range(2)]
        await api.plane.tick()
        (there,) = (await api.plane.job(first)).placement[:1]
        both = {(await api.plane.job(each)).placement for each in (first, second)}
        assert both == {("node1",)} or both == {("node1",), ("node2",)}
        address = f"10.0.0.{there[-1]}"
        call = asyncio.create_task(api.call("DrainNode", pb.DrainNodeRequest(node_id=address)))
        moved: set[str] = set()
        while not call.done():
            await api.plane.tick()
            for key in [key for key in cluster.stopped if key in cluster.known]:
                # Each stops with a checkpoint, as it was told.
                cluster.ends(key, AttemptResult(1, Outcome.STOPPED, "stopped as asked", 5))
                moved.add(key[0])
            await asyncio.sleep(0.01)
        assert set((await call).job_ids) == moved >= {first}
        found = await look(api)
        drained = next(node for node in found.nodes if node.address == address)
        assert not drained.shares
        assert "drained by admin" in drained.unused_because
        messages = await api.plane.messages(first)
        assert f"drain node {address}" in messages
        third = (await api.submit()).job.id
        await api.plane.tick(2)
        assert there not in (await api.plane.job(third)).placement
    # The next service still knows, whatever id Ray gives the machine now.
    again = FakeRayCluster(machines=[replace(each, id=f"{each.id}-anew") for each in machines])
    async with served(tmp_path, again) as api:
        await api.plane.tick(3)
        holding = [job for job in await api.plane.jobs.unfinished() if job.holds_resources]
        assert all(f"{there}-anew" not in job.placement for job in holding)
        undone = pb.DrainNodeRequest(node_id=f"{there}-anew", undo=True)
        with caplog.at_level(logging.INFO):
            await api.call("DrainNode", undone)
        assert f"draining node {address} undone by admin" in caplog.text
        await api.plane.tick(2)
        assert not any(node.unused_because for node in (await look(api)).nodes)


async def after_a_job_on_the_second(api: Api) -> tuple[pb.Node, pb.Node]:
    """Two nodes, after a job that could be on either went to the second."""
    await api.plane.tick()
    job_id = (await api.submit()).job.id
    await api.plane.tick()
    assert set((await api.plane.job(job_id)).placement) == {"node2"}
    first, second = (await look(api)).nodes
    return first, second


async def test_a_node_with_other_software_holds_nothing_and_says_why(tmp_path: Path) -> None:
    other = {**build.labels(), "everstep/torch": "1.0"}
    machines = [machine(1, cpus=8, labels=other), machine(2, cpus=4, labels=build.labels())]
    async with served(tmp_path, FakeRayCluster(machines=machines)) as api:
        first, second = await after_a_job_on_the_second(api)
        assert first.unused_because.startswith("it runs torch 1.0 instead of ")
        assert second.unused_because == ""


async def test_a_box_that_is_being_stopped_holds_nothing_and_says_why(tmp_path: Path) -> None:
    machines = [machine(1, cpus=8, draining=True), machine(2, cpus=4)]
    async with served(tmp_path, FakeRayCluster(machines=machines)) as api:
        first, second = await after_a_job_on_the_second(api)
        assert (first.unused_because, second.unused_because) == ("it is being stopped", "")


async def test_what_is_no_node_can_not_be_drained(api: Api) -> None:
    await api.plane.tick()
    for name, words in (("10.9.9.9", "no node is"), ("node", "2 nodes are"), ("", "say which")):
        refused = await api.refused("DrainNode", pb.DrainNodeRequest(node_id=name))
        assert words in (refused.details() or ""), name
