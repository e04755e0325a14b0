"""A plan, drawn for people.

Owns the layout. Every number comes from the plan; nothing is worked out here but sums and names.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from everstep.cli import output
from everstep.v1 import everstep_pb2 as pb

INDENT = 13
NO_TIME = "no job of this kind has run here, and no known GPU was named (--device)"
WAYS_OUT = (
    "ways out: lower rates (--set optimizer.<rate>=...), --set schedule.anchor=continue, "
    "or --set guards.allow_lr_jump=true"
)


def show_plan(console: Console, plan: pb.Plan, *, compact: bool = False) -> None:
    """The whole plan; compact leaves out what doesn't change from job to job."""
    _line(console, "model", f"{plan.spec.name}: {_shape(plan)}")
    if compact:
        _line(console, "parameters", f"{plan.parameters_total:,}")
    else:
        parts = " + ".join(f"{item.kind} {item.count:,}" for item in plan.parameters)
        _line(console, "parameters", f"{plan.parameters_total:,} = {parts}")
        _line(console, "FLOPs", f"{plan.flops_per_token:,} a token, forward and backward")
    _line(console, "batch", _batch(plan))
    if plan.spec.resources.workers.max > plan.spec.resources.workers.min:
        _line(console, "workers", _workers(plan))
    _line(console, "steps", _steps(plan))
    if not compact:
        _line(console, "data", _data(plan.spec))
        _line(console, "precision", _precision(plan.spec))
        _line(console, "checkpoint", _checkpoint(plan))
    if plan.memory.parts:
        _line(console, "memory", _memory(plan.memory))
    _line(console, "time", _time(plan.time) if plan.HasField("time") else "unknown: " + NO_TIME)
    if not compact and plan.lineage:
        names = (
            f"{item.job_id}@{item.end_step}" if item.job_id else item.name for item in plan.lineage
        )
        _line(console, "lineage", " <- ".join(names))
    console.print(rate_table(plan))
    for warning in plan.warnings:
        _say(console, f"warning: {warning}", "yellow")
    for refusal in plan.refusals:
        _say(console, f"refused: {refusal}", "bold red")
    for row in plan.rates:
        if row.HasField("claimed_learning_rate"):
            _say(console, _claim(row), "yellow")
    if plan.refusals:
        settings = " ".join(f"--set {each}" for each in plan.ways_out)
        _say(console, f"{WAYS_OUT}; at the parent's rates: {settings}" if settings else WAYS_OUT)


def rate_table(plan: pb.Plan) -> Table:
    """Every group's values over the run; for a continuation beside those in force before it."""
    continued = any(row.HasField("parent") for row in plan.rates)
    first, last = plan.start_step, plan.start_step + plan.steps - 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("group", no_wrap=True)
    if continued:
        table.add_column(f"in force at\n{_place(plan)}", no_wrap=True)
        table.add_column(f"first step\n{first:,}")
        table.add_column("ratio", no_wrap=True)
    else:
        table.add_column(f"rate at\nstep {first:,}")
    peaks = {row.group: peak for row in plan.rates if (peak := _peak(row)) is not None}
    if peaks:
        table.add_column("highest\nbetween")
    table.add_column(f"last step\n{last:,}")
    table.add_column("momentum")
    table.add_column("decay")
    for row in plan.rates:
        table.add_row(*_cells(row, continued, peaks), style=_style(row, plan))
    return table


def _cells(row: pb.RateRow, continued: bool, peaks: dict[str, float]) -> list[str]:
    start, end = row.points[0].values, row.points[-1].values
    cells = [row.group]
    if continued:
        known = row.HasField("parent")
        cells += [output.rate(row.parent.learning_rate) if known else "-"]
        cells += [output.rate(start.learning_rate)]
        cells += [output.ratio(row.learning_rate_ratio) if known else "-"]
    else:
        cells += [output.rate(start.learning_rate)]
    if peaks:
        cells.append(output.rate(peaks[row.group]) if row.group in peaks else "")
    cells.append(output.rate(end.learning_rate))
    for name in ("momentum", "weight_decay"):
        text = output.change(getattr(start, name), getattr(end, name))
        old = output.rate(getattr(row.parent, name))
        if row.HasField("parent") and old != output.rate(getattr(start, name)):
            text = f"{old} -> {text}"
        cells.append(text)
    return cells


def _peak(row: pb.RateRow) -> float | None:
    """The highest rate of the run, where it is neither the first nor the last."""
    rates = [point.values.learning_rate for point in row.points]
    return max(rates) if max(rates) > max(rates[0], rates[-1]) else None


def _style(row: pb.RateRow, plan: pb.Plan) -> str:
    refused = any(refusal.startswith(f"{row.group}:") for refusal in plan.refusals)
    return "red" if refused else ""


def _shape(plan: pb.Plan) -> str:
    shape, model = plan.shape, plan.spec.model
    heads = f"{shape.n_head} heads"
    if shape.n_kv_head != shape.n_head:
        heads += f" ({shape.n_kv_head} of keys and values)"
    return (
        f"{shape.n_layer} layers x {shape.n_embd} wide, {heads}, vocabulary {shape.vocab_size:,}, "
        f"rows of {shape.sequence_len:,} tokens, windows {model.window_pattern}"
    )


def _batch(plan: pb.Plan) -> str:
    spec = plan.spec
    workers = plan.workers[0].workers if plan.workers else spec.resources.workers.min
    ranks = f" x {workers} workers" if workers > 1 else ""
    micro = "micro-batch" if plan.grad_accum_steps == 1 else "micro-batches"
    return (
        f"{spec.batch.total_batch_size:,} tokens a step = {plan.grad_accum_steps} {micro} x "
        f"{spec.batch.device_batch_size} rows x {plan.shape.sequence_len:,}{ranks}"
    )


def _workers(plan: pb.Plan) -> str:
    asked = plan.spec.resources.workers
    options = ", ".join(f"{each.workers} x {each.grad_accum_steps}" for each in plan.workers)
    return f"{asked.min} to {asked.max}, {output.sizing(asked)}; workers x micro-batches: {options}"


def _steps(plan: pb.Plan) -> str:
    horizon = plan.start_step + plan.steps
    name = plan.start_name or (output.ref_name(plan.start) if plan.HasField("start") else "")
    begin = f" from {name}" if name else ""
    return f"{plan.steps:,} steps{begin} to the horizon {horizon:,}, {plan.tokens:,} tokens"


def _data(spec: pb.JobSpec) -> str:
    data, every = spec.data, spec.evaluate.every
    when = f"every {every:,} steps and at the end" if every else "at the end"
    return output.one_line(
        f"{data.source}, tokenizer {data.tokenizer}; validation shard {data.validation}, "
        f"{spec.evaluate.tokens:,} tokens {when}"
    )


def _precision(spec: pb.JobSpec) -> str:
    compute = pb.Compute.Name(spec.precision.compute).removeprefix("COMPUTE_").lower()
    tables = pb.Embeddings.Name(spec.precision.embeddings).removeprefix("EMBEDDINGS_").lower()
    norm = spec.optimizer.grad_clip_norm  # 0: none is given, and none can be
    return (
        f"{compute}, tables {compute if tables == 'compute' else tables}, "
        f"{'' if spec.deterministic else 'not '}deterministic; "
        f"gradients clipped {f'at norm {norm:g}' if norm else 'nowhere'}"
    )


def _checkpoint(plan: pb.Plan) -> str:
    every = plan.spec.checkpoint.every_s
    clock = f" or {output.duration(every)}, whichever comes first" if every else ""
    return (
        f"{output.size(plan.checkpoint_bytes)}; a crash costs at most "
        f"{plan.steps_at_risk:,} steps{clock}; at most {plan.checkpoints_kept:,} kept, "
        f"{output.size(plan.checkpoints_bytes)}"
    )


def _memory(memory: pb.MemoryEstimate) -> str:
    parts = " + ".join(f"{item.part} {output.size(item.bytes)}" for item in memory.parts)
    text = f"{output.size(memory.peak_bytes)} = {parts}"
    if memory.HasField("device_bytes"):
        text += (
            f"; {output.size(memory.device_bytes)} there; largest device_batch_size that fits: "
            f"{memory.largest_device_batch_size or 'none'}"
        )
    return f"{text}; host, for snapshots: {output.size(memory.snapshot_bytes)}"


def _time(time: pb.TimeEstimate) -> str:
    mfu = f", MFU {time.mfu_ratio:.1%}" if time.HasField("mfu_ratio") else ""
    return (
        f"{output.duration(time.total_s)} without validation: {time.step_s:.3g} s a step, "
        f"{time.tokens_per_s:,.0f} tokens/s{mfu} ({time.basis})"
    )


def _claim(row: pb.RateRow) -> str:
    return (
        f"{row.group}: nanochat's user_config says {row.claimed_learning_rate:.6g}; its optimizer "
        f"ran with {row.parent.learning_rate:.6g}, which is what counts"
    )


def _place(plan: pb.Plan) -> str:
    return output.short_name(plan.start) if plan.HasField("start") else f"step {plan.start_step:,}"


def _line(console: Console, label: str, text: str) -> None:
    words = Text(f"{label:<{INDENT}}", style="bold").append(text, style="not bold")
    console.print(words, soft_wrap=not console.is_terminal)


def _say(console: Console, words: str, style: str = "") -> None:
    text = Text(output.printable(words), style=style)
    console.print(text, soft_wrap=not console.is_terminal)
