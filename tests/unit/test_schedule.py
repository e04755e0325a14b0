"""The three anchors of a schedule, and the record of the values in force."""

import json
from pathlib import Path

import pytest

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import InForce, Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Anchor, JobSpec, ModelSpec, OptimizerSpec, ScheduleSpec

RECORDED = Path(__file__).parents[1] / "data" / "nanochat"
SHAPE = ModelShape.of(ModelSpec(depth=2), 256)
SPEC = JobSpec()
GROUPS = param_groups(SPEC, SHAPE)
BASE_DECAY = GROUPS[-1].weight_decay


def schedule_spec(anchor: Anchor, **fields: float) -> ScheduleSpec:
    return ScheduleSpec(
        **{"num_iterations": 1000, "final_lr_frac": 0.1, "anchor": anchor, **fields}
    )


def test_recorded_run_had_these_values_in_force_at_every_step() -> None:
    config = json.loads((RECORDED / "config.json").read_text())
    args = config["cli_args"]
    spec = JobSpec.parse(
        {
            "model": {key: args[key] for key in ("depth", "aspect_ratio", "head_dim")}
            | {"max_seq_len": 128},
            "batch": {"device_batch_size": 4, "total_batch_size": 2048},
            "optimizer": {
                key: args[key]
                for key in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
            },
            "schedule": {"num_iterations": 30, "warmup_steps": 200},
        }
    )
    schedule = Schedule(spec.schedule, param_groups(spec, ModelShape.of(spec.model, 768)))
    for recorded in json.loads((RECORDED / "losses.json").read_text())["steps"]:
        values = schedule.at(recorded["step"])
        assert values.lr_multiplier == pytest.approx(recorded["lrm"], rel=1e-12)
        for i, group in enumerate(values.groups.values()):
            assert group.lr == pytest.approx(recorded["lr"][i], rel=1e-12)
            assert group.weight_decay == pytest.approx(recorded["weight_decay"][i], rel=1e-12)
            if recorded["momentum"][i] is not None:
                assert group.momentum == pytest.approx(recorded["momentum"][i], rel=1e-12)


def test_empty_warmdown_keeps_rate_and_momentum_up_to_the_horizon() -> None:
    schedule = Schedule(schedule_spec(Anchor.HORIZON, warmdown_ratio=0.0), GROUPS)
    assert schedule.at(1000).lr_multiplier == 1.0
    assert schedule.at(1000).momentum == 0.97


def test_values_past_the_horizon_stay_those_of_the_horizon() -> None:
    schedule = Schedule(schedule_spec(Anchor.HORIZON, warmdown_ratio=0.5), GROUPS)
    assert schedule.lr_multiplier(2000) == schedule.lr_multiplier(1000) == pytest.approx(0.1)
    assert schedule.weight_decay(2000) == schedule.weight_decay(1000) == 0.0


def test_segment_warms_up_and_down_over_its_own_steps() -> None:
    spec = schedule_spec(Anchor.SEGMENT, warmup_steps=10, warmdown_ratio=0.5)
    schedule = Schedule(spec, GROUPS, start_step=800)
    assert schedule.lr_multiplier(800) == pytest.approx(0.1)
    assert schedule.lr_multiplier(809) == 1.0
    assert schedule.lr_multiplier(900) == 1.0
    assert schedule.lr_multiplier(950) == pytest.approx(0.55)
    assert schedule.lr_multiplier(1000) == pytest.approx(0.1)
    assert schedule.weight_decay(800) == BASE_DECAY
    assert schedule.weight_decay(900) == pytest.approx(BASE_DECAY / 2)
    assert schedule.weight_decay(1000) == pytest.approx(0.0, abs=1e-15)


def test_segment_keeps_the_momentum_that_its_warm_buffer_is_used_to() -> None:
    late = Schedule(schedule_spec(Anchor.SEGMENT, warmdown_ratio=0.5), GROUPS, start_step=800)
    assert late.momentum(800) == 0.97
    assert late.momentum(1000) == pytest.approx(0.90)
    early = Schedule(schedule_spec(Anchor.SEGMENT), GROUPS, start_step=200)
    assert early.momentum(200) == pytest.approx(0.91)


def test_continue_goes_straight_from_the_parents_values_without_a_jump() -> None:
    parent = Schedule(schedule_spec(Anchor.HORIZON, warmdown_ratio=0.5), GROUPS).at(899)
    spec = schedule_spec(Anchor.CONTINUE, num_iterations=10_000)
    schedule = Schedule(spec, GROUPS, start_step=900, parent=parent)
    assert schedule.at(899) == parent
    for before, after in ((899, 900), (5000, 5001)):
        old, new = schedule.at(before), schedule.at(after)
        assert abs(new.lr_multiplier - old.lr_multiplier) < 1e-3
        assert abs(new.weight_decay - old.weight_decay) < 1e-3 * BASE_DECAY
    end = schedule.at(10_000)
    assert (end.lr_multiplier, end.momentum, end.weight_decay) == pytest.approx((0.1, 0.90, 0.0))
    middle = schedule.at((899 + 10_001) // 2 - 1)
    assert middle.lr_multiplier == pytest.approx((parent.lr_multiplier + 0.1) / 2, rel=1e-3)


def test_continue_runs_the_rates_and_the_decay_that_are_asked_for_anew() -> None:
    parent = Schedule(schedule_spec(Anchor.HORIZON), GROUPS).at(499)
    asked = OptimizerSpec(matrix_lr=0.0024, weight_decay=0.56)
    groups = param_groups(SPEC.model_copy(update={"optimizer": asked}), SHAPE)
    spec = schedule_spec(Anchor.CONTINUE, num_iterations=100_000)
    first = Schedule(spec, groups, start_step=500, parent=parent).at(500)
    assert first.groups[groups[-1].name].lr == pytest.approx(2 * GROUPS[-1].lr, rel=1e-3)
    assert first.weight_decay == pytest.approx(2 * parent.weight_decay, rel=1e-3)


def test_continue_from_another_trainer_starts_at_its_absolute_decay() -> None:
    parent = InForce(499, 0.5, 0.95, 0.0123, {})
    spec = schedule_spec(Anchor.CONTINUE)
    schedule = Schedule(spec, GROUPS, start_step=500, parent=parent)
    assert schedule.weight_decay(499) == 0.0123
    assert schedule.weight_decay(1000) == 0.0
    multiplier = schedule.at(600).decay_multiplier
    assert multiplier == pytest.approx(schedule.weight_decay(600) / BASE_DECAY)


def test_continue_without_a_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="continue"):
        Schedule(schedule_spec(Anchor.CONTINUE), GROUPS, start_step=5)


def test_a_segment_without_steps_has_values_all_the_same() -> None:
    for anchor in Anchor:
        parent = InForce(1000, 1.0, 0.97, 0.1, {})
        spec = schedule_spec(anchor, warmdown_ratio=1.0)
        schedule = Schedule(spec, GROUPS, start_step=1001, parent=parent)
        assert 0.0 <= schedule.at(1001).lr_multiplier <= 1.0


def test_adamw_groups_keep_their_own_betas_and_decay() -> None:
    values = Schedule(schedule_spec(Anchor.HORIZON), GROUPS).at(100)
    assert values.groups["x0"].momentum == 0.96
    assert values.groups["wte"].weight_decay == 0.001
    assert values.groups[GROUPS[-1].name].momentum == values.momentum


def test_values_in_force_survive_json_to_the_last_bit() -> None:
    values = Schedule(schedule_spec(Anchor.HORIZON, warmdown_ratio=0.3), GROUPS).at(777)
    assert InForce.from_dict(json.loads(json.dumps(values.to_dict()))) == values
