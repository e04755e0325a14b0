"""The panels of a card, which no box of these tests has: NVML is played, all behind it is real.

Watch, reporter, gRPC, service, /metrics, and a Prometheus that answers the dashboards' own queries.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import start_http_server

from everstep.v1 import everstep_pb2 as pb
from tests.fakes.api import credential, served
from tests.fakes.nvml import FakeNvml
from tests.fakes.ray_cluster import FakeRayCluster, machine
from tests.servers import prometheus
from tests.unit.test_gpu import next_samples
from trainer import gpu
from trainer.contract.devices import find_device
from trainer.contract.schedule import GroupValues
from trainer.contract.shape import ModelShape
from trainer.contract.speed import mfu_ratio
from trainer.events import Point
from trainer.gpu import GpuWatch
from trainer.report import ServiceReporter

DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy/grafana/dashboards").glob("*.json"))
OF_A_CARD = ("everstep_mfu_ratio", "everstep_gpu_")
STEP_S = 0.5
WAIT_S = 30.0


def asked() -> list[str]:
    """The queries of all panels that show a card."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [each for each in found if any(name in each for name in OF_A_CARD)]


async def test_every_panel_of_a_card_shows_what_the_card_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SAMPLE_S", 0.05)
    cluster = FakeRayCluster(machines=[machine(1, gpus=1, cpus=4)])
    async with served(tmp_path, cluster) as api:
        await api.plane.tick()
        job_id = (
            await api.submit(resources={"gpus_per_worker": 1}, precision={"compute": "bf16"})
        ).job.id
        await api.plane.tick()
        job = await api.plane.job(job_id)
        shape = ModelShape.of(job.spec.model, 768)
        share = mfu_ratio(job.spec, shape, find_device("RTX 4070"), 1, STEP_S)
        assert share
        watch = GpuWatch(FakeNvml(), ["GPU-a"])
        hello = pb.Hello(job_id=job_id, attempt=1)
        reporter = ServiceReporter(api.address, None, credential(job_id), hello)
        for step in (1, 2):
            devices = await asyncio.to_thread(next_samples, watch)
            groups = {"wte": GroupValues(0.1, 0.8, 0.001)}
            measured = Point(step, 3.0, 3.0, 1.0, STEP_S, 0.0, 256, 512.0, groups, devices, share)
            reporter.point(measured)
        await asyncio.to_thread(reporter.close)
        watch.close()
        api.plane.metrics.set_accounts(await api.plane.jobs.accounts([]))
        server, _ = start_http_server(0, "127.0.0.1", api.plane.registry)
        try:
            with prometheus(tmp_path, f"127.0.0.1:{server.server_port}") as ask:
                await asyncio.to_thread(check, ask, job_id, share)
        finally:
            server.shutdown()
            server.server_close()


def check(ask: Callable[[str], list[dict[str, Any]]], job_id: str, share: float) -> None:
    """Wait for the first scrape; then every panel has the card's figures."""
    expressions = asked()
    assert len(expressions) >= 8
    deadline = time.monotonic() + WAIT_S
    while not (found := ask(f'everstep_mfu_ratio{{job_id="{job_id}"}}')):
        assert time.monotonic() < deadline, "no scrape"
        time.sleep(0.1)
    assert float(found[0]["value"][1]) == pytest.approx(share)
    answers = {each: ask(each.replace("$job", job_id)) for each in expressions}
    assert [each for each, answer in answers.items() if not answer] == []
    figures = {
        each.partition("{")[0]: float(answer[0]["value"][1]) for each, answer in answers.items()
    }
    assert figures["everstep_gpu_temperature_celsius"] == 71
    assert figures["everstep_gpu_power_watts"] == 199.5
    assert figures["everstep_gpu_utilization_ratio"] == 0.97
    assert figures["everstep_gpu_memory_used_bytes"] == 9_448 << 20
    assert figures["everstep_gpu_energy_joules_total"] >= 100
    assert figures["everstep_gpu_throttled"] == 0
