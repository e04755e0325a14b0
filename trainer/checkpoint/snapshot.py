"""Copies of a rank's share of the state in host memory, made while training waits.

Two buffers: one made at the start, so that a copy meets no fresh page, the other when the first is
still being written. On CUDA they are pinned, and a snapshot waits for the device once.

Invariant: a snapshot's bytes don't change until it is released, and no third one is ever made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.shares import lay_out, parameter_of
from trainer.checkpoint.train_state import TrainState, live_tensors
from trainer.distributed import World
from trainer.optim import Optimizer

MOST_ALIVE = 2


@dataclass(frozen=True)
class Snapshot:
    """A rank's share of the state at one step: training may go on. buffer: as parts lay it out."""

    buffer: Tensor
    state: dict[str, Any]
    step: int
    validation_bpb: float | None


class Snapshots:
    """Takes snapshots of one model and optimizer. `take` and `release` may run in two threads."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, world: World) -> None:
        self._model = model
        self._optimizer = optimizer
        live = live_tensors(model, optimizer)
        own = {n: t for n, t in live.items() if optimizer.owner[parameter_of(n)] == world.rank}
        self.parts = lay_out(own, world.rank)
        self._pinned = any(tensor.is_cuda for tensor in live.values())
        self._lock = threading.Lock()
        self._free = [self._buffer()]
        self._made = 1

    @property
    def room(self) -> bool:
        """Whether a snapshot can be taken now."""
        with self._lock:
            return bool(self._free) or self._made < MOST_ALIVE

    @torch.no_grad()
    def take(self, state: TrainState) -> Snapshot:
        """Copy the share to the host; there must be room."""
        assert self.room, "a snapshot needs a free buffer"
        with self._lock:
            found = self._free.pop() if self._free else None
            self._made += found is None
        buffer = self._buffer() if found is None else found
        live = live_tensors(self._model, self._optimizer)
        for slot in (slot for part in self.parts for slot in part.slots):
            place = buffer[slot.start : slot.end].view(slot.dtype).view(slot.shape)
            place.copy_(live[slot.name], non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        state.counters = self._optimizer.counters()
        return Snapshot(buffer, state.to_dict(), state.step, state.validation_bpb)

    def release(self, snapshot: Snapshot) -> None:
        """Its bytes are safe elsewhere, or no longer wanted."""
        with self._lock:
            self._free.append(snapshot.buffer)

    def _buffer(self) -> Tensor:
        size = self.parts[-1].end if self.parts else 0
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return buffer.fill_(0)  # every page is there before the first snapshot needs it
