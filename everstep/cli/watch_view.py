"""A job's stream, drawn as it comes: a progress bar with events above it, or plain lines.

Owns layout and pace. Knows nothing of where records come from.

Invariant: every event is shown; metric points are shown as often as somebody can read them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from everstep.cli import output
from everstep.v1 import everstep_pb2 as pb

LINE_EVERY_S = 1.0  # between two points on plain lines
STEP_SMOOTHING = 0.1  # weight of the newest step in the time a step takes
MATRICES = "matrix_"  # groups of Muon; all have the same rate

Values = Mapping[str, pb.GroupValues]


class View:
    """Takes records; this one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, record: pb.WatchJobResponse) -> None:
        """One record of the stream, in order."""

    def close(self) -> None:
        """No more records come."""


class PlainView(View):
    """For files and pipes: one line an event, and at most one line a second for points."""

    def __init__(self, console: Console, job: pb.Job, parents: Values) -> None:
        self._console = console
        self._job = job
        self._parents = parents
        self._pace = Pace(job)
        self._last_line = -LINE_EVERY_S
        self._held: pb.WatchJobResponse | None = None

    def show(self, record: pb.WatchJobResponse) -> None:
        """Print it, or hold a point back until it is due."""
        self._pace.add(record)
        if record.HasField("point"):
            self._held = record
            if time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._print_point()
            return
        self._print_point()
        for item in event_lines(record, self._job, self._parents):
            self._console.print(item, soft_wrap=True)

    def close(self) -> None:
        """The last point counts."""
        self._print_point()

    def _print_point(self) -> None:
        if self._held is None:
            return
        record, self._held = self._held, None
        self._last_line = time.monotonic()
        horizon = self._job.spec.schedule.num_iterations
        text = f"step {record.point.step:,}/{horizon:,}  {self._pace.facts(record.point)}"
        self._console.print(f"{output.clock(record.time)}  {text}", soft_wrap=True)


class LiveView(View):
    """For a terminal: a bar that stays at the bottom, events above it."""

    def __init__(self, console: Console, job: pb.Job, parents: Values) -> None:
        self._job = job
        self._parents = parents
        self._pace = Pace(job)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[facts]}"),
            console=console,
        )
        name, horizon = job.spec.name, job.spec.schedule.num_iterations
        self._task = self._progress.add_task(name, total=horizon, completed=job.step, facts="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def show(self, record: pb.WatchJobResponse) -> None:
        """Move the bar, or print above it."""
        self._pace.add(record)
        if record.HasField("point"):
            facts = self._pace.facts(record.point)
            self._progress.update(self._task, completed=record.point.step, facts=facts)
            return
        for item in event_lines(record, self._job, self._parents):
            self._progress.console.print(item)

    def close(self) -> None:
        """Leave the bar as it last was."""
        self._progress.stop()


class Pace:
    """What a point says, with the time that is left."""

    def __init__(self, job: pb.Job) -> None:
        self._horizon = job.spec.schedule.num_iterations
        self._step_s: float | None = None
        self._step = 0
        self._steps_s = self._validation_s = 0.0

    def add(self, record: pb.WatchJobResponse) -> None:
        """Every point counts for the time a step takes, and validation for what comes on top."""
        self._validation_s += record.event.evaluation_s
        if not record.HasField("point"):
            return
        old, new = self._step_s, record.point.step_s
        self._step_s = new if old is None else old + STEP_SMOOTHING * (new - old)
        passed = record.point.step - self._step if self._step else 1  # old points lie thinner
        self._steps_s += max(passed, 1) * new
        self._step = record.point.step

    def facts(self, point: pb.MetricPoint) -> str:
        """Loss, speed, the matrices' rate, and what is left."""
        facts = [f"loss {point.loss_smoothed:.4f}", f"{point.tokens_per_s:,.0f} tok/s"]
        if point.HasField("mfu_ratio"):
            facts.append(f"MFU {point.mfu_ratio:.1%}")
        matrices = (item for item in point.groups if item.group.startswith(MATRICES))
        if (group := next(matrices, None)) is not None:
            facts.append(f"matrices' rate {output.rate(group.learning_rate)}")
        left = self._horizon - point.step
        if left > 0 and self._step_s:
            stretch = 1 + self._validation_s / self._steps_s
            facts.append(f"{output.duration(left * self._step_s * stretch)} left")
        return "  ".join(facts)


def event_lines(
    record: pb.WatchJobResponse, job: pb.Job, parents: Values
) -> Iterator[RenderableType]:
    """An event as lines, and as a table where a continuation's values come into force."""
    event, at = record.event, output.clock(record.time)
    if event.kind == pb.EVENT_KIND_SAMPLED:
        yield Text(f"{at}  sample at step {event.step:,}:")
        yield Text(f"    {output.printable(event.message)}", style="italic")
        return
    yield Text(f"{at}  ").append(_words(event, record.attempt), style=_style(event))
    if event.kind == pb.EVENT_KIND_VALUES_IN_FORCE and event.groups:
        if job.HasField("start") and event.step <= job.start.step + 1:
            yield in_force_table(event.groups, parents, output.short_name(job.start))
        else:
            rates = (f"{item.group} {output.rate(item.learning_rate)}" for item in event.groups)
            yield Text(f"    {', '.join(rates)}")


def in_force_table(groups: Iterable[pb.GroupValues], parents: Values, start: str = "") -> Table:
    """Values read back from the optimizer, beside the parent's where they are known."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("group", no_wrap=True)
    if parents:
        table.add_column(f"in force at\n{start}", no_wrap=True)
    table.add_column("rate now\nin force" if parents else "rate")
    if parents:
        table.add_column("ratio", no_wrap=True)
    table.add_column("momentum")
    table.add_column("decay")
    for item in groups:
        cells, old = [item.group], parents.get(item.group)
        if parents:
            cells.append(output.rate(old.learning_rate) if old is not None else "-")
        cells.append(output.rate(item.learning_rate))
        if parents:
            before = old.learning_rate if old is not None else 0.0
            cells.append(output.ratio(item.learning_rate / before) if before > 0 else "-")
        table.add_row(*cells, output.rate(item.momentum), output.rate(item.weight_decay))
    return table


def _words(event: pb.Event, attempt: int) -> str:
    said = output.one_line(event.message)
    match event.kind:
        case pb.EVENT_KIND_STATE_CHANGED:
            words = output.state_name(event.state)
        case pb.EVENT_KIND_ATTEMPT_STARTED:
            return said or f"attempt {attempt} starts at step {event.step:,}"
        case pb.EVENT_KIND_ATTEMPT_ENDED:
            words = f"attempt {attempt} ended at step {event.step:,}: {event.outcome}"
        case pb.EVENT_KIND_VALUES_IN_FORCE:
            return f"in force at step {event.step:,}, read back from the optimizer:"
        case pb.EVENT_KIND_CHECKPOINT_COMMITTED:
            return (
                f"checkpoint {output.ref_name(event.checkpoint)} committed, "
                f"{output.size(event.checkpoint_bytes)} in {event.checkpoint_s:.1f} s; "
                f"training waited {event.checkpoint_stall_s * 1000:.0f} ms"
            )
        case pb.EVENT_KIND_EVALUATED:
            return f"validation at step {event.step:,}: {event.validation_bpb:.4f} bits per byte"
        case pb.EVENT_KIND_WARNING:
            words = "warning"
        case pb.EVENT_KIND_REQUESTED:
            words = "asked to"
        case _:
            words = pb.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()
    by = f" (by {output.one_line(event.actor)})" if event.actor else ""
    return (f"{words}: {said}" if said else words) + by


def _style(event: pb.Event) -> str:
    match event.kind:
        case pb.EVENT_KIND_STATE_CHANGED:
            return output.STATE_STYLES.get(output.state_name(event.state), "")
        case pb.EVENT_KIND_WARNING | pb.EVENT_KIND_CHECKPOINT_FALLBACK:
            return "yellow"
        case _:
            return ""
