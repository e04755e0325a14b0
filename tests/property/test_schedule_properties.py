"""What holds of every schedule."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Anchor, JobSpec, ModelSpec, ScheduleSpec

GROUPS = param_groups(JobSpec(), ModelShape.of(ModelSpec(depth=2), 256))
BASE_DECAY = GROUPS[-1].weight_decay

schedules = st.builds(
    ScheduleSpec,
    num_iterations=st.integers(1, 5000),
    warmup_steps=st.integers(0, 6000),
    warmdown_ratio=st.floats(0, 1),
    final_lr_frac=st.floats(0, 1),
    anchor=st.sampled_from([Anchor.HORIZON, Anchor.SEGMENT]),
)


@given(spec=schedules, start=st.integers(0, 5000), step=st.integers(0, 5000))
def test_values_stay_between_their_ends(spec: ScheduleSpec, start: int, step: int) -> None:
    start = min(start, spec.num_iterations)
    step = min(max(step, start), spec.num_iterations)
    values = Schedule(spec, GROUPS, start_step=start).at(step)
    assert 0.0 <= values.lr_multiplier <= 1.0
    assert 0.85 <= values.momentum <= 0.9700000001
    assert 0.0 <= values.weight_decay <= BASE_DECAY


@given(spec=schedules, start=st.integers(1, 4999), further=st.integers(1, 10_000))
def test_continue_never_jumps_at_its_start(spec: ScheduleSpec, start: int, further: int) -> None:
    parent = Schedule(spec, GROUPS).at(start - 1)
    longer = spec.model_copy(update={"num_iterations": start + further, "anchor": Anchor.CONTINUE})
    schedule = Schedule(longer, GROUPS, start_step=start, parent=parent)
    assert schedule.at(start - 1).groups == parent.groups
    first = schedule.lr_multiplier(start)
    room = abs(parent.lr_multiplier - longer.final_lr_frac)
    assert abs(first - parent.lr_multiplier) <= room / (further + 1) + 1e-12
