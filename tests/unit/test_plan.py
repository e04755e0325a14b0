"""What would run: counts, rates, the guard of a continuation, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from everstep.plans import plan_to_proto
from trainer.contract.advice import unmoved
from trainer.contract.devices import find_device
from trainer.contract.memory import estimate_memory, weight_bytes
from trainer.contract.plan import Fork, Plan, Surroundings, make_plan, milestones
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import GroupValues, InForce, Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.speed import Measured, mfu_ratio, work_of
from trainer.contract.violations import SpecError

VOCAB = 32768
K = math.sqrt(65536 / 524288)  # the batch's factor of every rate but the smear group's
# At width 768 the width's factor is 1.
BASE = {
    "lm_head": 0.00048 * K,
    "wte": 0.018 * K,
    "value_embeds": 0.018 * K / 2,
    "resid": 0.03 * K / 100,
    "x0": 0.03 * K,
    "smear": 0.2,
    "matrix_6x12": 0.0012 * K,
    "matrix_768x768": 0.0012 * K,
    "matrix_768x3072": 0.0012 * K,
    "matrix_3072x768": 0.0012 * K,
}


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=0)


def spec_of(**sections: Any) -> JobSpec:
    return JobSpec.parse(sections)


def fork_at(step: int, scale: float = 1.0, **rates: float) -> Fork:
    """A parent that ran with the default rates times scale."""
    groups = param_groups(spec_of(), ModelShape.of(spec_of().model, VOCAB))
    values = {
        group.name: GroupValues(rates.get(group.name, group.lr * scale), 0.9, group.weight_decay)
        for group in groups
    }
    return Fork(f"PARENT@{step}", step, InForce(step - 1, scale, 0.97, 0.1, values, 0.5))


def continued(fork: Fork, **sections: Any) -> Plan:
    spec = spec_of(**{"start": {"from": fork.name}, **sections})
    return make_plan(spec, VOCAB, fork)


def test_d12_has_the_known_counts_flops_and_micro_batches() -> None:
    plan = make_plan(spec_of(), VOCAB)
    counts = plan.counts
    assert (counts.wte, counts.value_embeds, counts.lm_head) == (
        25_165_824,
        150_994_944,
        25_165_824,
    )
    assert (counts.matrices, counts.scalars, counts.total) == (84_935_088, 50, 286_261_730)
    assert plan.flops_per_token == 887_098_032
    assert plan.grad_accum_steps == 4
    assert (plan.start_step, plan.steps, plan.tokens) == (0, 300_000, 300_000 * 65536)
    assert plan.steps_at_risk == 1000


def test_a_rate_too_small_for_any_update_moves_no_table() -> None:
    assert [unmoved(rate) for rate in (0.0, 5e-324, 1e-30)] == [1.0, 1.0, 1.0]


def test_a_range_of_workers_is_planned_on_its_least_and_says_what_can_not_be() -> None:
    asked = {"resources": {"workers": {"min": 1, "max": 4}}}
    plan = make_plan(spec_of(**asked), VOCAB)
    assert plan.grad_accum_steps == 4
    said = "of workers.min 1 to workers.max 4 only 1, 2, 4 can be"
    assert any(warning.startswith(said) for warning in plan.warnings)
    two = make_plan(spec_of(**{"resources": {"workers": {"min": 1, "max": 2}}}), VOCAB)
    assert not any("can be" in warning for warning in two.warnings)
    options = [(each.workers, each.grad_accum_steps) for each in plan_to_proto(plan).workers]
    assert options == [(1, 4), (2, 2), (4, 1)]
    later = make_plan(spec_of(**{"resources": {"workers": {"min": 3, "max": 4}}}), VOCAB)
    assert later.grad_accum_steps == 1, "the least that can be"


def test_a_d12_checkpoint_has_the_size_that_its_owner_measured() -> None:
    # 0.79 GB of weights and 1.2 GB of optimizer state; nanochat keeps its bf16 tables as bf16.
    assert make_plan(spec_of(), VOCAB).checkpoint_bytes == pytest.approx(1.99e9, rel=0.05)


def test_the_users_command_gives_the_rates_of_every_group() -> None:
    rows = {row.group: row for row in make_plan(spec_of(), VOCAB).rates}
    assert set(rows) == set(BASE)
    for group, rate in BASE.items():
        step, first = rows[group].points[0]
        assert (step, first.lr) == (0, exactly(rate)), group
        assert rows[group].parent is None
        assert rows[group].ratio is None
    assert rows["matrix_768x768"].points[0][1].lr == pytest.approx(0.000424, rel=1e-3)


def test_every_point_of_a_row_is_what_the_schedule_will_apply() -> None:
    spec = spec_of(schedule={"num_iterations": 2000, "warmup_steps": 100, "warmdown_ratio": 0.5})
    groups = param_groups(spec, ModelShape.of(spec.model, VOCAB))
    schedule = Schedule(spec.schedule, groups)
    plan = make_plan(spec, VOCAB)
    steps = [step for step, _ in plan.rates[0].points]
    assert steps == [0, 100, 400, 999, 1000, 1999] == list(milestones(spec, 0))
    for row in plan.rates:
        assert row.points == tuple((step, schedule.at(step).groups[row.group]) for step in steps)


def test_a_continuation_shows_old_new_and_ratio_of_every_group() -> None:
    plan = continued(fork_at(200_000, scale=0.8))
    assert plan.start_step == 200_000
    assert plan.steps == 100_000
    for row in plan.rates:
        assert row.parent is not None
        assert row.parent.lr == exactly(BASE[row.group] * 0.8)
        assert row.points[0] == (200_000, row.points[0][1])
        assert row.points[0][1].lr == exactly(BASE[row.group])
        assert row.ratio == exactly(1.25)
    assert not plan.jumps


def test_a_rate_far_above_the_parents_is_a_jump_that_says_all_about_itself() -> None:
    plan = continued(fork_at(10, wte=BASE["wte"] / 5))
    (jump,) = plan.jumps
    assert (jump.group, jump.allowed) == ("wte", 2.0)
    assert jump.ratio == exactly(5.0)
    text = str(jump)
    for part in ("wte", f"{BASE['wte'] / 5:.6g}", f"{BASE['wte']:.6g}", "5 times", "max_lr_jump 2"):
        assert part in text


def test_any_rate_above_a_parents_rate_of_zero_is_an_infinite_jump() -> None:
    plan = continued(fork_at(10, smear=0.0, x0=0.0), optimizer={"scalar_lr": 0.0})
    assert [(jump.group, jump.ratio) for jump in plan.jumps] == [("smear", math.inf)]
    ratios = {row.group: row.ratio for row in plan.rates}
    assert ratios["x0"] == 1.0  # 0 to 0 is no jump


def test_a_factor_as_large_as_the_guard_is_no_jump() -> None:
    assert not continued(fork_at(10, scale=0.25), guards={"max_lr_jump": 4.0}).jumps
    assert continued(fork_at(10, scale=0.24), guards={"max_lr_jump": 4.0}).jumps


def test_an_allowed_jump_is_a_warning() -> None:
    plan = continued(fork_at(10, wte=1e-5), guards={"allow_lr_jump": True})
    assert not plan.jumps
    assert any("allowed by the spec" in text and "wte" in text for text in plan.warnings)


def test_the_continue_anchor_goes_on_from_the_parent_without_a_jump() -> None:
    plan = continued(fork_at(200_000, scale=0.3), schedule={"anchor": "continue"})
    assert not plan.jumps
    for row in plan.rates:
        assert row.ratio == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("horizon", [200_000, 199_999, 1])
def test_a_horizon_at_or_before_the_start_is_refused(horizon: int) -> None:
    with pytest.raises(SpecError) as caught:
        continued(fork_at(200_000), schedule={"num_iterations": horizon})
    (violation,) = caught.value.violations
    assert (violation.field, violation.value) == ("schedule.num_iterations", horizon)
    assert "step 200000 of PARENT@200000" in violation.reason


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused() -> None:
    with pytest.raises(SpecError, match=r"model\.vocab_size: 500: the tokenizer has 32768"):
        make_plan(spec_of(model={"vocab_size": 500}), VOCAB)


def test_the_plan_warns_of_the_smear_rate_and_of_tables_in_bf16() -> None:
    warnings = make_plan(spec_of(), VOCAB).warnings
    assert any("smear" in text and "471 times" in text for text in warnings)
    assert any("bf16" in text and "precision.embeddings: fp32" in text for text in warnings)
    quiet = spec_of(
        optimizer={"smear_lr": 0.001, "scalar_lr": 0.04},
        precision={"embeddings": "fp32"},
        schedule={"warmdown_ratio": 0.1},
        evaluate={"every": 5000},
    )
    assert make_plan(quiet, VOCAB).warnings == ()


@pytest.mark.parametrize(
    ("every", "horizon", "words"),
    [(250, 300_000, "adds about 85% to the time"), (250, 249, ""), (0, 300_000, ""), (5000, 1, "")],
)
def test_validation_that_takes_as_long_as_training_is_said(
    every: int, horizon: int, words: str
) -> None:
    spec = spec_of(evaluate={"every": every}, schedule={"num_iterations": horizon})
    said = [text for text in make_plan(spec, VOCAB).warnings if text.startswith("validation ")]
    assert bool(said) == bool(words)
    assert all(words in text and "16,384,000" in text for text in said)


def test_what_the_continue_anchor_does_not_apply_is_said() -> None:
    schedule = {"anchor": "continue", "warmup_steps": 40, "warmdown_ratio": 0.65}
    said = continued(fork_at(200_000), schedule=schedule).warnings
    assert any("warmup_steps 40 and warmdown_ratio 0.65 have no effect" in text for text in said)
    said = continued(fork_at(200_000), schedule={"anchor": "continue"}).warnings
    assert not any("have no effect" in text for text in said)


def test_without_checkpoints_by_steps_everything_is_at_risk() -> None:
    assert make_plan(spec_of(checkpoint={"every_steps": 0}), VOCAB).steps_at_risk == 300_000


def test_a_rise_by_warm_up_above_the_guard_is_said() -> None:
    parent = make_plan(JobSpec.parse({}), 32768).rates
    in_force = {row.group: replace(row.points[0][1], lr=row.points[0][1].lr / 20) for row in parent}
    fork = Fork("01J@1000", 1000, InForce(999, 0.05, 0.9, 0.0, in_force, 0.0))
    spec = JobSpec.parse(
        {
            "start": {"from": "01J@1000"},
            "schedule": {"anchor": "segment", "warmup_steps": 100, "num_iterations": 2000},
        }
    )
    plan = make_plan(spec, 32768, fork)
    assert plan.jumps == (), "its first step is below the parent's rate"
    rises = [text for text in plan.warnings if "rises" in text]
    assert len(rises) == len(plan.rates)
    assert "matrix_768x768: the rate rises from 2.12132e-05 in force to 0.000424264" in rises[-3]
    assert rises[-3].endswith("20 times")


def test_an_rtx_4070_takes_what_its_owner_measured() -> None:
    """1.177 s a step, 55,700 tokens/s, 32.7 h for 100,000 steps, 84.7% of the peak."""
    spec = spec_of(schedule={"num_iterations": 100_000})
    plan = make_plan(spec, VOCAB, where=Surroundings(find_device("NVIDIA GeForce RTX 4070")))
    assert plan.time is not None
    assert plan.time.step_s == pytest.approx(1.177, rel=0.02)
    assert plan.time.tokens_per_s == pytest.approx(55_700, rel=0.02)
    assert plan.time.step_s * plan.steps / 3600 == pytest.approx(32.7, rel=0.02)
    assert plan.time.mfu_ratio == pytest.approx(0.847, rel=0.02)
    assert "causal half not taken off" in plan.time.basis
    assert (plan.steps_at_risk, plan.seconds_at_risk) == (759, pytest.approx(900, rel=0.01))


def test_an_rtx_5060_ti_is_as_fast_as_measured_and_its_memory_is_open() -> None:
    plan = make_plan(spec_of(), VOCAB, where=Surroundings(find_device("RTX 5060 Ti")))
    assert plan.time is not None
    assert plan.time.tokens_per_s == pytest.approx(45_000, rel=0.02)
    assert plan.memory.device_bytes is None
    assert plan.memory.largest_batch is None
    told = make_plan(spec_of(), VOCAB, where=Surroundings(find_device("RTX 5060 Ti 16GB")))
    assert told.memory.device_bytes == 16 * 2**30


@pytest.mark.parametrize(
    ("name", "memory_gib", "peak"),
    [
        ("NVIDIA GeForce RTX 4070", 12, 58.3e12),
        ("rtx 3080 12 GB", 12, 61.3e12),
        ("RTX 3080", None, None),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-80GB", 80, 312e12),
        ("NVIDIA H100 80GB HBM3", 80, 989.4e12),
        ("NVIDIA H100 PCIe", 80, 756e12),
        ("NVIDIA H100", None, None),
        ("NVIDIA L40S", 48, 362e12),
        ("abacus", None, None),
    ],
)
def test_devices_are_known_by_name_or_absent(
    name: str, memory_gib: int | None, peak: float | None
) -> None:
    found = find_device(name)
    assert found.memory_bytes == (memory_gib and memory_gib * 2**30)
    assert found.peak_flops == (peak and pytest.approx(peak))


def test_the_share_of_the_peak_is_by_the_cards_own_peak_or_absent() -> None:
    spec = spec_of()
    shape = ModelShape.of(spec.model, VOCAB)
    card = find_device("NVIDIA GeForce RTX 4070", 12_282 << 20)
    share = mfu_ratio(spec, shape, card, 1, 1.177)
    assert share == pytest.approx(0.847, abs=5e-4)  # as its owner measured
    assert mfu_ratio(spec, shape, card, 2, 1.177) == pytest.approx(share / 2)
    for unknown in (None, find_device("cpu", 10**9), find_device("RTX 9999"), find_device("H100")):
        assert mfu_ratio(spec, shape, unknown, 1, 1.177) is None
    assert mfu_ratio(spec_of(precision={"compute": "fp32"}), shape, card, 1, 1.177) is None


def test_a_measured_rate_counts_more_than_the_device() -> None:
    spec = spec_of()
    shape = ModelShape.of(spec.model, VOCAB)
    measured = [Measured("job A", 2.0, work_of(spec, shape, 1)), Measured("job B", 9.0, 1.0)]
    plan = make_plan(spec, VOCAB, where=Surroundings(find_device("RTX 4070"), measured))
    assert plan.time is not None
    assert plan.time.step_s == pytest.approx(2.0)
    assert plan.time.mfu_ratio == pytest.approx(0.847 * 1.177 / 2.0, rel=0.01)
    assert "job A" in plan.time.basis
    assert make_plan(spec, VOCAB).time is None


def test_what_does_not_fit_is_said_with_what_would() -> None:
    small = find_device("RTX 4070", 12 * 2**30, free_bytes=6 * 10**9)
    plan = make_plan(spec_of(), VOCAB, where=Surroundings(small))
    assert plan.memory.peak_bytes > 6 * 10**9
    largest = plan.memory.largest_batch
    assert largest in (1, 2, 4)
    assert any(f"device_batch_size {largest} fits" in text for text in plan.warnings)
    spec = spec_of(batch={"device_batch_size": largest})
    assert estimate_memory(spec, plan.shape, small).peak_bytes <= 6 * 10**9
    assert plan.memory.parts["weights"] == weight_bytes(plan.spec, plan.shape)


def test_a_refused_jump_names_the_setting_that_goes_on_at_the_parents_rate() -> None:
    plan = continued(fork_at(10, smear=0.012))
    assert [jump.group for jump in plan.jumps] == ["smear"]
    assert plan.ways_out == ("optimizer.smear_lr=0.012",)


def test_ratios_of_momentum_and_decay_stand_beside_the_rates() -> None:
    row = next(r for r in continued(fork_at(200_000)).rates if r.group == "matrix_768x768")
    assert row.momentum_ratio == pytest.approx(0.97 / 0.9)
    assert row.decay_ratio == pytest.approx(0.25, rel=0.01)  # the cosine at two thirds


def test_a_continuation_is_warned_of_heat_decay_and_one_factor() -> None:
    hot = continued(fork_at(200_000, scale=0.05), guards={"allow_lr_jump": True}).warnings
    assert any(text.startswith("horizon:") and "anchor: continue" in text for text in hot)
    late = continued(fork_at(295_000)).warnings
    assert any("near zero" in text for text in late)
    rates = {"embedding_lr": 0.0018, "unembedding_lr": 4.8e-5, "matrix_lr": 1.2e-4}
    cool = continued(fork_at(10), optimizer={**rates, "scalar_lr": 0.003}).warnings
    assert any("all rates but smear's are 0.1 times" in text for text in cool)


def test_the_users_own_rates_are_one_factor_of_the_defaults() -> None:
    warnings = make_plan(spec_of(), VOCAB).warnings
    assert any("0.06 times" in text and "optimizer.smear_lr=0.012" in text for text in warnings)
    assert any("warmdown never comes" in text for text in warnings)
    assert any("53%" in text for text in warnings)
