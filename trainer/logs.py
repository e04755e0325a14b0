"""What a rank logs and writes, shipped to the bucket in pieces while it trains.

A logging handler that writes lines where the process writes everything else, and a thread that
reads from there and ships. Logs are a convenience: trouble with the store never costs a step. What
a process wrote that ends before it could ship it is the keeper's.

Invariant: `close` ships what is left, within a bounded time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from trainer.events import Directive, Event, Point, Reporter
from trainer.keeper import Keeper, keep
from trainer.output import Tail, readable
from trainer.report import event_to_proto, point_line
from trainer.storage.layout import LogKey
from trainer.storage.logs import write_piece
from trainer.storage.object_store import ObjectStore, StoreError

SHIP_S = 2.0
POINT_EVERY_S = 1.0
CLOSE_S = 10.0
STANDARD_ERROR = 2
FORMAT = "%(created).3f %(levelname)s %(name)s: %(message)s"
log = logging.getLogger("trainer")


class LogShipper(logging.Handler):
    """Ships all that `trainer` logs in this process, from its making to its close.

    With files, also all that the process writes, from its beginning.
    """

    def __init__(
        self,
        store: ObjectStore,
        job_id: str,
        key: LogKey,
        files: Sequence[int] = (),
        secrets: Iterable[str] = (),
        keeper: Keeper | None = None,
    ) -> None:
        """key: of the first piece. files: see Tail; one of them is what standard error goes to.

        secrets: what no line may hold. keeper: does what is left when we can't.
        """
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._store, self._job_id, self._key = store, job_id, key
        self._own = None if files else tempfile.TemporaryFile()  # noqa: SIM115 - until close
        self._target = self._own.fileno() if self._own else STANDARD_ERROR
        self._tail = Tail(files or [self._target], secrets)
        self._keeper = keeper
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        log.setLevel(logging.INFO)
        log.addHandler(self)
        log.propagate = not files  # Ray Train's own handler would write each line once more
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or several of one message, at once: who ends us can't take it back."""
        with contextlib.suppress(OSError):  # a full disk must not end a step
            os.write(self._target, f"{self.format(record)}\n".encode(errors="replace"))

    def close(self) -> None:
        """Ship what is left and end. Safe to repeat."""
        log.removeHandler(self)
        log.propagate = True
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._own is not None and not self._thread.is_alive():
            self._own.close()
        super().close()

    def _run(self) -> None:
        while not self._closing.wait(SHIP_S):
            with contextlib.suppress(StoreError):  # the next time, with what comes meanwhile
                self._ship(last=False)
        try:
            while self._ship(last=True):
                pass
        except StoreError:
            return  # the keeper tries for longer
        if self._keeper is not None:
            self._keeper.dismiss()

    def _ship(self, last: bool) -> bool:
        """Store a piece, if there is something to store; whether there was."""
        lines = self._tail.take(last)
        if lines:
            write_piece(self._store, self._job_id, self._key, lines)
        self._tail.keep()
        if lines:
            self._key = replace(self._key, sequence=self._key.sequence + 1)
            if self._keeper is not None:
                self._keeper.note(sequence=self._key.sequence, offsets=self._tail.offsets)
        return bool(lines)


class RankLog:
    """All that a rank's process writes, from its first word on.

    The keeper alone has it until the rank belongs to an attempt: if it never does, that shows why.
    """

    def __init__(
        self, storage: str, job_id: str, rank: int, output: Sequence[int], secrets: Iterable[str]
    ) -> None:
        """storage: its URI. output: what the process writes to. secrets: what no line may hold."""
        self.files = readable(output)
        self._job_id, self._rank, self._secrets = job_id, rank, list(secrets)
        facts = {"storage": storage, "job": job_id, "rank": rank, "secrets": self._secrets}
        began = {"attempt": 0, "sequence": int(time.time()), "offsets": []}
        self._keeper = keep(self.files, **facts, **began)

    def ship(self, store: ObjectStore, attempt: int, credential: str) -> LogShipper:
        """From here on the bucket has it, as that of the attempt; credential: one more secret."""
        secrets = [credential, *self._secrets]
        if self._keeper is not None:
            self._keeper.note(attempt=attempt, sequence=1, secrets=secrets)
        key = LogKey(attempt, self._rank, 1)
        return LogShipper(store, self._job_id, key, self.files, secrets, self._keeper)


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
