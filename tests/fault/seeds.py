"""Seeds of faults: drawn anew each time, printed, and given back by EVERSTEP_CHAOS_SEED."""

from __future__ import annotations

import os
import random


def drawn(what: str) -> random.Random:
    """What a test draws its faults from; pytest shows the printed seed where the test fails.

    With EVERSTEP_CHAOS_SEED every test draws from that one: run alone the case that printed it.
    Steps and victims come back; where in a step a kill lands is the machine's own.
    """
    seed = int(os.environ.get("EVERSTEP_CHAOS_SEED") or random.randrange(1 << 32))
    print(f"{what}: EVERSTEP_CHAOS_SEED={seed}")
    return random.Random(seed)
