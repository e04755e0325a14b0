"""Optimizer groups and the rates that follow from a job spec, before any schedule.

Owns nanochat's scaling rules: how base learning rates and weight decay depend on batch, width and
horizon, and what its -1 defaults stand for. Knows nothing of torch or of steps.

Invariant: every parameter of a shape is in exactly one group; groups and their members are in
nanochat's order. Formulas: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec, ModelSpec

REFERENCE_BATCH_TOKENS = 524_288  # nanochat's rates are tuned at this many tokens a step
REFERENCE_WIDTH = 768  # and at this width
REFERENCE_DEPTH = 12  # and the decay and batch rules at this depth
BATCH_EXPONENT = 0.383  # the optimal batch grows with tokens to this power (nanochat's fit)
TARGET_PARAM_DATA_RATIO = 12.0  # tokens a scaling parameter, nanochat's default

ADAM_EPS = 1e-10
MUON_MOMENTUM = 0.95  # before the schedule, which always sets another
MUON_BETA2 = 0.9
MUON_SECOND_MOMENT_FLOOR = 1e-10


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share one rate.

    lr and weight_decay are the derived base values that the schedule multiplies. betas[0] of a Muon
    group is its momentum before the schedule, betas[1] NorMuon's. shape is that of the first member
    (of every member in a Muon group).
    """

    name: str
    kind: Literal["adamw", "muon"]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def batch_lr_scale(total_batch_size: int) -> float:
    """The factor of every rate but the smear group's: square root of the batch."""
    return math.sqrt(total_batch_size / REFERENCE_BATCH_TOKENS)


def target_tokens(shape: ModelShape, ratio: float = TARGET_PARAM_DATA_RATIO) -> int:
    """Training tokens that the parameter-to-data ratio implies (nanochat's D)."""
    return int(ratio * shape.scaling_params)


def reference_tokens(
    model: ModelSpec, vocab_size: int, ratio: float = TARGET_PARAM_DATA_RATIO
) -> float:
    """D of the depth-12 model with this model's aspect ratio, head_dim and vocabulary.

    nanochat has as many kv heads as heads there, whatever this model has.
    """
    reference = model.model_copy(update={"depth": REFERENCE_DEPTH, "n_kv_head": None})
    return ratio * ModelShape.of(reference, vocab_size).scaling_params


def auto_total_batch_size(
    model: ModelSpec, vocab_size: int, ratio: float = TARGET_PARAM_DATA_RATIO
) -> int:
    """Tokens a step that nanochat picks for total_batch_size -1: the nearest power of two."""
    tokens = target_tokens(ModelShape.of(model, vocab_size), ratio)
    growth = (tokens / reference_tokens(model, vocab_size, ratio)) ** BATCH_EXPONENT
    return int(2 ** round(math.log2(REFERENCE_BATCH_TOKENS * growth)))


def iterations_for(
    shape: ModelShape,
    total_batch_size: int,
    *,
    target_flops: float | None = None,
    ratio: float = TARGET_PARAM_DATA_RATIO,
) -> int:
    """Steps that nanochat derives when num_iterations is -1: from FLOPs if given, else from D."""
    if target_flops is not None and target_flops > 0:
        return round(target_flops / (shape.flops_per_token * total_batch_size))
    return target_tokens(shape, ratio) // total_batch_size


def scaled_weight_decay(spec: JobSpec, shape: ModelShape) -> float:
    """Muon's decay before its schedule: for the batch, and for the horizon that D implies."""
    # The ratio cancels up to D's rounding to a whole number, which 1e-12 agreement needs.
    horizon = reference_tokens(spec.model, shape.vocab_size) / target_tokens(shape)
    return spec.optimizer.weight_decay * batch_lr_scale(spec.batch.total_batch_size) * horizon


def param_groups(spec: JobSpec, shape: ModelShape) -> tuple[ParamGroup, ...]:
    """The optimizer's groups: six AdamW groups, then a Muon group a matrix shape, sorted."""
    return _adamw_groups(spec, shape) + _muon_groups(spec, shape)


def _adamw_groups(spec: JobSpec, shape: ModelShape) -> tuple[ParamGroup, ...]:
    shapes, rates = shape.named_shapes(), spec.optimizer
    batch = batch_lr_scale(spec.batch.total_batch_size)
    # Factors in nanochat's order, so that rates equal its own to the last digit.
    width = (shape.n_embd / REFERENCE_WIDTH) ** -0.5

    def group(
        name: str, parameters: tuple[str, ...], lr: float, betas: tuple[float, float], decay: float
    ) -> ParamGroup:
        first = shapes[parameters[0]]
        return ParamGroup(name, "adamw", parameters, first, lr, betas, ADAM_EPS, decay)

    embeds = tuple(f"value_embeds.{i}.weight" for i in shape.value_embed_layers)
    smear = ("smear_gate.weight", "smear_lambda", "backout_lambda")
    embedding_lr = rates.embedding_lr * batch * width
    unembedding_lr = rates.unembedding_lr * batch * width
    return (
        group("lm_head", ("lm_head.weight",), unembedding_lr, (0.8, 0.96), 0.01),
        group("wte", ("transformer.wte.weight",), embedding_lr, (0.8, 0.995), 0.001),
        group("value_embeds", embeds, embedding_lr * 0.5, (0.8, 0.995), 0.01),
        group("resid", ("resid_lambdas",), rates.scalar_lr * batch * 0.01, (0.8, 0.95), 0.05),
        group("x0", ("x0_lambdas",), rates.scalar_lr * batch, (0.96, 0.95), 0.0),
        group("smear", smear, rates.smear_lr, (0.8, 0.95), 0.0),
    )


def _muon_groups(spec: JobSpec, shape: ModelShape) -> tuple[ParamGroup, ...]:
    members: dict[tuple[int, ...], list[str]] = {}
    for name, size in shape.named_shapes().items():
        if name.startswith("transformer.h."):
            members.setdefault(size, []).append(name)
    lr = spec.optimizer.matrix_lr * batch_lr_scale(spec.batch.total_batch_size)
    decay = scaled_weight_decay(spec, shape)
    return tuple(
        ParamGroup(
            name=f"matrix_{size[0]}x{size[1]}",
            kind="muon",
            parameters=tuple(names),
            shape=size,
            lr=lr,
            betas=(MUON_MOMENTUM, MUON_BETA2),
            eps=MUON_SECOND_MOMENT_FLOOR,
            weight_decay=decay,
        )
        for size, names in sorted(members.items())
    )
