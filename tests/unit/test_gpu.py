"""GPUs as NVML tells of them, on their way from the watch to /metrics."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from tests.fakes.control_plane import new_job
from tests.fakes.nvml import FakeNvml
from trainer import gpu
from trainer.contract.schedule import GroupValues
from trainer.distributed import World
from trainer.events import GpuSample, Point
from trainer.gpu import GpuWatch, watch_gpus
from trainer.report import point_to_proto

WAIT_S = 10.0
FULL = GpuSample(
    index=0,
    name="NVIDIA GeForce RTX 4070",
    memory_used_bytes=9_448 << 20,
    memory_total_bytes=12_282 << 20,
    utilization_ratio=0.97,
    power_watts=199.5,
    temperature_celsius=71,
    energy_joules=0.0,
    throttled=False,
)


def next_samples(watch: GpuWatch) -> tuple[GpuSample, ...]:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := watch.take():
            return found
        time.sleep(0.005)
    raise AssertionError("no sample came")


def test_each_sample_is_given_once_and_energy_counts_from_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "SAMPLE_S", 0.05)
    watch = GpuWatch(FakeNvml(), ["GPU-a"])
    try:
        assert next_samples(watch) == (FULL,)
        assert watch.take() == ()
        assert [next_samples(watch)[0].energy_joules for _ in range(2)] == [100.0, 200.0]
    finally:
        watch.close()


def test_what_a_card_does_not_give_is_absent_and_a_lost_card_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "SAMPLE_S", 0.01)
    nvml = FakeNvml()
    watch = GpuWatch(nvml, ["GPU-a", "GPU-b"])
    try:
        _, second = next_samples(watch)
        assert second.memory_used_bytes == FULL.memory_used_bytes
        figures = (second.utilization_ratio, second.power_watts, second.temperature_celsius)
        assert (*figures, second.energy_joules, second.throttled) == (None,) * 5
        nvml.lost.add("GPU-a")
        deadline = time.monotonic() + WAIT_S
        while [sample.index for sample in next_samples(watch)] != [1]:
            assert time.monotonic() < deadline
    finally:
        watch.close()


@pytest.mark.parametrize(("reasons", "held_down"), [(0x0, False), (0x4, False), (0x24, True)])
def test_a_card_at_its_power_cap_is_well_and_one_held_down_by_heat_is_not(
    reasons: int, held_down: bool
) -> None:
    nvml = FakeNvml()
    nvml.throttle_reasons = reasons
    watch = GpuWatch(nvml, ["GPU-a"])
    try:
        assert next_samples(watch)[0].throttled is held_down
    finally:
        watch.close()


def test_a_machine_without_gpus_gives_nothing() -> None:
    with contextlib.ExitStack() as cleanup:
        take = watch_gpus(World(), torch.device("cpu"), cleanup)
        assert take() == ()


def test_samples_become_metrics_that_go_with_their_job() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    job = new_job(1)
    labels = {"job_id": job.id, "job_name": job.spec.name, "gpu": "0"}

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"everstep_gpu_{name}", labels)

    values = {"wte": GroupValues(0.1, 0.8, 0.0)}
    point = Point(1, 2.0, 2.0, 0.5, 0.1, 0.0, 512, 5120.0, values, (FULL,))
    metrics.observe_point(job, point_to_proto(point))
    assert value("memory_used_bytes") == 9_448 << 20
    assert value("memory_total_bytes") == 12_282 << 20
    assert value("utilization_ratio") == 0.97
    assert value("power_watts") == 199.5
    assert value("temperature_celsius") == 71
    assert value("throttled") == 0.0
    metrics.forget(job.id)
    assert value("power_watts") is None


def test_the_share_of_the_peak_is_a_metric_where_it_is_known() -> None:
    registry = CollectorRegistry()
    metrics, job = Metrics(registry), new_job(1)
    labels = {"job_id": job.id, "job_name": job.spec.name}
    for share in (None, 0.84):
        point = Point(1, 2.0, 2.0, 0.5, 0.1, 0.0, 512, 5120.0, {}, mfu_ratio=share)
        metrics.observe_point(job, point_to_proto(point))
        assert registry.get_sample_value("everstep_mfu_ratio", labels) == share


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_tells_of_its_memory() -> None:
    with contextlib.ExitStack() as cleanup:
        take = watch_gpus(World(), torch.device("cuda", 0), cleanup)
        deadline = time.monotonic() + WAIT_S
        while not (found := take()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert 0 < found[0].memory_used_bytes <= found[0].memory_total_bytes
