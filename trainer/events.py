"""What an attempt tells the world, as values, and the protocol of whoever carries them.

The loop and the checkpoint writer know only this module; gRPC, standard output and tests implement
`Reporter`.

Invariant: telling never blocks and never raises: a listener that is away must not stop training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from trainer.contract.devices import Device
from trainer.contract.schedule import GroupValues
from trainer.storage.manifest import CheckpointRef


class Directive(Enum):
    """What the service asks of an attempt; a higher number outranks a lower one."""

    GO_ON = 0
    CHECKPOINT = 1
    STOP = 2


@dataclass(frozen=True)
class GpuSample:
    """What a GPU said at one moment; None where it doesn't give a figure."""

    index: int  # on its node
    name: str
    memory_used_bytes: int  # by whatever process
    memory_total_bytes: int
    utilization_ratio: float | None
    power_watts: float | None
    temperature_celsius: float | None
    energy_joules: float | None  # since the attempt's first sample
    throttled: bool | None = None  # heat or a power fault holds its clocks down


@dataclass(frozen=True)
class Point:
    """What one step measured. Losses in nats a token; tokens counts from the job's start."""

    step: int
    loss: float
    loss_smoothed: float
    gradient_norm: float
    step_s: float
    data_wait_s: float
    tokens: int
    tokens_per_s: float
    groups: Mapping[str, GroupValues]
    devices: tuple[GpuSample, ...] = ()  # of rank 0's node; in one point about every 5 s
    mfu_ratio: float | None = None  # None where the device's peak is unknown
    checkpoint_s: float = 0.0  # stopped for checkpoints since the point before
    rank_busy_s: tuple[float, ...] = ()  # each rank's work on the step before, waits left out


@dataclass(frozen=True)
class ValuesInForce:
    """The first step's values, read back from the optimizer."""

    step: int
    groups: Mapping[str, GroupValues]
    device: Device | None = None


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint that can be started from; postponed_s: it was due, but two were unsaved yet."""

    ref: CheckpointRef
    size_bytes: int
    save_s: float
    stall_s: float
    postponed_s: float = 0.0


@dataclass(frozen=True)
class CheckpointPassedOver:
    """A checkpoint that could not be read."""

    ref: CheckpointRef
    reason: str


@dataclass(frozen=True)
class Evaluated:
    """A validation figure in bits per byte; figures of one evaluation set compare."""

    step: int
    bits_per_byte: float
    evaluation_set: str
    took_s: float = field(default=0.0, compare=False)  # training stopped so long for it


@dataclass(frozen=True)
class Sampled:
    """Text drawn from the model."""

    step: int
    text: str
    took_s: float = field(default=0.0, compare=False)  # training stopped so long for it


@dataclass(frozen=True)
class Warned:
    """Something to know that stops nothing."""

    step: int
    message: str


Event = ValuesInForce | CheckpointCommitted | CheckpointPassedOver | Evaluated | Sampled | Warned


class Reporter(Protocol):
    """Carries points and events away, and directives back."""

    def point(self, point: Point) -> None:
        """Tell what a step measured."""

    def event(self, event: Event) -> None:
        """Tell what happened."""

    def directive(self) -> Directive:
        """What is asked for now; CHECKPOINT is answered once and then taken back."""

    def close(self) -> None:
        """Deliver what is left, within a bounded time."""
