"""How a stream goes on over a service that is away: pauses that grow, and an end to them.

Invariant: many clients that lose one service don't come back in step.
"""

from __future__ import annotations

import random
import time

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


class Patience:
    """How long one stream is tried again. Not for two threads at once."""

    def __init__(self, patience_s: float) -> None:
        """patience_s: for how long the service may be away at a time."""
        self._patience_s = patience_s
        self.heard()

    def heard(self) -> None:
        """The service answers."""
        self._wait_s = FIRST_WAIT_S
        self._away_since: float | None = None

    def lasts(self) -> bool:
        """The service is away: whether it should be tried again."""
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        return now - self._away_since < self._patience_s

    def pause(self) -> None:
        """Wait before the next try."""
        time.sleep(self._wait_s * random.uniform(0.8, 1.2))
        self._wait_s = min(self._wait_s * 1.6, LONGEST_WAIT_S)
