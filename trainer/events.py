"""What an attempt tells the world, as values, and the protocol of whoever carries them.

The loop and the checkpoint writer know only this module; gRPC, standard output and tests implement
`Reporter`.

Invariant: telling never blocks and never raises: a listener that is away must not stop training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from trainer.contract.schedule import GroupValues
from trainer.storage.manifest import CheckpointRef


class Directive(Enum):
    """What the service asks of an attempt; a higher number outranks a lower one."""

    GO_ON = 0
    CHECKPOINT = 1
    STOP = 2


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


@dataclass(frozen=True)
class ValuesInForce:
    """The first step's values, read back from the optimizer."""

    step: int
    groups: Mapping[str, GroupValues]


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint that can be started from."""

    ref: CheckpointRef
    size_bytes: int
    save_s: float
    stall_s: float


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


@dataclass(frozen=True)
class Sampled:
    """Text drawn from the model."""

    step: int
    text: str


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
