"""What would run, worked out before anything is spent. Pure.

Everything here follows from the spec, the tokenizer's vocabulary size, what is known of the device
and, for a continuation, the values in force at the parent's step. The re-heat guard is decided here
and enforced by the service.

Invariant: the rates shown are `Schedule.at`, the very function that the trainer applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.contract.advice import advise, advise_continuation, advise_memory
from trainer.contract.devices import Device
from trainer.contract.memory import MemoryEstimate, estimate_memory, state_bytes
from trainer.contract.scaling import ParamGroup, param_groups
from trainer.contract.schedule import (
    MOMENTUM_WARMUP_STEPS,
    GroupValues,
    InForce,
    Schedule,
)
from trainer.contract.shape import ModelShape, ParameterCounts
from trainer.contract.spec import Anchor, JobSpec
from trainer.contract.speed import Measured, TimeEstimate, estimate_time
from trainer.contract.violations import SpecError, Violation

# The field of section optimizer that a group's rate is proportional to; else matrix_lr.
RATE_FIELDS = {
    "lm_head": "unembedding_lr",
    "wte": "embedding_lr",
    "value_embeds": "embedding_lr",
    "resid": "scalar_lr",
    "x0": "scalar_lr",
    "smear": "smear_lr",
}


@dataclass(frozen=True)
class Fork:
    """The point that a continuation leaves its parent at.

    name: JOB@STEP, or nanochat:<folder or s3 uri>@STEP. claimed: rates by group that the checkpoint
    says it ran with, where these aren't the ones in its optimizer. changes: what else is not as it
    was at the parent, in words.
    """

    name: str
    step: int
    in_force: InForce
    claimed: dict[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What is known of where a job will run. measured: what jobs of its kind reached there."""

    device: Device | None = None
    measured: Sequence[Measured] = ()


@dataclass(frozen=True)
class RateRow:
    """One group's values over the run.

    ratio, momentum_ratio, decay_ratio: the first step's values over the parent's in force.
    """

    group: str
    points: tuple[tuple[int, GroupValues], ...]
    parent: GroupValues | None = None
    claimed: float | None = None

    @property
    def ratio(self) -> float | None:
        """Of the learning rate; infinite where the parent's was 0."""
        return self._ratio("lr")

    @property
    def momentum_ratio(self) -> float | None:
        """Of the momentum."""
        return self._ratio("momentum")

    @property
    def decay_ratio(self) -> float | None:
        """Of the weight decay."""
        return self._ratio("weight_decay")

    def _ratio(self, name: str) -> float | None:
        if self.parent is None:
            return None
        new, old = getattr(self.points[0][1], name), getattr(self.parent, name)
        if old > 0:
            return float(new / old)
        return math.inf if new > 0 else 1.0


@dataclass(frozen=True)
class LearningRateJump:
    """A group whose first rate exceeds the parent's by more than the guard allows."""

    group: str
    old: float
    new: float
    ratio: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.group}: {self.old:.6g} -> {self.new:.6g}, {self.ratio:.3g} times "
            f"(guards.max_lr_jump {self.allowed:g})"
        )


@dataclass(frozen=True)
class Plan:
    """What would run. jumps is empty unless the guard objects."""

    spec: JobSpec
    shape: ModelShape
    counts: ParameterCounts
    flops_per_token: int
    grad_accum_steps: int
    start_step: int
    fork: Fork | None
    rates: tuple[RateRow, ...]
    jumps: tuple[LearningRateJump, ...]
    warnings: tuple[str, ...]
    checkpoint_bytes: int
    memory: MemoryEstimate
    time: TimeEstimate | None

    @property
    def steps(self) -> int:
        """Steps from the start to the horizon."""
        return self.spec.schedule.num_iterations - self.start_step

    @property
    def tokens(self) -> int:
        """Tokens from the start to the horizon."""
        return self.steps * self.spec.batch.total_batch_size

    @property
    def steps_at_risk(self) -> int:
        """The most steps that a crash can cost: those between two checkpoints."""
        keep = self.spec.checkpoint
        most = min(keep.every_steps or self.steps, self.steps)
        if keep.every_s and self.time is not None:
            most = min(most, math.ceil(keep.every_s / self.time.step_s))
        return most

    @property
    def seconds_at_risk(self) -> float | None:
        """The same in seconds of training; None where nothing is known of a step's time."""
        if self.time is not None:
            return self.steps_at_risk * self.time.step_s
        return float(self.spec.checkpoint.every_s) or None

    @property
    def checkpoints_kept(self) -> int:
        """Checkpoints that lie in storage at once, at most: retention's, and one on its way."""
        keep = self.spec.checkpoint
        every, last = keep.keep_every_steps, self.start_step + self.steps
        marked = last // every - self.start_step // every if every else 0
        return keep.keep_last + marked + keep.keep_best + 1

    @property
    def ways_out(self) -> tuple[str, ...]:
        """Settings that would put each refused rate where the parent's is."""
        wanted: dict[str, float] = {}
        for jump in self.jumps:
            name = RATE_FIELDS.get(jump.group, "matrix_lr")
            rate = getattr(self.spec.optimizer, name) / jump.ratio
            wanted[name] = min(rate, wanted.get(name, rate))
        return tuple(f"optimizer.{name}={rate:.4g}" for name, rate in wanted.items())


def make_plan(
    spec: JobSpec, vocab_size: int, fork: Fork | None = None, where: Surroundings | None = None
) -> Plan:
    """Plan a job.

    Raises:
        SpecError: the horizon is not after the start, or the spec's vocab_size isn't the
            tokenizer's.
    """
    start_step = fork.step if fork else 0
    where = where or Surroundings()
    _check(spec, vocab_size, fork)
    shape = ModelShape.of(spec.model, vocab_size)
    groups = param_groups(spec, shape)
    schedule = Schedule(spec.schedule, groups, start_step, fork.in_force if fork else None)
    rates = tuple(_rate_row(group, schedule, spec, start_step, fork) for group in groups)
    jumps = tuple(_jump(row, spec) for row in rates if _jumps(row, spec))
    allowed = spec.guards.allow_lr_jump
    memory = estimate_memory(spec, shape, where.device, start_step)
    warnings = advise(spec, groups, schedule, start_step)
    if allowed:
        warnings = [f"learning-rate jump, allowed by the spec: {jump}" for jump in jumps] + warnings
    if fork is not None:
        ratios = {row.group: row.ratio for row in rates}
        warnings += advise_continuation(schedule, start_step, fork.in_force, ratios)
        warnings += [*fork.changes, *(_rise(row) for row in rates if _rises(row, spec))]
    return Plan(
        spec=spec,
        shape=shape,
        counts=shape.parameter_counts(),
        flops_per_token=shape.flops_per_token,
        grad_accum_steps=spec.grad_accum_steps(spec.possible_workers[0]),
        start_step=start_step,
        fork=fork,
        rates=rates,
        jumps=() if allowed else jumps,
        warnings=(*warnings, *advise_memory(memory, spec.batch.device_batch_size)),
        checkpoint_bytes=state_bytes(spec, shape),
        memory=memory,
        time=estimate_time(spec, shape, where.device, where.measured),
    )


def milestones(spec: JobSpec, start_step: int) -> tuple[int, ...]:
    """Steps at which a schedule turns, with the first, the middle and the last of the run."""
    schedule = spec.schedule
    last = schedule.num_iterations - 1
    origin = start_step if schedule.anchor is Anchor.SEGMENT else 0
    length = schedule.num_iterations - origin
    turns = {
        start_step,
        origin + schedule.warmup_steps,
        MOMENTUM_WARMUP_STEPS,
        schedule.num_iterations - round(schedule.warmdown_ratio * length),
        (start_step + last) // 2,
        last,
    }
    return tuple(sorted(step for step in turns if start_step <= step <= last))


def _check(spec: JobSpec, vocab_size: int, fork: Fork | None) -> None:
    found = []
    if spec.model.vocab_size not in (None, vocab_size):
        found.append(
            Violation(
                "model.vocab_size",
                spec.model.vocab_size,
                f"the tokenizer has {vocab_size}; leave the field out",
            )
        )
    if fork and spec.schedule.num_iterations <= fork.step:
        found.append(
            Violation(
                "schedule.num_iterations",
                spec.schedule.num_iterations,
                f"the horizon must be after the start, step {fork.step} of {fork.name}",
            )
        )
    if found:
        raise SpecError(found)


def _rate_row(
    group: ParamGroup, schedule: Schedule, spec: JobSpec, start_step: int, fork: Fork | None
) -> RateRow:
    points = tuple(
        (step, schedule.at(step).groups[group.name]) for step in milestones(spec, start_step)
    )
    if fork is None:
        return RateRow(group.name, points)
    parent, claimed = fork.in_force.groups.get(group.name), fork.claimed.get(group.name)
    return RateRow(group.name, points, parent, claimed)


def _jumps(row: RateRow, spec: JobSpec) -> bool:
    return row.ratio is not None and row.ratio > spec.guards.max_lr_jump


def _rises(row: RateRow, spec: JobSpec) -> bool:
    """Whether a group starts within the guard, but a warm-up takes it above."""
    if _jumps(row, spec) or row.parent is None or row.parent.lr == 0:
        return False
    peak = max(values.lr for _, values in row.points)
    return peak > spec.guards.max_lr_jump * row.parent.lr


def _rise(row: RateRow) -> str:
    assert row.parent is not None
    step, values = max(row.points, key=lambda point: point[1].lr)
    return (
        f"{row.group}: the rate rises from {row.parent.lr:.6g} in force to {values.lr:.6g} by step "
        f"{step}, {values.lr / row.parent.lr:.3g} times"
    )


def _jump(row: RateRow, spec: JobSpec) -> LearningRateJump:
    assert row.parent is not None
    assert row.ratio is not None
    new = row.points[0][1].lr
    return LearningRateJump(row.group, row.parent.lr, new, row.ratio, spec.guards.max_lr_jump)
