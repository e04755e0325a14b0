"""Whatever a parent's state held, a continuation's weights move by what its own spec says.

Each example commits a parent's checkpoint of random moments, momentum buffers, counts and rates,
and runs a whole attempt of one step from it. Expected values are worked out here from nanochat's
formulas, not by the schedule under test; the movement is taken from the two checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.fakes.attempts import Bucket, process_settings_kept, small_corpus
from trainer.contract.outcome import Outcome
from trainer.contract.schedule import GroupValues, InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.storage.layout import part_name
from trainer.storage.manifest import CheckpointRef, Manifest, Part

PRECISION = 1e-3  # relative, of the whole tensor's movement
# Group of a tensor by a part of its name: rate's field, factor of it, whether the width counts,
# betas, decay (nanochat's table of groups).
ADAMW = {
    "lm_head": ("unembedding_lr", 1.0, True, (0.8, 0.96), 0.01),
    "transformer.wte": ("embedding_lr", 1.0, True, (0.8, 0.995), 0.001),
    "value_embeds": ("embedding_lr", 0.5, True, (0.8, 0.995), 0.01),
    "resid_lambdas": ("scalar_lr", 0.01, False, (0.8, 0.95), 0.05),
    "x0_lambdas": ("scalar_lr", 1.0, False, (0.96, 0.95), 0.0),
    "smear": ("smear_lr", 1.0, None, (0.8, 0.95), 0.0),
    "backout": ("smear_lr", 1.0, None, (0.8, 0.95), 0.0),
}
NUMBERS = count()

rates = st.floats(1e-3, 0.5)
scales = st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 30.0])


@dataclass(frozen=True)
class Held:
    """What the parent's state holds: sizes of its buffers, its counts, and values in force."""

    seed: int
    momentum: float
    second_momentum: float
    average: float
    square: float
    updates: int
    multiplier: float
    rate: float
    decay_multiplier: float


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with process_settings_kept():
        made = Bucket(tmp_path_factory.mktemp("continuations"))
        small_corpus(made.folder / "data")
        made.add("SEED", data={"source": f"file:{made.folder / 'data'}"})
        made.run("SEED", stop_at=1)
        yield made


# Updates too small for their weights to hold, against the weight's sign, beside a large decay.
@example(
    held=Held(0, 0.0, 0.0, 0.0, 1e-6, 0, 1.0, 1.0, 0.0),
    anchor="horizon",
    optimizer={
        "embedding_lr": 0.5,
        "unembedding_lr": 0.5,
        "matrix_lr": 0.0078125,
        "scalar_lr": 0.5,
        "smear_lr": 0.5,
        "weight_decay": 5.0,
    },
    start=1,
    warmdown_ratio=0.0,
)
@given(
    held=st.builds(
        Held,
        seed=st.integers(0, 2**31),
        momentum=scales,
        second_momentum=st.sampled_from([0.0, 1e-8, 0.03, 5.0]),
        average=scales,
        square=st.sampled_from([1e-6, 1e-3, 1.0]),
        updates=st.integers(0, 200_000),
        multiplier=st.floats(0.05, 1.0),
        rate=st.floats(1e-6, 1.0),
        decay_multiplier=st.floats(0.0, 1.0),
    ),
    anchor=st.sampled_from(["horizon", "segment", "continue"]),
    optimizer=st.fixed_dictionaries(
        dict.fromkeys(
            ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "smear_lr"), rates
        )
        | {"weight_decay": st.sampled_from([0.0, 0.28, 5.0])}
    ),
    start=st.integers(1, 5000),
    warmdown_ratio=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weights_move_by_the_spec_whatever_the_parent_held(
    bucket: Bucket,
    held: Held,
    anchor: str,
    optimizer: dict[str, float],
    start: int,
    warmdown_ratio: float,
) -> None:
    number = next(NUMBERS)
    parent, before = commit(bucket, f"PARENT{number}", start, held)
    schedule = {
        "num_iterations": start + 1,
        "warmdown_ratio": warmdown_ratio,
        "final_lr_frac": 0.1,
        "anchor": anchor,
    }
    child = f"CHILD{number}"
    spec = bucket.add(
        child,
        parent,
        data={"source": f"file:{bucket.folder / 'data'}"},
        optimizer=optimizer,
        schedule=schedule,
    )
    result, _ = bucket.run(child)
    assert result.outcome is Outcome.COMPLETED, result.message
    after = bucket.checkpoint(child, start + 1)[1]
    multiplier, decay_multiplier = multipliers(anchor, start, warmdown_ratio, held)
    vocab_size = bucket.repository(child).document().binding.tokenizer.vocab_size  # type: ignore[union-attr]
    shape = ModelShape.of(spec.model, vocab_size)
    batch = math.sqrt(spec.batch.total_batch_size / 524_288)
    decay = spec.optimizer.weight_decay * batch * horizon_factor(spec, shape) * decay_multiplier
    for name in shape.named_shapes():
        old, new = before[f"model.{name}"].double(), after[f"model.{name}"].double()
        if name.startswith("transformer.h."):
            rate = spec.optimizer.matrix_lr * batch * multiplier
            check_muon(name, old, new, rate, decay)
            continue
        field, factor, width, betas, group_decay = ADAMW[
            next(part for part in ADAMW if name.startswith(part))
        ]
        rate = getattr(spec.optimizer, field) * factor * multiplier
        rate *= 1.0 if width is None else batch
        rate *= math.sqrt(768 / shape.n_embd) if width else 1.0
        average, square = (
            after[f"optimizer.{name}.{key}"].double() for key in ("exp_avg", "exp_avg_sq")
        )
        updates = held.updates + 1
        unbiased = square / (1 - betas[1] ** updates)
        direction = average / (1 - betas[0] ** updates) / (unbiased.sqrt() + 1e-10)
        wanted = -rate * direction - rate * group_decay * old
        check(name, old, new, wanted)


def check_muon(name: str, old: Tensor, new: Tensor, rate: float, decay: float) -> None:
    """Without its decay the movement has the norm of an orthogonal matrix times the rate.

    The decay acts where the update has the weight's sign, and there the sum of both is more than
    the decay; elsewhere it has the other sign, or none where the weight can't hold the update. So
    whatever is above half the decay has it, however small the update was.
    """
    rows, cols = old.shape
    step = rate * math.sqrt(max(1.0, rows / cols))
    moved = (old - new) / step
    decayed = moved * old >= decay * old.square() / 2
    update = torch.where(decayed, moved - decay * old, moved)
    norm = float(update.norm())
    assert norm == pytest.approx(math.sqrt(min(rows, cols)), rel=PRECISION), name


def check(name: str, old: Tensor, new: Tensor, wanted: Tensor) -> None:
    """The movement is the one wanted, but for what fp32 weights can't hold."""
    rounding = float(old.abs().max() + wanted.abs().max()) * 2**-23 * math.sqrt(old.numel())
    error = float((new - old - wanted).norm())
    assert error <= PRECISION * float(wanted.norm()) + rounding, name


def multipliers(anchor: str, start: int, warmdown_ratio: float, held: Held) -> tuple[float, float]:
    """Of rates and of the matrices' decay in the step from start to the horizon after it."""
    horizon = start + 1
    if anchor == "continue":  # halfway from the step before the start to the horizon
        return held.multiplier + (0.1 - held.multiplier) / 2, held.decay_multiplier / 2
    if anchor == "segment":  # a warmdown begins at full rate, and this is its first step
        return 1.0, 1.0
    warmdown = round(warmdown_ratio * horizon)
    left = 1 / warmdown if warmdown and start > horizon - warmdown else 1.0
    return left + (1 - left) * 0.1, 0.5 * (1 + math.cos(math.pi * start / horizon))


def horizon_factor(spec: JobSpec, shape: ModelShape) -> float:
    """nanochat's D_ref / D."""
    reference = spec.model.model_copy(update={"depth": 12, "n_kv_head": None})
    ours = 12 * shape.scaling_params
    return 12 * ModelShape.of(reference, shape.vocab_size).scaling_params / ours


def commit(
    bucket: Bucket, job_id: str, step: int, held: Held
) -> tuple[CheckpointRef, dict[str, Tensor]]:
    """A parent with weights and state at random, as a checkpoint of its own."""
    bucket.add(job_id, data={"source": f"file:{bucket.folder / 'data'}"})
    manifest, tensors = bucket.checkpoint("SEED", 1)
    generator = torch.Generator().manual_seed(held.seed)
    made = {
        name: _random(name, tensor, held, generator) for name, tensor in sorted(tensors.items())
    }
    repository = bucket.repository(job_id)
    ref = CheckpointRef(job_id=job_id, step=step, attempt=repository.claim(None, "here").attempt)
    path = bucket.folder / "part"
    save_file(made, path)
    part = Part.of_file(path, part_name(0), sorted(made))
    repository.upload_part(ref, part, path)
    old = manifest.state
    groups = InForce.from_dict(old["in_force"]).groups  # type: ignore[arg-type]
    values = {name: GroupValues(held.rate, 0.5, 0.7) for name in groups}
    in_force = InForce(step - 1, held.multiplier, 0.9, 0.7, values, held.decay_multiplier)
    state: dict[str, Any] = {
        **old,
        "step": step,
        "in_force": in_force.to_dict(),
        "counters": dict.fromkeys(groups, held.updates),
    }
    repository.commit(
        Manifest(
            job_id=job_id,
            step=step,
            attempt=ref.attempt,
            parts=(part,),
            state=state,
            spec_sha256=manifest.spec_sha256,
            identity=manifest.identity,
            versions={},
            created_at=datetime.now(UTC),
        )
    )
    return ref, made


def _random(name: str, tensor: Tensor, held: Held, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=generator)
    if name.endswith("second_momentum_buffer"):
        return held.second_momentum * drawn.abs()
    if name.endswith("momentum_buffer"):
        return held.momentum * drawn
    if name.endswith("exp_avg_sq"):
        return (held.square * (drawn.abs() + 0.1)).square()
    if name.endswith("exp_avg"):
        return held.average * held.square * drawn
    return tensor + 0.1 * drawn
