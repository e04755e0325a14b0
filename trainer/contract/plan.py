"""What would run, worked out before anything is spent. Pure.

Everything here follows from the spec, the tokenizer's vocabulary size and, for a continuation, the
values in force at the parent's step. The re-heat guard is decided here and enforced by the service.

Invariant: the rates shown are `Schedule.at`, the very function that the trainer applies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.contract.scaling import ParamGroup, param_groups
from trainer.contract.schedule import (
    MOMENTUM_WARMUP_STEPS,
    GroupValues,
    InForce,
    Schedule,
)
from trainer.contract.shape import ModelShape, ParameterCounts
from trainer.contract.spec import Anchor, Compute, Embeddings, JobSpec
from trainer.contract.violations import SpecError, Violation

FP32_BYTES = 4
BF16_BYTES = 2
FAR_ABOVE = 10.0  # a smear rate so many times Muon's is worth a word (assumption)


@dataclass(frozen=True)
class Fork:
    """The point that a continuation leaves its parent at."""

    name: str  # JOB@STEP
    step: int
    in_force: InForce


@dataclass(frozen=True)
class RateRow:
    """One group's values over the run; ratio: first learning rate over the parent's in force."""

    group: str
    points: tuple[tuple[int, GroupValues], ...]
    parent: GroupValues | None = None
    ratio: float | None = None


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
        """The most steps that a crash can cost, by the clock that counts steps."""
        every = self.spec.checkpoint.every_steps
        return min(every, self.steps) if every else self.steps


def make_plan(spec: JobSpec, vocab_size: int, fork: Fork | None = None) -> Plan:
    """Plan a job.

    Raises:
        SpecError: the horizon is not after the start, or the spec's vocab_size isn't the
            tokenizer's.
    """
    start_step = fork.step if fork else 0
    _check(spec, vocab_size, fork)
    shape = ModelShape.of(spec.model, vocab_size)
    groups = param_groups(spec, shape)
    schedule = Schedule(spec.schedule, groups, start_step, fork.in_force if fork else None)
    rates = tuple(_rate_row(group, schedule, spec, start_step, fork) for group in groups)
    jumps = tuple(_jump(row, spec) for row in rates if _jumps(row, spec))
    allowed = spec.guards.allow_lr_jump
    return Plan(
        spec=spec,
        shape=shape,
        counts=shape.parameter_counts(),
        flops_per_token=shape.flops_per_token,
        grad_accum_steps=spec.grad_accum_steps(spec.resources.workers.min),
        start_step=start_step,
        fork=fork,
        rates=rates,
        jumps=() if allowed else jumps,
        warnings=(
            *_warnings(spec, groups, jumps if allowed else ()),
            *(_rise(row) for row in rates if _rises(row, spec)),
        ),
        checkpoint_bytes=checkpoint_bytes(spec, shape),
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


def checkpoint_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """Bytes of one checkpoint: weights, AdamW's two moments, Muon's momentum and row moments."""
    counts = shape.parameter_counts()
    low = spec.precision.compute is Compute.BF16
    table = BF16_BYTES if low and spec.precision.embeddings is Embeddings.COMPUTE else FP32_BYTES
    tables = (counts.wte + counts.value_embeds) * 3 * table
    dense = (counts.lm_head + counts.scalars) * 3 * FP32_BYTES
    matrices = counts.matrices * 2 * FP32_BYTES
    moments = sum(
        max(size) * FP32_BYTES
        for name, size in shape.named_shapes().items()
        if name.startswith("transformer.h.")
    )
    return tables + dense + matrices + moments


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
    parent = fork.in_force.groups.get(group.name) if fork else None
    ratio = None
    if parent is not None:
        new = points[0][1].lr
        ratio = new / parent.lr if parent.lr > 0 else (math.inf if new > 0 else 1.0)
    return RateRow(group.name, points, parent, ratio)


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


def _warnings(
    spec: JobSpec, groups: tuple[ParamGroup, ...], jumps: tuple[LearningRateJump, ...]
) -> tuple[str, ...]:
    found = [f"learning-rate jump, allowed by the spec: {jump}" for jump in jumps]
    matrix = next((group.lr for group in groups if group.kind == "muon"), 0.0)
    smear = next(group.lr for group in groups if group.name == "smear")
    if matrix > 0 and smear > FAR_ABOVE * matrix:
        found.append(
            f"the smear group's rate, {smear:g}, is {smear / matrix:.0f} times the matrices' "
            f"{matrix:.3g}: it is scaled by nothing (optimizer.smear_lr)"
        )
    workers = spec.resources.workers
    if workers.max > workers.min:
        found.append(
            f"the job runs on workers.min {workers.min} workers; growing towards workers.max "
            f"{workers.max} is not there yet"
        )
    low = spec.precision.compute is Compute.BF16
    if low and spec.precision.embeddings is Embeddings.COMPUTE:
        found.append(
            "embedding tables are kept in bf16, where small updates round to nothing "
            "(precision.embeddings: fp32 keeps them)"
        )
    return tuple(found)
