"""NVIDIA's NVML as pynvml gives it, without a driver: two cards, one of which says little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """The functions that are asked; energy grows by 100 J at each question."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """Not supported, or the card is gone."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.energy_mj = 5_000_000
        self.throttle_reasons = 0x4  # at its power cap

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid in self.lost or uuid not in ("GPU-a", "GPU-b"):
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetIndex(self, handle: str) -> int:  # noqa: N802
        return ("GPU-a", "GPU-b").index(handle)

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "NVIDIA GeForce RTX 4070"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=9_448 << 20, total=12_282 << 20)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self._figure(handle, 97))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._figure(handle, 199_500)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:  # noqa: N802
        return self._figure(handle, 71)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.energy_mj += 100_000
        return self._figure(handle, self.energy_mj)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return self._figure(handle, self.throttle_reasons)

    def _figure(self, handle: str, value: int) -> int:
        if handle == "GPU-b":
            raise self.NVMLError("not supported")
        return value
