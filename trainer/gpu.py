"""What the job's GPUs say of themselves, by NVML: memory, use, power, temperature, energy.

A thread asks every few seconds, off the step's path; rank 0 speaks for all GPUs of its node that
the job trains on. The only module of trainer/ that knows NVML.

Invariant: a machine without NVIDIA's driver, or a figure that a card doesn't give, is an absence,
never an error and never a zero.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.distributed import World
from trainer.events import GpuSample

T = TypeVar("T")

SAMPLE_S = 5.0
CLOSE_S = 5.0
# NVML's bits of hardware slowdown, thermal slowdown by software and by hardware, and power brake.
# Not the power cap: a card at its limit reaches it all the time.
THROTTLED = 0x8 | 0x20 | 0x40 | 0x80
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells boxes apart that have one host name


def watch_gpus(
    world: World, device: torch.device, cleanup: contextlib.ExitStack
) -> Callable[[], tuple[GpuSample, ...]]:
    """Begin to watch; the function gives each sample once, and () in between. Every rank calls it.

    cleanup: ends the watch.
    """
    own = (_node(), _uuid(device))
    everywhere = world.gather(own)
    here = [uuid for node, uuid in everywhere if node == own[0] and uuid is not None]
    nvml = open_nvml() if world.is_first and here else None
    if nvml is None:
        return tuple
    watch = GpuWatch(nvml, here)
    cleanup.callback(watch.close)
    return watch.take


def open_nvml() -> Any | None:
    """NVIDIA's own binding, ready to be asked; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class GpuWatch:
    """Asks GPUs, known by UUID, every SAMPLE_S. nvml: pynvml, initialised."""

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:
        self._nvml = nvml
        self._uuids = uuids
        self._energy_began: dict[str, float] = {}
        self._latest: tuple[GpuSample, ...] = ()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._thread.start()

    def take(self) -> tuple[GpuSample, ...]:
        """The newest samples, unless they were taken before."""
        found, self._latest = self._latest, ()
        return found

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            found = [self._asked(partial(self._sample, uuid)) for uuid in self._uuids]
            self._latest = tuple(sample for sample in found if sample is not None)
            if self._closing.wait(SAMPLE_S):
                return

    def _sample(self, uuid: str) -> GpuSample:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        percent = self._asked(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        celsius = self._asked(
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        )
        millijoules = self._asked(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        reasons = self._asked(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        energy = None
        if millijoules is not None:
            joules = millijoules / 1e3
            energy = joules - self._energy_began.setdefault(uuid, joules)
        return GpuSample(
            index=nvml.nvmlDeviceGetIndex(handle),
            name=nvml.nvmlDeviceGetName(handle),
            memory_used_bytes=memory.used,
            memory_total_bytes=memory.total,
            utilization_ratio=None if percent is None else percent / 100,
            power_watts=None if milliwatts is None else milliwatts / 1e3,
            temperature_celsius=celsius,
            energy_joules=energy,
            throttled=None if reasons is None else bool(reasons & THROTTLED),
        )

    def _asked(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _node() -> str:
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def _uuid(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
