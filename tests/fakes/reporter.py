"""A Reporter that keeps what it hears and gives the directives that a test scripts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from trainer.events import CheckpointCommitted, Directive, Event, Point

E = TypeVar("E", bound=Event)
WAIT_S = 20.0


class RecordingReporter:
    """directives: step (of the last point) to the directive given once it is reached."""

    def __init__(self, directives: dict[int, Directive] | None = None, at_step: int = 0) -> None:
        self.points: list[Point] = []
        self.events: list[Event] = []
        self.given: list[Directive] = []
        self.closed = False
        self._directives = directives or {}
        self._step = at_step
        self._heard = threading.Condition()

    def point(self, point: Point) -> None:
        with self._heard:
            self.points.append(point)
            self._step = point.step
            self._heard.notify_all()

    def event(self, event: Event) -> None:
        with self._heard:
            self.events.append(event)
            self._heard.notify_all()

    def directive(self) -> Directive:
        found = self._directives.pop(self._step, Directive.GO_ON)
        if found is not Directive.GO_ON:
            self.given.append(found)
        return found

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type[E]) -> list[E]:
        """Events of a kind so far."""
        with self._heard:
            return [event for event in self.events if isinstance(event, kind)]

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Wait until what was heard makes it true."""
        with self._heard:
            assert self._heard.wait_for(reached, WAIT_S), "not heard in time"


class PacingReporter(RecordingReporter):
    """For jobs that save at every step: training waits until the step before is stored.

    A snapshot that waits for a slow store gives way to a newer one, as it should; a test that reads
    the checkpoint of every step can't have that.
    """

    def point(self, point: Point) -> None:
        super().point(point)
        before = {each.step for each in self.points[:-1]}
        self.wait_for(lambda: before <= {each.ref.step for each in self.of(CheckpointCommitted)})
