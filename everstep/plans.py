"""A plan on the wire, as the service answers it and as `everstep plan --offline` works it out.

Pure; decides nothing. Imports only the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

from everstep.specs import spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.memory import MemoryEstimate
from trainer.contract.plan import Plan, RateRow
from trainer.contract.schedule import GroupValues


def values_to_proto(group: str, values: GroupValues) -> pb.GroupValues:
    """One group's values."""
    return pb.GroupValues(
        group=group,
        learning_rate=values.lr,
        momentum=values.momentum,
        weight_decay=values.weight_decay,
    )


def plan_to_proto(
    plan: Plan, start: pb.CheckpointRef | None = None, ancestors: Sequence[pb.Ancestor] = ()
) -> pb.Plan:
    """A plan; start and ancestors: of a continuation of a job of ours."""
    shape, counts = plan.shape, plan.counts
    return pb.Plan(
        spec=spec_to_proto(plan.spec),
        shape=pb.Shape(
            n_layer=shape.n_layer,
            n_embd=shape.n_embd,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.padded_vocab_size,
            sequence_len=shape.sequence_len,
        ),
        parameters=[
            pb.ParameterCount(kind=kind, count=getattr(counts, kind))
            for kind in ("wte", "value_embeds", "lm_head", "matrices", "scalars")
        ],
        parameters_total=counts.total,
        flops_per_token=plan.flops_per_token,
        grad_accum_steps=plan.grad_accum_steps,
        start_step=plan.start_step,
        steps=plan.steps,
        tokens=plan.tokens,
        rates=[_rate_row(row) for row in plan.rates],
        start=start,
        refusals=[str(jump) for jump in plan.jumps],
        warnings=plan.warnings,
        checkpoint_bytes=plan.checkpoint_bytes,
        steps_at_risk=plan.steps_at_risk,
        memory=_memory(plan.memory),
        time=_time(plan),
        checkpoints_kept=plan.checkpoints_kept,
        checkpoints_bytes=plan.checkpoints_kept * plan.checkpoint_bytes,
        seconds_at_risk=plan.seconds_at_risk,
        start_name=plan.fork.name if plan.fork else "",
        lineage=ancestors,
        ways_out=plan.ways_out,
        workers=[
            pb.WorkersOption(workers=n, grad_accum_steps=plan.spec.grad_accum_steps(n))
            for n in plan.spec.possible_workers
        ],
    )


def _memory(memory: MemoryEstimate) -> pb.MemoryEstimate:
    return pb.MemoryEstimate(
        parts=[pb.MemoryPart(part=part, bytes=size) for part, size in memory.parts.items()],
        peak_bytes=memory.peak_bytes,
        device_bytes=memory.device_bytes,
        largest_device_batch_size=memory.largest_batch,
        snapshot_bytes=memory.snapshot_bytes,
    )


def _time(plan: Plan) -> pb.TimeEstimate | None:
    if plan.time is None:
        return None
    return pb.TimeEstimate(
        step_s=plan.time.step_s,
        total_s=plan.time.step_s * plan.steps,
        tokens_per_s=plan.time.tokens_per_s,
        mfu_ratio=plan.time.mfu_ratio,
        basis=plan.time.basis,
    )


def _rate_row(row: RateRow) -> pb.RateRow:
    return pb.RateRow(
        group=row.group,
        parent=values_to_proto(row.group, row.parent) if row.parent else None,
        points=[
            pb.RatePoint(step=step, values=values_to_proto(row.group, values))
            for step, values in row.points
        ],
        learning_rate_ratio=row.ratio,
        momentum_ratio=row.momentum_ratio,
        weight_decay_ratio=row.decay_ratio,
        claimed_learning_rate=row.claimed,
    )
