"""Where a job's time goes: every second since its submission in exactly one kind. Pure.

Fed with a job's records in the order of its stream, each once, in the transaction that makes them
durable; so it is right across restarts of the service, and needs no point that was thinned later.
docs/life-cycle.md says what each kind holds.

Invariant: the seconds of all kinds are those from the submission to `until`; once the job is final,
to its end. What a trainer claims is cut to the time that passed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from everstep.v1 import everstep_pb2 as pb
from trainer.contract.outcome import POLICIES, Outcome, Policy

KINDS = (
    "queue", "start", "data", "productive", "recompute", "checkpoint", "evaluation", "wait",
)  # fmt: skip
NOT_HELD = ("queue", "wait")  # kinds in which a job holds no resources
TRAINING = "training"  # between points; what such a stretch was is known at its end
ENDED = ""
# What a stretch in a state counts as; a state that is neither here nor RUNNING is final.
STRETCHES = {
    pb.JOB_STATE_QUEUED: "queue",
    pb.JOB_STATE_STARTING: "start",
    pb.JOB_STATE_PAUSED: "wait",
}
MOST = 1e12  # seconds or joules that nobody can have spent
CLEAN = (Outcome.COMPLETED, Outcome.STOPPED)  # ends that wait for the last checkpoint


@dataclass
class Ledger:
    """Running sums of one job. Times are seconds since the epoch."""

    until: float  # everything before is accounted for
    kind: str = "queue"  # of the stretch under way
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    attempt: int = 0  # the newest
    step: int = 0  # where it is, as reported
    highest: int = 0  # that any attempt of the job reached
    steps: int = 0  # trained by all attempts, those trained again too
    step_s: float = 0.0  # the last one took so long
    evaluation_s: float = 0.0  # told since the last point, not yet accounted for
    stalled_s: float = 0.0  # training stopped so long for checkpoints that were committed
    postponed_s: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)  # by cause
    # By a GPU's number on its node: all its joules, and those of the newest attempt among them.
    joules: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ledger:
        """The inverse of to_dict."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it, to the bit."""
        return asdict(self)

    def at(self, now: float) -> dict[str, float]:
        """Seconds by kind, with the stretch under way where its kind can't turn out another."""
        found = dict(self.seconds)
        if self.kind in NOT_HELD:
            found[self.kind] += max(now - self.until, 0.0)
        return found

    @property
    def ratio(self) -> float | None:
        """Productive seconds of those in which the job held resources; None: it held none yet."""
        held = sum(value for kind, value in self.seconds.items() if kind not in NOT_HELD)
        return self.seconds["productive"] / held if held > 0 else None

    @property
    def stretch(self) -> float:
        """How much longer than its steps alone this job takes, with what it validates between."""
        steps_s = sum(self.seconds[kind] for kind in ("productive", "recompute", "data"))
        return 1.0 + (self.seconds["evaluation"] / steps_s if steps_s > 0 else 0.0)

    @property
    def energy_joules(self) -> float | None:
        """Of all its GPUs that say so, over all attempts."""
        return sum(total for total, _ in self.joules.values()) if self.joules else None

    def take(self, time: float, record: pb.WatchJobResponse) -> None:
        """Account for the time up to a record. One that comes late, or from afar, moves nothing."""
        if record.HasField("point"):
            self._point(time, record.point)
            return
        event = record.event
        match event.kind:
            case pb.EVENT_KIND_STATE_CHANGED:
                self._moved(time, event.state)
            case pb.EVENT_KIND_ATTEMPT_STARTED:
                self._unreported(time, event.step)
                self.attempt, self.step, self.evaluation_s = record.attempt, event.step, 0.0
                self.highest = max(self.highest, event.step)
                if self.kind == TRAINING:
                    self.kind = "start"
                for each in self.joules.values():
                    each[1] = 0.0
            case pb.EVENT_KIND_ATTEMPT_ENDED:
                self._ended(time, event, record.attempt < self.attempt)
            case pb.EVENT_KIND_EVALUATED | pb.EVENT_KIND_SAMPLED:
                self.evaluation_s += _sane(event.evaluation_s)
            case pb.EVENT_KIND_CHECKPOINT_COMMITTED:
                self.stalled_s += _sane(event.checkpoint_stall_s)
                self.postponed_s += _sane(event.checkpoint_postponed_s)

    def _point(self, time: float, point: pb.MetricPoint) -> None:
        """A step is done. The first of an attempt compiles, and counts as its start."""
        for sample in point.devices:
            if sample.HasField("energy_joules"):
                told = self.joules.setdefault(str(sample.index), [0.0, 0.0])
                grown = max(_sane(sample.energy_joules) - told[1], 0.0)
                told[:] = told[0] + grown, told[1] + grown
        if self.kind not in ("start", TRAINING):
            return  # its attempt counts no longer
        claims = {
            "data": point.data_wait_s,
            "evaluation": self.evaluation_s,
            "checkpoint": point.checkpoint_s,
        }
        self._claimed(time, claims)
        if self.kind == "start":
            self._spend("start", time)
        self._train(time, point.step)
        self.kind, self.step_s, self.evaluation_s = TRAINING, point.step_s, 0.0

    def _ended(self, time: float, event: pb.Event, late: bool) -> None:
        """late: it is told of while the next attempt is at work already."""
        if event.outcome in POLICIES and POLICIES[Outcome(event.outcome)] is Policy.RESTART:
            self.restarts[event.outcome] = self.restarts.get(event.outcome, 0) + 1
        if late:
            return
        self._unreported(time, event.step)
        if self.kind == TRAINING and event.outcome in CLEAN:
            self._claimed(time, {"evaluation": self.evaluation_s})
            self._spend("checkpoint", time)
            self.kind = "start"
        # Of any other end how far it came is known once the next attempt begins.

    def _moved(self, time: float, state: pb.JobState) -> None:
        if state == pb.JOB_STATE_RUNNING or self.kind == ENDED:
            return  # said after the first point
        if self.kind == TRAINING and state == pb.JOB_STATE_STARTING:
            return  # see _ended
        self._spend("start" if self.kind == TRAINING else self.kind, time)
        self.kind = STRETCHES.get(state, ENDED)
        if self.kind == ENDED:
            # A clock that was set back meanwhile: the sum is that of the times that the job shows.
            largest = max(KINDS, key=lambda kind: self.seconds[kind])
            self.seconds[largest] += time - self.until
            self.until = time

    def _unreported(self, time: float, step: int) -> None:
        """Steps that were trained, but whose points were lost: as long as the last one told."""
        if self.kind == TRAINING and step > self.step:
            self._train(min(time, self.until + (step - self.step) * self.step_s), step)

    def _train(self, time: float, step: int) -> None:
        """Steps up to this one are done; those reached before are trained again."""
        count = max(step - self.step, 0)
        again = min(max(self.highest - self.step, 0), count) / count if count else 1.0
        span = max(time - self.until, 0.0)
        self.seconds["recompute"] += again * span
        self.seconds["productive"] += span - again * span
        self.until = max(time, self.until)
        self.steps += count
        self.step, self.highest = max(step, self.step), max(step, self.highest)

    def _claimed(self, time: float, claims: dict[str, float]) -> None:
        """Give kinds what they claim of the time that passed, and all of them no more than that."""
        span = max(time - self.until, 0.0)
        some = {kind: min(_sane(value), span) for kind, value in claims.items()}
        share = min(span / total, 1.0) if (total := sum(some.values())) > 0 else 0.0
        for kind, value in some.items():
            self._spend(kind, min(self.until + value * share, time))

    def _spend(self, kind: str, time: float) -> None:
        """By differences of times alone, whose roundings cancel out over millions of steps."""
        self.seconds[kind] += max(time - self.until, 0.0)
        self.until = max(time, self.until)


def _sane(value: float) -> float:
    """What a trainer claims; one that claims what can't be gets nothing."""
    return value if 0.0 <= value < MOST else 0.0
