"""Jobs and checkpoints that exist, drawn for people.

Owns the layout of `get`, `list`, `checkpoints`, `lineage` and `metrics`. Works nothing out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from everstep.cli import output
from everstep.cli.watch_view import in_force_table
from everstep.v1 import everstep_pb2 as pb

J_PER_KWH = 3.6e6


def job_table(jobs: Iterable[pb.Job]) -> Table:
    """One line a job."""
    table = output.table(
        "job", "name", "state", "workers", "step", "loss", "bits/byte", "left", "age"
    )
    for job in jobs:
        state = output.state_name(job.state)
        table.add_row(
            job.id,
            job.spec.name,
            Text(state, style=output.STATE_STYLES.get(state, "")),
            str(job.workers or ""),
            f"{job.step:,}/{job.spec.schedule.num_iterations:,}",
            f"{job.latest.loss_smoothed:.4f}" if job.HasField("latest") else "",
            f"{job.validation_bpb:.4f}" if job.HasField("validation_bpb") else "",
            output.duration(job.eta_s) if job.HasField("eta_s") else "",
            output.age(job.create_time),
        )
    return table


def checkpoint_table(
    checkpoints: Iterable[pb.Checkpoint], problems: Sequence[str] | None = None
) -> Table:
    """One line a checkpoint; problems: what is wrong with each, where they were verified."""
    names = ["step", "attempt", "size", "bits/byte", "age", "uri"]
    if problems is not None:
        names.insert(-1, "verified")
    table = output.table(*names)
    for place, item in enumerate(checkpoints):
        readable = item.HasField("create_time")  # its manifest, that is
        row: list[str | Text] = [
            f"{item.ref.step:,}",
            str(item.ref.attempt),
            output.size(item.size_bytes) if readable else "?",
            f"{item.validation_bpb:.4f}" if item.HasField("validation_bpb") else "",
            output.age(item.create_time) if readable else "?",
        ]
        if problems is not None:
            wrong = output.one_line(problems[place])
            row.append(Text(wrong or "ok", style="red" if wrong else "green", overflow="fold"))
        table.add_row(*row, Text(output.one_line(item.uri), overflow="fold"))
    return table


def lineage_tree(found: pb.GetLineageResponse) -> Tree:
    """Jobs below those that they continue from, the oldest first; the one asked for is bold."""
    trunk = list(found.ancestors)[::-1]
    whole = Tree(_branch(trunk[0]))
    places = {trunk[0].job_id: whole}
    forks: dict[str, list[pb.Fork]] = {}
    for fork in found.forks:
        forks.setdefault(fork.parent_job_id, []).append(fork)
    for parent, job in pairwise(trunk):
        places[job.job_id] = places[parent.job_id].add(_branch(job))
    places[trunk[-1].job_id].label = Text.assemble(_branch(trunk[-1]), style="bold")
    for parent_id, branches in forks.items():  # parents come first
        for fork in sorted(branches, key=lambda each: each.start_step):
            places[fork.job_id] = places[parent_id].add(_branch(fork))
    return whole


def _branch(item: pb.Ancestor | pb.Fork) -> Text:
    if not item.job_id:
        return Text(output.one_line(item.name))  # a checkpoint of nanochat's
    if not item.name:
        return Text(f"{item.job_id}  (nothing is left of it)  to step {item.end_step:,}")
    steps = f"steps {item.start_step:,} to {item.end_step:,}"
    return Text(f"{item.job_id}  {output.one_line(item.name)}  {steps}")


def metric_table(points: Iterable[pb.MetricPoint]) -> Table:
    """One line a step."""
    table = output.table("step", "loss", "smoothed", "gradient norm", "tokens/s", "seconds", "time")
    for item in points:
        table.add_row(
            f"{item.step:,}",
            f"{item.loss:.4f}",
            f"{item.loss_smoothed:.4f}",
            f"{item.gradient_norm:.4g}",
            f"{item.tokens_per_s:,.0f}",
            f"{item.step_s:.3g}",
            output.local_time(item.time) if item.HasField("time") else "",
        )
    return table


def show_job(console: Console, job: pb.Job) -> None:
    """Everything about one job."""
    state = output.state_name(job.state)
    _line(console, "job", f"{job.id}  {job.spec.name}")
    reason = f"  {output.one_line(job.reason)}" if job.reason else ""
    _line(console, "state", state + reason, output.STATE_STYLES.get(state, ""))
    if job.desired_state not in (job.state, pb.JOB_STATE_RUNNING):
        _line(console, "wanted", output.state_name(job.desired_state))
    _line(console, "workers", _workers(job))
    _line(console, "step", _progress(job))
    if job.HasField("latest"):
        _line(console, "latest", _latest(job.latest))
    if job.HasField("validation_bpb"):
        _line(console, "validation", f"{job.validation_bpb:.4f} bits per byte")
    told = getattr(job.spec.start, "from") or "fresh weights"  # from: of nanochat's checkpoints
    begin = output.ref_name(job.start) if job.HasField("start") else told
    _line(console, "start", begin)
    if job.HasField("checkpoint"):
        _line(console, "checkpoint", output.ref_name(job.checkpoint))
    _line(console, "times", _times(job))
    if job.HasField("goodput"):
        _line(console, "time went", _goodput(job.goodput))
    if job.HasField("energy_joules"):
        _line(console, "energy", f"{job.energy_joules / J_PER_KWH:.3g} kWh by its GPUs")
    if job.in_force:
        console.print(Text("\nin force at the newest attempt's first step", style="bold"))
        console.print(in_force_table(job.in_force, {}))
    if job.attempts:
        console.print()
        console.print(_attempt_table(job.attempts))


def _attempt_table(attempts: Iterable[pb.Attempt]) -> Table:
    table = output.table("attempt", "from step", "began", "ran", "outcome", "")
    for attempt in attempts:
        began = output.seconds(attempt.start_time)
        ended = attempt.HasField("end_time")
        table.add_row(
            str(attempt.number),
            f"{attempt.start_step:,}",
            output.local_time(attempt.start_time),
            output.duration(output.seconds(attempt.end_time) - began)
            if ended
            else output.age(attempt.start_time),
            attempt.outcome or ("" if ended else "running"),
            Text(output.one_line(attempt.message), overflow="fold"),
        )
    return table


def _workers(job: pb.Job) -> str:
    asked = job.spec.resources.workers
    span = (
        f" of {asked.min} to {asked.max}, {output.sizing(asked)}" if asked.max > asked.min else ""
    )
    return f"{job.workers}{span}"


def _progress(job: pb.Job) -> str:
    left = f", {output.duration(job.eta_s)} left" if job.HasField("eta_s") else ""
    return f"{job.step:,} of {job.spec.schedule.num_iterations:,}{left}"


def _latest(point: pb.MetricPoint) -> str:
    mfu = f", MFU {point.mfu_ratio:.1%}" if point.HasField("mfu_ratio") else ""
    return (
        f"loss {point.loss_smoothed:.4f} (step {point.step:,}: {point.loss:.4f}), "
        f"{point.tokens_per_s:,.0f} tokens/s, gradient norm {point.gradient_norm:.4g}{mfu}"
    )


def _goodput(goodput: pb.Goodput) -> str:
    """The kinds that took any time, the longest first."""
    kinds = [
        (field.name.removesuffix("_s"), getattr(goodput, field.name))
        for field in goodput.DESCRIPTOR.fields
        if field.name.endswith("_s")
    ]
    spent = sorted((pair for pair in kinds if pair[1] > 0), key=lambda pair: -pair[1])
    told = ", ".join(f"{kind} {output.duration(seconds)}" for kind, seconds in spent)
    ratio = f"  (goodput {goodput.ratio:.1%})" if goodput.HasField("ratio") else ""
    return (told or "nothing yet") + ratio


def _times(job: pb.Job) -> str:
    times = [f"submitted {output.local_time(job.create_time)}"]
    if job.HasField("start_time"):
        times.append(f"began {output.local_time(job.start_time)}")
    if job.HasField("end_time"):
        times.append(f"ended {output.local_time(job.end_time)}")
    return ", ".join(times)


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    console.print(Text(f"{label:<11}", style="bold").append(text, style=style))
