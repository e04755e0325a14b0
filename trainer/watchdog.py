"""Notices that training stands still, and says where it stands.

A thread beside the loop, in the trainer's own process: it works while the service is away. It
counts its own ticks, not the clock: in a process that was stopped (SIGSTOP, a frozen machine) it
stood still as well, and time that nobody lived through is no sign of anything.

Invariant: only a step can be late; the first ones, which compile, are after an hour. Everything
between steps (waiting for data, evaluation, samples, checkpoints) is never taken for a standstill.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Self

STALL_FACTOR = 20  # times the median step
STALL_FLOOR_S = 300.0  # and never before: a slow machine, another rank's sample
FIRST_STEPS_S = 3600.0  # for one that compiles, or may: no model takes it, a GPU that hangs does
# Of the time of the first look: an attempt ends only where the sign is still there half as long on.
SURE_FACTOR = 1.5
TICK_S = 1.0
LEARN_STEPS = 5  # of an attempt before its median counts; among them those that compile
REMEMBERED = 101  # steps of which the median is taken


@dataclass(frozen=True)
class Stall:
    """A step that is late. sure: it has been for so long that waiting is no use."""

    silent_s: float
    median_s: float | None  # None: too few steps are done to say
    stack: str  # of the training thread
    sure: bool

    @property
    def words(self) -> str:
        """What is late, and by how much."""
        usual = (
            f"where one takes {self.median_s:.2g} s" if self.median_s else "one of its first steps"
        )
        return f"no step for {self.silent_s:.0f} s, {usual}"


class Watchdog:
    """Watches the thread that enters it. on_stall is called once when late, once when sure."""

    def __init__(
        self,
        on_stall: Callable[[Stall], None],
        floor_s: float = STALL_FLOOR_S,
        tick_s: float = TICK_S,
    ) -> None:
        self._on_stall = on_stall
        self._floor_s = floor_s
        self._tick_s = tick_s
        self._step_s: deque[float] = deque(maxlen=REMEMBERED)
        self._steps = 0
        self._lock = threading.Lock()
        self._silent_s = 0.0
        self._told = False
        self._elsewhere = 0
        self._watched = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def step(self, step_s: float) -> None:
        """A step is done; step_s without what it waited for."""
        with self._lock:
            self._steps += 1
            if self._steps > LEARN_STEPS // 2:  # what compiles is no measure
                self._step_s.append(step_s)
            self._silent_s, self._told = 0.0, False

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What isn't a step: it may take its time."""
        with self._lock:
            self._elsewhere += 1
        try:
            yield
        finally:
            with self._lock:
                self._elsewhere -= 1
                self._silent_s, self._told = 0.0, False

    def tick(self) -> Stall | None:
        """One more tick was lived through; a stall where that is news."""
        with self._lock:
            if self._elsewhere:
                return None
            self._silent_s += self._tick_s
            usual_s = median(self._step_s) if self._steps >= LEARN_STEPS else None
            if usual_s is None:
                limit_s = FIRST_STEPS_S
            else:
                limit_s = max(self._floor_s, STALL_FACTOR * usual_s)
            sure = self._silent_s >= SURE_FACTOR * limit_s
            if self._silent_s < limit_s or (self._told and not sure):
                return None
            self._told = True
            return Stall(self._silent_s, usual_s, self._stack(), sure)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return "".join(traceback.format_stack(frame)) if frame is not None else "no such thread"

    def _run(self) -> None:
        while not self._closing.wait(self._tick_s):
            if stall := self.tick():
                self._on_stall(stall)
                if stall.sure:
                    return

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
