"""How long each rank works on a step, and which one the others wait for.

A step takes as long for every rank, since sums need all of them; what tells them apart is the time
until a rank's own gradients are there. Knows no service.

Invariant: measuring never waits for the device: a step's time is read a step later.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from typing import Any

import torch

from trainer.distributed import World

WINDOW_STEPS = 20
SLOW_RATIO = 1.5  # of the ranks' median: this one holds up the others
WELL_RATIO = 1.2  # and from here down no longer


class Pace:
    """One rank's clock, and rank 0's judgement of all."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._boxes = world.gather(socket.gethostname())
        self._began: Any = None
        self._cuda = device.type == "cuda"
        self.last_s = 0.0  # of the last step, once the next has begun
        self._marks: tuple[Any, Any] | None = None
        self._waited_s = 0.0
        self._seen: list[deque[float]] = [deque(maxlen=WINDOW_STEPS) for _ in self._boxes]
        self._slow: set[int] = set()

    def begin(self, data_wait_s: float) -> None:
        """A step's computation begins, after so long a wait for its data.

        The device must be through with the step before.
        """
        if self._marks is not None:
            first, last = self._marks
            passed = first.elapsed_time(last) / 1000 if self._cuda else last - first
            self.last_s = self._waited_s + float(passed)
        self._waited_s = data_wait_s
        self._began = self._mark()

    def end(self) -> None:
        """The step's own gradients are there, or will be once the device is through."""
        self._marks = (self._began, self._mark())

    def judge(self, busy_s: list[float]) -> list[str]:
        """Words on each rank that has become slow, once; busy_s: of all ranks, in order.

        Two ranks' median is the lower: of two the slower one is told.
        """
        for seen, seconds in zip(self._seen, busy_s, strict=True):
            seen.append(seconds)
        if len(self._seen[0]) < WINDOW_STEPS:
            return []
        own = [statistics.median(seen) for seen in self._seen]
        typical = statistics.median_low(own)
        self._slow -= {rank for rank, each in enumerate(own) if each < WELL_RATIO * typical}
        found = {rank for rank, each in enumerate(own) if each > SLOW_RATIO * typical} - self._slow
        self._slow |= found
        return [
            f"rank {rank} on {self._boxes[rank]} holds up the others: {own[rank]:.3g} s of work a "
            f"step, where the ranks' median is {typical:.3g} s (last {WINDOW_STEPS} steps)"
            for rank in sorted(found)
        ]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own
        event.record()
        return event
