"""What a rank logs, shipped to the bucket in pieces while it trains.

A logging handler that gathers lines and a thread that writes them out. Logs are a convenience:
trouble with the store loses the oldest lines, never a step.

Invariant: `close` ships what is left, within a bounded time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from trainer.events import Directive, Event, Point, Reporter
from trainer.report import event_to_proto, point_line
from trainer.storage.layout import LogKey
from trainer.storage.logs import write_piece
from trainer.storage.object_store import ObjectStore, StoreError

SHIP_S = 2.0
MAX_LINES = 20_000  # kept while the store is away
POINT_EVERY_S = 1.0
CLOSE_S = 10.0
FORMAT = "%(levelname)s %(name)s: %(message)s"
log = logging.getLogger("trainer")


class LogShipper(logging.Handler):
    """Ships everything that `trainer` logs in this process, from its making to its close."""

    def __init__(self, store: ObjectStore, job_id: str, attempt: int, rank: int) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._store = store
        self._job_id = job_id
        self._attempt = attempt
        self._rank = rank
        self._lines: deque[tuple[float, str]] = deque(maxlen=MAX_LINES)
        self._shipped = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        log.setLevel(logging.INFO)
        log.addHandler(self)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line, or several of one message; never blocks."""
        for text in self.format(record).splitlines():
            self._lines.append((record.created, text))

    def close(self) -> None:
        """Ship what is left and end. Safe to repeat."""
        log.removeHandler(self)
        self._closing.set()
        self._thread.join(CLOSE_S)
        super().close()

    def _run(self) -> None:
        while not self._closing.wait(SHIP_S):
            self._ship()
        self._ship()

    def _ship(self) -> None:
        taken = [self._lines.popleft() for _ in range(len(self._lines))]
        if not taken:
            return
        key = LogKey(self._attempt, self._rank, self._shipped + 1)
        try:
            write_piece(self._store, self._job_id, key, taken)
        except StoreError:
            self._put_back(taken)
            return
        self._shipped += 1

    def _put_back(self, taken: list[tuple[float, str]]) -> None:
        """For the next time, before what was logged meanwhile; past MAX_LINES the oldest go."""
        self.acquire()  # whoever logs holds it
        try:
            self._lines = deque((*taken, *self._lines), MAX_LINES)
        finally:
            self.release()


class LoggingReporter:
    """A Reporter that logs what it passes on to another: events all, points once a second."""

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner
        self._next_point_at = 0.0

    def point(self, point: Point) -> None:
        """See Reporter."""
        self._inner.point(point)
        if time.monotonic() >= self._next_point_at:
            self._next_point_at = time.monotonic() + POINT_EVERY_S
            log.info("%s", point_line(point))

    def event(self, event: Event) -> None:
        """See Reporter."""
        self._inner.event(event)
        log.info("%s", event_to_proto(event).message)

    def directive(self) -> Directive:
        """See Reporter."""
        return self._inner.directive()

    def close(self) -> None:
        """See Reporter."""
        self._inner.close()
