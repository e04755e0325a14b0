"""What sections of a spec that are valid in themselves say against each other, or too much of.

Pure; knows the spec by its fields alone. Every contradiction is told, not the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.contract.violations import Violation

if TYPE_CHECKING:  # the spec calls what is here
    from trainer.contract.spec import JobSpec

SMEAR_GATE_CHANNELS = 24  # the smear gate reads this many leading channels of the residual stream
MAX_PARAMETERS = 10**12  # a bound against slips of the keyboard, far above what a GPU box trains


def cross_check(spec: JobSpec, broken: set[str] | frozenset[str]) -> list[Violation]:
    """Contradictions between fields, leaving out any check that touches a broken section."""
    checks: list[tuple[tuple[str, ...], Callable[[JobSpec], list[Violation]]]] = [
        (("model",), _check_model),
        (("model", "batch", "resources"), _check_batch),
        (("model", "evaluate"), _check_evaluate),
        (("schedule", "start"), _check_anchor),
        (("resources",), _check_workers),
        (("resources",), _check_gpu_type),
    ]
    found: list[Violation] = []
    for sections, check in checks:
        if not broken & set(sections):
            found += check(spec)
    return found


def _check_model(spec: JobSpec) -> list[Violation]:
    model = spec.model
    found = []
    if model.n_embd < SMEAR_GATE_CHANNELS:
        found.append(
            Violation(
                "model.depth",
                model.depth,
                f"depth x aspect_ratio gives a width of {model.n_embd}; it must be at least "
                f"{SMEAR_GATE_CHANNELS}, what the smear gate reads",
            )
        )
    if 12 * model.depth * model.n_embd**2 > MAX_PARAMETERS:
        found.append(
            Violation(
                "model.depth",
                model.depth,
                f"depth and aspect_ratio give more than {MAX_PARAMETERS:.0e} matrix parameters",
            )
        )
    if model.n_head % model.kv_heads:
        found.append(
            Violation(
                "model.n_kv_head", model.kv_heads, f"must divide the {model.n_head} query heads"
            )
        )
    return found


def _check_batch(spec: JobSpec) -> list[Violation]:
    asked, total = spec.resources.workers, spec.batch.total_batch_size
    if spec.possible_workers:
        return []
    micro, workers = spec.tokens_per_micro_step, ""
    if asked.min == asked.max > 1:
        micro, workers = micro * asked.min, f" x workers.min {asked.min}"
    reason = (
        f"must be a multiple of {micro} tokens (device_batch_size "
        f"{spec.batch.device_batch_size} x max_seq_len {spec.model.max_seq_len}{workers})"
    )
    if asked.min > asked.max and total % micro == 0:
        return []  # its own violation
    if total % micro == 0:
        reason = (
            f"no number of workers from {asked.min} to {asked.max} divides its {total // micro} "
            f"micro-batches of {micro} tokens"
        )
    return [Violation("batch.total_batch_size", total, reason)]


def _check_gpu_type(spec: JobSpec) -> list[Violation]:
    wanted = spec.resources.gpu_type
    if wanted is None or spec.resources.gpus_per_worker:
        return []
    return [Violation("resources.gpu_type", wanted, "needs gpus_per_worker: 1")]


def _check_evaluate(spec: JobSpec) -> list[Violation]:
    if spec.evaluate_rows >= 1:
        return []
    return [
        Violation(
            "evaluate.tokens",
            spec.evaluate.tokens,
            f"must be at least one row of max_seq_len {spec.model.max_seq_len} tokens",
        )
    ]


def _check_anchor(spec: JobSpec) -> list[Violation]:
    if spec.schedule.anchor == "continue" and spec.start.from_ is None:
        return [
            Violation(
                "schedule.anchor", "continue", "needs start.from: there is no rate to go on from"
            )
        ]
    return []


def _check_workers(spec: JobSpec) -> list[Violation]:
    workers = spec.resources.workers
    if workers.min <= workers.max:
        return []
    return [
        Violation(
            "resources.workers.min", workers.min, f"must be at most workers.max {workers.max}"
        )
    ]
