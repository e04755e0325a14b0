"""Any history of attempts: what is current is the line that the latest attempt stands on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.checkpoints import MOMENT, ref_to
from trainer.storage.manifest import CheckpointRef, Claim
from trainer.storage.repository import select_current

# Each attempt falls back over some checkpoints of the line, then commits so many new ones. One
# stale writer may commit one more step after it was superseded.
attempts = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=8
)


@given(attempts)
def test_current_is_the_line_of_the_latest_attempt(
    history: list[tuple[int, int, bool]],
) -> None:
    line: list[CheckpointRef] = []
    committed: list[CheckpointRef] = []
    claims: list[Claim] = []
    for attempt, (passed_over, commits, stale) in enumerate(history, start=1):
        dropped = line[len(line) - passed_over :] if passed_over else []
        line = line[: len(line) - passed_over] if passed_over <= len(line) else []
        start = line[-1] if line else None
        claims.append(Claim(attempt=attempt, start=start, host="h", nonce="n", created_at=MOMENT))
        step = start.step if start else 0
        if stale and attempt > 1 and dropped:
            committed.append(ref_to(dropped[-1].step + 10, attempt - 1))
        for _ in range(commits):
            step += 10
            line.append(ref_to(step, attempt))
            committed.append(line[-1])
        assert select_current(committed, claims) == line[::-1]
