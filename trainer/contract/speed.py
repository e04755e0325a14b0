"""How long a step takes: from what this cluster measured, else from the device's peak.

Work is counted in FLOPs: those of the plan (6 a matmul weight and the whole window of attention, a
causal half not taken off), those of Muon's orthogonalisation, and for what moves bytes rather than
multiplies an equivalent in FLOPs. That of the residual stream was fitted to eager fp32 steps on two
kinds of CPU (benchmarks/plan_time.py); the others are assumptions.

Invariant: without a measured rate and without a known device there is no estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.contract.devices import Device
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Compute, JobSpec

MUON_ITERATIONS = 5
# FLOPs that take as long as one element a token of: the residual stream in a layer, a logit.
STREAM_FLOPS, LOGIT_FLOPS = 8000.0, 60.0
UPDATE_FLOPS = 60.0  # the same of one parameter's update
CONVENTION = "FLOPs by this plan's count: whole windows, the causal half not taken off"


@dataclass(frozen=True)
class Measured:
    """What one job of this cluster measured: seconds a step, for how much work."""

    name: str
    step_s: float
    work: float


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds a step over all workers, and what they rest on in words."""

    step_s: float
    tokens_per_s: float
    mfu_ratio: float | None
    basis: str


def work_of(spec: JobSpec, shape: ModelShape, workers: int) -> float:
    """FLOPs of one step on one of so many workers, with the equivalents of what moves bytes."""
    tokens = spec.batch.total_batch_size / workers
    stream = shape.n_layer * shape.n_embd * STREAM_FLOPS
    logits = shape.padded_vocab_size * LOGIT_FLOPS
    update = shape.parameter_counts().total * UPDATE_FLOPS
    return tokens * (shape.flops_per_token + stream + logits) + update + _muon_flops(shape)


def same_kind(spec: JobSpec, other: JobSpec) -> bool:
    """Whether a rate that other reached says something of spec."""
    ours, theirs = spec.resources, other.resources
    cpus = ours.gpus_per_worker or ours.cpus_per_worker == theirs.cpus_per_worker
    same = ours.gpus_per_worker == theirs.gpus_per_worker and bool(cpus)
    return same and spec.precision.compute is other.precision.compute


def estimate_time(
    spec: JobSpec, shape: ModelShape, device: Device | None, measured: Sequence[Measured] = ()
) -> TimeEstimate | None:
    """Seconds a step, from the measured job nearest in work, else from the device's peak."""
    flops = float(spec.batch.total_batch_size) * shape.flops_per_token
    workers = spec.possible_workers[0]
    peak = _peak(spec, device)
    work = work_of(spec, shape, workers)
    near = min(measured, key=lambda each: abs(math.log(each.work / work)), default=None)
    if near is not None:
        step_s = near.step_s * work / near.work
        basis = f"measured here: {near.name} takes {near.step_s:.3g} s a step"
    elif device is not None and peak and device.usual_share:
        step_s = flops / (peak * device.usual_share * workers)
        basis = (
            f"{device.name}: {device.usual_share:.0%} of {peak / 1e12:.4g} TFLOP/s dense bf16, "
            "an assumption until a job has run here"
        )
    else:
        return None
    mfu = mfu_ratio(spec, shape, device, workers, step_s)
    tokens_per_s = spec.batch.total_batch_size / step_s
    return TimeEstimate(step_s, tokens_per_s, mfu, f"{basis}; {CONVENTION}")


def mfu_ratio(
    spec: JobSpec, shape: ModelShape, device: Device | None, workers: int, step_s: float
) -> float | None:
    """Share of the peak of so many of a device, by CONVENTION; None where the peak is unknown."""
    peak = _peak(spec, device)
    if peak is None:
        return None
    return spec.batch.total_batch_size * shape.flops_per_token / (step_s * peak * workers)


def _peak(spec: JobSpec, device: Device | None) -> float | None:
    """The table's peaks are of bf16."""
    low = spec.precision.compute is Compute.BF16
    return device.peak_flops if device is not None and low else None


def _muon_flops(shape: ModelShape) -> float:
    """Orthogonalisation of every matrix: two products with the Gram matrix and its square."""
    total = 0.0
    for name, size in shape.named_shapes().items():
        if name.startswith("transformer.h."):
            short, long = min(size), max(size)
            total += MUON_ITERATIONS * (4 * short * short * long + 2 * short**3)
    return total
