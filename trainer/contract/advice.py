"""What to know before a plan is run, in words. Pure.

Each rule looks at one thing that people were bitten by, and says figures, not adjectives. Nothing
here refuses anything: the guard does (plan.py).
"""

from __future__ import annotations

import math

from trainer.contract.memory import MemoryEstimate, size
from trainer.contract.scaling import ParamGroup
from trainer.contract.schedule import InForce, Schedule
from trainer.contract.spec import Compute, Embeddings, JobSpec

FAR_ABOVE = 10.0  # a smear rate so many times Muon's is worth a word (assumption)
NEAR_ZERO = 0.05  # of the decay that the schedule begins with
SAME = 1e-6  # relative; two factors that are one
WTE_STD = 0.8  # of the initial token embeddings (trainer/gpt.py)
USUAL_UPDATE = 0.3  # of the rate: how far AdamW moves an entry of a table in a step (nanochat runs)
BF16_HALF_STEP = -8  # half the spacing of bf16 numbers in [2^e, 2^(e+1)) is 2^(e-8)
FORWARD_SHARE = 1 / 3  # of a step: the backward pass takes some two thirds of it
MUCH_VALIDATION = 0.05  # of the time that training takes; worth a word (assumption)
NANOCHAT_RATES = {  # its defaults, all of which scale with the batch; 0.2 for smear, which doesn't
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "scalar_lr": 0.5,
}


def advise(
    spec: JobSpec, groups: tuple[ParamGroup, ...], schedule: Schedule, start_step: int
) -> list[str]:
    """What the spec alone says."""
    found = [
        _smear(spec, groups),
        _one_factor(spec),
        _no_warmdown(spec),
        _straight_line(spec),
        _validation(spec, start_step),
        _frozen_tables(spec, groups, schedule, start_step),
    ]
    workers, possible = spec.resources.workers, spec.possible_workers
    if len(possible) <= workers.max - workers.min:
        known = ", ".join(map(str, possible))
        found.append(
            f"of workers.min {workers.min} to workers.max {workers.max} only {known} can be: no "
            "other divides the micro-batches of a step"
        )
    return [text for text in found if text]


def advise_continuation(
    schedule: Schedule, start_step: int, parent: InForce, ratios: dict[str, float | None]
) -> list[str]:
    """What follows from the values in force at the parent's step."""
    first = schedule.at(start_step)
    found = []
    if first.lr_multiplier > parent.lr_multiplier * (1 + 1e-3):
        found.append(
            f"horizon: this schedule's multiplier is {first.lr_multiplier:.3g} at step "
            f"{start_step:,}, the parent's was {parent.lr_multiplier:.3g}: a longer horizon heats "
            "the rates up again (schedule.anchor: continue goes on from where they are)"
        )
    peak = max(each.weight_decay for each in (parent, first))
    if peak > 0 and first.decay_multiplier is not None and first.decay_multiplier < NEAR_ZERO:
        found.append(
            f"the matrices' weight decay is near zero from the start: {first.weight_decay:.3g}, "
            f"{first.decay_multiplier:.1%} of its base (a cosine over the steps to the horizon)"
        )
    others = {ratio for group, ratio in ratios.items() if group != "smear" and ratio is not None}
    low, high = min(others, default=1.0), max(others, default=1.0)
    smear = ratios.get("smear")
    one_factor = math.isfinite(high) and high - low <= SAME * high
    if one_factor and abs(high - 1) > 1e-3 and smear is not None and abs(smear / high - 1) > 1e-3:
        found.append(
            f"all rates but smear's are {high:.4g} times those in force, smear's {smear:.4g} times"
        )
    return found


def advise_memory(memory: MemoryEstimate, rows: int) -> list[str]:
    """Whether it fits."""
    if memory.device_bytes is None or memory.peak_bytes <= memory.device_bytes:
        return []
    way = f"batch.device_batch_size {memory.largest_batch} fits"
    if not memory.largest_batch:
        way = "no batch.device_batch_size fits"
    return [
        f"memory: batch.device_batch_size {rows} needs about {size(memory.peak_bytes)}, and "
        f"{size(memory.device_bytes)} are there; {way}"
    ]


def _smear(spec: JobSpec, groups: tuple[ParamGroup, ...]) -> str | None:
    matrix = next((group.lr for group in groups if group.kind == "muon"), 0.0)
    smear = next(group.lr for group in groups if group.name == "smear")
    if not matrix or smear <= FAR_ABOVE * matrix:
        return None
    return (
        f"the smear group's rate, {smear:g}, is {smear / matrix:.0f} times the matrices' "
        f"{matrix:.3g}: it is scaled by nothing (optimizer.smear_lr)"
    )


def _one_factor(spec: JobSpec) -> str | None:
    factors = [getattr(spec.optimizer, name) / usual for name, usual in NANOCHAT_RATES.items()]
    low, high = min(factors), max(factors)
    smear = spec.optimizer.smear_lr / 0.2
    if high - low > SAME * high or abs(high - 1) < SAME or abs(smear - high) <= SAME * high:
        return None
    return (
        f"all four rates are {high:.3g} times nanochat's defaults, and smear_lr {smear:.3g} times: "
        f"to scale it too, optimizer.smear_lr={0.2 * high:.4g}"
    )


def _no_warmdown(spec: JobSpec) -> str | None:
    schedule = spec.schedule
    if schedule.anchor == "continue" or schedule.final_lr_frac == 1.0:
        return None
    if round(schedule.warmdown_ratio * schedule.num_iterations) > 0:
        return None
    return (
        f"the warmdown never comes: with schedule.warmdown_ratio {schedule.warmdown_ratio:g} the "
        f"rates stay as they are to the last step; final_lr_frac {schedule.final_lr_frac:g} has no "
        "effect"
    )


def _straight_line(spec: JobSpec) -> str | None:
    schedule = spec.schedule
    if schedule.anchor != "continue" or not (schedule.warmup_steps or schedule.warmdown_ratio):
        return None
    return (
        f"schedule.anchor continue is a straight line: warmup_steps {schedule.warmup_steps} and "
        f"warmdown_ratio {schedule.warmdown_ratio:g} have no effect"
    )


def _validation(spec: JobSpec, start_step: int) -> str | None:
    every, tokens = spec.evaluate.every, spec.evaluate_rows * spec.model.max_seq_len
    trained = every * spec.batch.total_batch_size
    often = 0 < every <= spec.schedule.num_iterations - start_step  # not at the end alone
    if not often or (share := FORWARD_SHARE * tokens / trained) < MUCH_VALIDATION:
        return None
    return (
        f"validation adds about {share:.0%} to the time that training takes: {tokens:,} tokens "
        f"every {every} steps, which train on {trained:,} (evaluate.every, evaluate.tokens; a "
        "forward pass is taken for a third of a step)"
    )


def _frozen_tables(
    spec: JobSpec, groups: tuple[ParamGroup, ...], schedule: Schedule, start_step: int
) -> str | None:
    if spec.precision.compute is not Compute.BF16 or spec.precision.embeddings is Embeddings.FP32:
        return None
    last = spec.schedule.num_iterations - 1
    first, end = (schedule.at(step).groups["wte"].lr for step in (start_step, last))
    return (
        "embedding tables are kept in bf16, where small updates round to nothing: at the first "
        f"step's rate about {unmoved(first):.0%} of the token table's entries can't move, at the "
        f"last step's {unmoved(end):.0%} (precision.embeddings: fp32 keeps them)"
    )


def unmoved(rate: float) -> float:
    """The share of a fresh token table, in bf16, that a usual update at this rate can't move."""
    update = USUAL_UPDATE * rate
    if update <= 0:  # of the smallest of rates, too
        return 1.0
    exponent = math.floor(math.log2(update) - BF16_HALF_STEP) + 1
    return math.erfc(2.0**exponent / (WTE_STD * math.sqrt(2.0)))
