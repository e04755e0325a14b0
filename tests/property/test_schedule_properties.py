"""What holds of every schedule: its bounds, its joints, and that horizon is nanochat's own."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import GroupValues, InForce, Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Anchor, JobSpec, ModelSpec, ScheduleSpec

GROUPS = param_groups(JobSpec(), ModelShape.of(ModelSpec(depth=2), 256))
BASE_DECAY = GROUPS[-1].weight_decay
ROUNDING = 1e-12
LOW_MOMENTUM, HIGH_MOMENTUM = 0.85, 0.97

# Warm-ups past the end and warm-downs longer than what is left of a segment are among them.
schedules = st.builds(
    ScheduleSpec,
    num_iterations=st.integers(1, 20) | st.integers(1, 5000),
    warmup_steps=st.just(0) | st.integers(0, 6000),
    warmdown_ratio=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    final_lr_frac=st.floats(0, 1),
    anchor=st.sampled_from(list(Anchor)),
)
parents = st.builds(
    InForce,
    step=st.just(0),
    lr_multiplier=st.floats(0, 3),
    momentum=st.floats(LOW_MOMENTUM, HIGH_MOMENTUM),
    weight_decay=st.floats(0, 2),
    groups=st.just({"wte": GroupValues(1.0, 0.8, 0.1)}),
    decay_multiplier=st.none() | st.floats(0, 2),
)


def schedule_of(spec: ScheduleSpec, start: int, parent: InForce) -> Schedule:
    return Schedule(spec, GROUPS, start, replace(parent, step=start - 1))


@given(spec=schedules, parent=parents, start=st.integers(0, 5000), step=st.integers(0, 6000))
@example(ScheduleSpec(num_iterations=1), InForce(0, 1.0, 0.9, 0.1, {}), 0, 0)
def test_values_are_finite_and_stay_between_their_ends(
    spec: ScheduleSpec, parent: InForce, start: int, step: int
) -> None:
    start = min(start, spec.num_iterations)
    values = schedule_of(spec, start, parent).at(max(step, start))
    highest = [parent.lr_multiplier, spec.final_lr_frac]
    decays = [parent.weight_decay]
    if parent.decay_multiplier is not None:
        decays = [parent.decay_multiplier * BASE_DECAY]
    if spec.anchor is not Anchor.CONTINUE:
        highest, decays = [1.0], [BASE_DECAY]
    assert 0.0 <= values.lr_multiplier <= max(highest) + ROUNDING
    assert LOW_MOMENTUM - ROUNDING <= values.momentum <= HIGH_MOMENTUM + ROUNDING
    assert 0.0 <= values.weight_decay <= max(decays) + ROUNDING
    for group in values.groups.values():
        for figure in (group.lr, group.momentum, group.weight_decay):
            assert math.isfinite(figure)
            assert figure >= 0.0


@given(spec=schedules, parent=parents, start=st.integers(0, 5000), step=st.integers(0, 6000))
def test_no_step_jumps_by_more_than_the_schedules_own_slopes(
    spec: ScheduleSpec, parent: InForce, start: int, step: int
) -> None:
    start = min(start, spec.num_iterations - 1)
    step = min(max(step, start), spec.num_iterations - 1)
    schedule = schedule_of(spec, start, parent)
    one, two = schedule.at(step), schedule.at(step + 1)
    origin = start if spec.anchor is Anchor.SEGMENT else 0
    length = spec.num_iterations - origin
    warmdown = round(spec.warmdown_ratio * length)
    steepest = max(
        1 / spec.warmup_steps if spec.warmup_steps else 0.0,
        (1 - spec.final_lr_frac) / warmdown if warmdown else 0.0,
    )
    decay = math.pi / 2 / length * BASE_DECAY
    momentum = max(0.12 / 400, 0.07 / warmdown if warmdown else 0.0)
    if spec.anchor is Anchor.CONTINUE:
        line = spec.num_iterations - start + 1
        steepest = abs(parent.lr_multiplier - spec.final_lr_frac) / line
        begin = parent.weight_decay
        if parent.decay_multiplier is not None:
            begin = parent.decay_multiplier * BASE_DECAY
        decay, momentum = begin / line, abs(parent.momentum - 0.90) / line
    # nanochat's own joints, the only ones: a warm-up that is still going on where the warm-down
    # begins ends at once, and the momentum's warm-up of 400 steps likewise.
    inside = step + 1 - origin
    cut_off = inside == spec.warmup_steps and inside > length - warmdown
    if spec.anchor is Anchor.CONTINUE or not cut_off:
        assert abs(two.lr_multiplier - one.lr_multiplier) <= steepest + ROUNDING
    if spec.anchor is Anchor.CONTINUE or not (step + 1 == 400 and inside > length - warmdown):
        assert abs(two.momentum - one.momentum) <= momentum + ROUNDING
    assert abs(two.weight_decay - one.weight_decay) <= decay + ROUNDING


@given(
    spec=schedules.filter(lambda spec: spec.anchor is not Anchor.CONTINUE),
    parent=parents,
    step=st.integers(0, 6000),
)
def test_horizon_is_nanochats_to_the_last_digit(
    spec: ScheduleSpec, parent: InForce, step: int
) -> None:
    spec = spec.model_copy(update={"anchor": Anchor.HORIZON})
    step = min(step, spec.num_iterations)
    values = schedule_of(spec, 0, parent).at(step)
    total, warmdown = spec.num_iterations, round(spec.warmdown_ratio * spec.num_iterations)
    if step < spec.warmup_steps:
        multiplier = (step + 1) / spec.warmup_steps
    elif step <= total - warmdown:
        multiplier = 1.0
    else:
        progress = (total - step) / warmdown
        multiplier = progress * 1.0 + (1 - progress) * spec.final_lr_frac
    if step < 400:
        share = step / 400
        momentum = (1 - share) * 0.85 + share * 0.97
    elif warmdown == 0 or step < total - warmdown:  # nanochat divides by an empty warm-down
        momentum = 0.97
    else:
        progress = (step - (total - warmdown)) / warmdown
        momentum = 0.97 * (1 - progress) + 0.90 * progress
    assert values.lr_multiplier == multiplier
    assert values.momentum == momentum
    assert values.weight_decay == BASE_DECAY * 0.5 * (1 + math.cos(math.pi * step / total))


@given(
    spec=schedules.filter(lambda spec: spec.anchor is not Anchor.CONTINUE),
    start=st.integers(1, 4999),
    further=st.integers(1, 10_000),
)
def test_continue_never_jumps_at_its_start(spec: ScheduleSpec, start: int, further: int) -> None:
    parent = Schedule(spec, GROUPS).at(start - 1)
    longer = spec.model_copy(update={"num_iterations": start + further, "anchor": Anchor.CONTINUE})
    schedule = Schedule(longer, GROUPS, start_step=start, parent=parent)
    assert schedule.at(start - 1).groups == parent.groups
    first, line = schedule.at(start), further + 1
    room = abs(parent.lr_multiplier - longer.final_lr_frac)
    assert abs(first.lr_multiplier - parent.lr_multiplier) <= room / line + ROUNDING
    assert abs(first.momentum - parent.momentum) <= abs(parent.momentum - 0.90) / line + ROUNDING
    assert abs(first.weight_decay - parent.weight_decay) <= parent.weight_decay / line + ROUNDING


@given(parent=parents, start=st.integers(1, 5000), spec=schedules)
def test_a_segment_of_one_step_has_values_that_its_anchor_says(
    parent: InForce, start: int, spec: ScheduleSpec
) -> None:
    spec = spec.model_copy(update={"num_iterations": start + 1, "warmup_steps": 0})
    values = schedule_of(spec, start, parent).at(start)
    if spec.anchor is Anchor.SEGMENT:
        assert (values.lr_multiplier, values.weight_decay) == (1.0, BASE_DECAY)
    if spec.anchor is Anchor.CONTINUE:  # half of the way: the horizon itself has no step
        half = (parent.lr_multiplier + spec.final_lr_frac) / 2
        assert math.isclose(values.lr_multiplier, half, abs_tol=ROUNDING)
