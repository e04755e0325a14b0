"""The ledger of a job's time: each second once, in the kind that a known history says it was."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.v1 import everstep_pb2 as pb
from service.ledger import KINDS, Ledger

SUBMITTED = 1.8e9 + 0.123456
NONE = -7.0  # joules that aren't told
S = pb.JobState
seconds = st.floats(0.0, 500.0)
small = st.floats(0.0, 3.0)


def state(to: S, step: int = 0) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(
        event=pb.Event(kind=pb.EVENT_KIND_STATE_CHANGED, state=to, step=step)
    )


def started(attempt: int, step: int) -> pb.WatchJobResponse:
    event = pb.Event(kind=pb.EVENT_KIND_ATTEMPT_STARTED, step=step)
    return pb.WatchJobResponse(attempt=attempt, event=event)


def ended(attempt: int, outcome: str, step: int = 0) -> pb.WatchJobResponse:
    event = pb.Event(kind=pb.EVENT_KIND_ATTEMPT_ENDED, outcome=outcome, step=step)
    return pb.WatchJobResponse(attempt=attempt, event=event)


def evaluated(took_s: float) -> pb.WatchJobResponse:
    event = pb.Event(kind=pb.EVENT_KIND_EVALUATED, validation_bpb=1.0, evaluation_s=took_s)
    return pb.WatchJobResponse(event=event)


def point(
    step: int, step_s: float, data_s: float = 0.0, stall_s: float = 0.0, joules: float = NONE
):
    devices = [pb.DeviceSample(index=0, energy_joules=joules)] if joules != NONE else []
    return pb.WatchJobResponse(
        point=pb.MetricPoint(
            step=step, step_s=step_s, data_wait_s=data_s, checkpoint_s=stall_s, devices=devices
        )
    )


@dataclass
class History:
    """A life made up second by second: what truly was, and the stream that tells of it."""

    now: float = SUBMITTED
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    stream: list[tuple[float, pb.WatchJobResponse]] = field(default_factory=list)
    attempt: int = 0
    saved: int = 0
    step: int = 0
    highest: int = 0

    def tell(self, record: pb.WatchJobResponse) -> None:
        self.stream.append((self.now, record))

    def spend(self, kind: str, span_s: float) -> None:
        self.truth[kind] += span_s
        self.now += span_s

    def train(self, steps: list[tuple[float, float, float, float]], load_s: float) -> None:
        """An attempt from the last checkpoint: step, data, evaluation and stall seconds of each."""
        self.attempt += 1
        self.step = self.saved
        self.tell(started(self.attempt, self.step))
        self.spend("start", load_s)
        stall_before = 0.0
        for place, (step_s, data_s, evaluation_s, stall_s) in enumerate(steps):
            self.spend("data", data_s)
            self.step += 1
            kind = "recompute" if self.step <= self.highest else "productive"
            self.spend("start" if place == 0 else kind, step_s)
            self.highest = max(self.highest, self.step)
            self.tell(point(self.step, step_s + data_s, data_s, stall_before))
            self.spend("evaluation", evaluation_s)
            self.tell(evaluated(evaluation_s))
            self.spend("checkpoint", stall_s)
            stall_before = stall_s
            if stall_s > 0:
                self.saved = self.step

    def crash(self, dead_s: float) -> None:
        self.tell(pb.WatchJobResponse(event=pb.Event(kind=pb.EVENT_KIND_WARNING)))
        self.spend("start", dead_s)
        self.tell(ended(self.attempt, "WORKER_LOST"))
        self.tell(state(S.JOB_STATE_STARTING))

    def stop(self, save_s: float, outcome: str, to: S) -> None:
        self.spend("checkpoint", save_s)
        self.saved = self.step
        self.tell(ended(self.attempt, outcome, self.step))
        self.tell(state(to, self.step))


steps = st.lists(
    st.tuples(st.floats(0.01, 9.0), small, st.just(0.0) | small, st.just(0.0) | small),
    min_size=1,
    max_size=6,
)
lives = st.lists(
    st.tuples(st.sampled_from(["crash", "pause", "requeue"]), seconds, steps), max_size=6
)


def lived(first_wait_s: float, life: list, last: list) -> History:
    history = History()
    history.tell(state(S.JOB_STATE_QUEUED))
    history.spend("queue", first_wait_s)
    history.tell(state(S.JOB_STATE_STARTING))
    for kind, span_s, of_attempt in life:
        history.train(of_attempt, 7.25)
        if kind == "crash":
            # What happens after the last point is lost with the attempt, and not known.
            evaluation_s, stall_s = of_attempt[-1][2:]
            history.truth["evaluation"] -= evaluation_s
            history.truth["checkpoint"] -= stall_s
            history.truth["start"] += evaluation_s + stall_s
            history.crash(span_s)
        elif kind == "pause":
            history.stop(2.5, "STOPPED", S.JOB_STATE_PAUSED)
            history.spend("wait", span_s)
            history.tell(state(S.JOB_STATE_QUEUED))
            history.tell(state(S.JOB_STATE_STARTING))
        else:
            history.stop(2.5, "STOPPED", S.JOB_STATE_QUEUED)
            history.spend("queue", span_s)
            history.tell(state(S.JOB_STATE_STARTING))
    history.train(last, 7.25)
    history.stop(1.5, "COMPLETED", S.JOB_STATE_SUCCEEDED)
    return history


def account(stream, restarts: frozenset[int] = frozenset()) -> Ledger:
    ledger = Ledger(until=SUBMITTED)
    for place, (time, record) in enumerate(stream):
        if place in restarts:  # of the service: what it knows is what is on disk
            ledger = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
        ledger.take(time, record)
        assert sum(ledger.seconds.values()) == pytest.approx(ledger.until - SUBMITTED, abs=1e-6)
    return ledger


@settings(deadline=None)
@given(seconds, lives, steps, st.frozensets(st.integers(0, 100)))
def test_each_kind_holds_what_truly_was_whatever_restarts(
    first_wait_s, life, last, restarts
) -> None:
    history = lived(first_wait_s, life, last)
    ledger = account(history.stream, restarts)
    for kind in KINDS:
        assert ledger.seconds[kind] == pytest.approx(history.truth[kind], abs=1e-4), kind
    assert sum(ledger.seconds.values()) == pytest.approx(history.now - SUBMITTED, abs=1e-6)
    assert ledger.restarts.get("WORKER_LOST", 0) == sum(kind == "crash" for kind, *_ in life)


anything = st.one_of(
    st.sampled_from(list(S.values())[1:]).map(state),
    st.builds(started, st.integers(1, 5), st.integers(0, 50)),
    st.builds(
        ended, st.integers(1, 5), st.sampled_from(["COMPLETED", "STALLED", "?"]), st.integers(0, 50)
    ),
    st.floats().map(evaluated),
    st.builds(point, st.integers(0, 50), st.floats(), st.floats(), st.floats(), st.floats()),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 1e5), anything), max_size=40), st.floats(-1e3, 1e6))
def test_whatever_is_told_in_whatever_order_every_second_is_in_one_kind(told, end) -> None:
    """Late, early, contradictory and impossible claims: the sum holds, and nothing is negative."""
    stream = [(SUBMITTED + at, record) for at, record in told]
    ledger = account(stream)
    assert all(math.isfinite(value) for value in ledger.seconds.values())
    if ledger.kind:
        ended_at = max(SUBMITTED + end, ledger.until)
        ledger.take(ended_at, state(S.JOB_STATE_FAILED))
        assert sum(ledger.seconds.values()) == pytest.approx(ended_at - SUBMITTED, abs=1e-6)
        assert min(ledger.seconds.values()) >= 0.0
    assert ledger.kind == ""
    joules = ledger.energy_joules
    assert joules is None or (math.isfinite(joules) and joules >= 0)


def test_what_nobody_can_have_used_counts_nothing() -> None:
    ledger = Ledger(until=SUBMITTED, kind="start")
    for attempt in (1, 2):
        for joules in (1e308, float("inf"), float("nan"), -1.0, 5.0):
            ledger.take(SUBMITTED, point(1, 1.0, joules=joules))
        ledger.take(SUBMITTED, started(attempt, 0))
    assert ledger.energy_joules == 10.0


def test_a_million_steps_add_up_to_a_microsecond() -> None:
    ledger = Ledger(until=SUBMITTED, kind="start")
    now = SUBMITTED
    for step in range(1, 200_001):
        now += 0.0377
        ledger.take(now, point(step, 0.0377, 1.7e-5))
    assert sum(ledger.seconds.values()) == pytest.approx(now - SUBMITTED, abs=1e-6)
    assert ledger.seconds["data"] == pytest.approx(200_000 * 1.7e-5, rel=0.02)


def test_steps_that_nobody_told_of_while_the_service_was_away_count_as_trained() -> None:
    """It trains on, its last points are lost with it, and the next attempt starts further on."""
    ledger = Ledger(until=SUBMITTED, kind="start")
    stream = [(1.0, started(1, 0)), (11.0, point(1, 1.0)), (13.0, point(2, 2.0))]
    stream += [(2013.0, ended(1, "WORKER_LOST")), (2040.0, started(2, 902))]
    stream += [(2045.0, point(903, 2.0)), (2047.0, point(904, 2.0))]
    for at, record in stream:
        ledger.take(SUBMITTED + at, record)
    assert ledger.seconds["productive"] == pytest.approx(2.0 + 900 * 2.0 + 2.0)
    assert ledger.seconds["start"] == pytest.approx(11.0 + 2045.0 - 1813.0)
    assert ledger.seconds["recompute"] == 0.0
    assert ledger.steps == 904


def test_an_end_that_is_told_of_late_ends_nothing_of_the_next_attempt() -> None:
    """The host started the next one by itself, while the service was away."""
    for outcome in ("STOPPED", "STALLED"):
        ledger = Ledger(until=SUBMITTED, kind="start")
        stream = [(1.0, started(1, 0)), (10.0, point(1, 1.0)), (20.0, started(2, 0))]
        stream += [(30.0, point(1, 1.0)), (10.5, ended(1, outcome, 7)), (32.0, point(2, 2.0))]
        for at, record in stream:
            ledger.take(SUBMITTED + at, record)
        assert ledger.seconds["start"] == pytest.approx(30.0)
        assert ledger.seconds["productive"] == pytest.approx(2.0)
        assert ledger.restarts.get("STALLED", 0) == (outcome == "STALLED")


def test_points_that_come_late_from_before_the_hello_count_by_their_own_times() -> None:
    """The service comes back to an attempt that began while it was away."""
    ledger = Ledger(until=SUBMITTED, kind="start")
    stream = [(1800.0, started(1, 0)), (10.0, point(1, 1.0)), (1700.0, point(500, 3.0))]
    for at, record in stream:
        ledger.take(SUBMITTED + at, record)
    assert ledger.seconds["start"] == pytest.approx(10.0)
    assert ledger.seconds["productive"] == pytest.approx(1690.0)


def test_energy_adds_up_over_attempts_and_never_falls() -> None:
    ledger = Ledger(until=SUBMITTED, kind="start")
    for record in (
        *(started(1, 0), point(1, 1.0, joules=0.0), point(2, 1.0, joules=300.0)),
        *(started(2, 0), point(1, 1.0, joules=50.0), point(2, 1.0, joules=40.0)),
        *(started(3, 0), point(1, 1.0, joules=400.0)),
    ):
        ledger.take(SUBMITTED, record)
    assert ledger.energy_joules == 750.0


def test_time_in_which_a_job_waits_is_shown_as_it_passes_and_counts_not_against_it() -> None:
    ledger = Ledger(until=SUBMITTED)
    assert ledger.at(SUBMITTED + 5)["queue"] == pytest.approx(5)
    assert ledger.ratio is None
    ledger.take(SUBMITTED + 10, state(S.JOB_STATE_STARTING))
    assert ledger.at(SUBMITTED + 99)["start"] == 0.0  # trainers may yet tell of steps
    ledger.take(SUBMITTED + 20, point(1, 1.0))
    ledger.take(SUBMITTED + 50, point(2, 1.0))
    assert ledger.ratio == pytest.approx(0.75)
