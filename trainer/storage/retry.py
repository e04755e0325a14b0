"""How a call to a store is tried again: pauses that double, drawn at random, within a budget.

The one policy of retries above boto3's own (which answer a blip within one call). Safe only around
what may be repeated: every use says why it is.

Invariant: many workers that lose one store don't come back in step, and none hammers it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from trainer.storage.object_store import StoreUnavailableError

T = TypeVar("T")

FIRST_S = 0.5
LONGEST_S = 30.0
log = logging.getLogger(__name__)


def pauses() -> Iterator[float]:
    """Seconds to wait before each further try, for ever: half to all of a step that doubles."""
    step_s = FIRST_S
    while True:
        yield step_s * random.uniform(0.5, 1.0)
        step_s = min(2 * step_s, LONGEST_S)


def patiently(
    call: Callable[[], T], budget_s: float, pause: Callable[[float], object] = time.sleep
) -> T:
    """The call's value, tried again while the store is away, for about budget_s at most.

    pause: waits that many seconds, or less; true: whoever waits gives up.

    Raises:
        StoreUnavailableError: that of the last try, once the budget is spent or given up.
    """
    deadline = time.monotonic() + budget_s
    for pause_s in pauses():
        try:
            return call()
        except StoreUnavailableError as error:
            if time.monotonic() + pause_s > deadline:
                raise
            log.warning("%s; the next try is in %.1f s", error, pause_s)
            if pause(pause_s):
                raise
    raise AssertionError("pauses don't end")
