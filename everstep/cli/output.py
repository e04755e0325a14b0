"""How things are written: consoles, JSON, numbers, times.

Owns the form of every figure, so that it reads the same in all commands. Knows no command.

Invariant: text that came from elsewhere (names, messages, sampled text) is written as text: no
markup, no control characters.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from everstep.v1 import everstep_pb2 as pb

PLAIN_WIDTH = 140  # of what goes to a file or a pipe
WHOLE = frozenset({"job", "state", "step", "age", "node", "address", "waiting"})

STATE_STYLES = {
    "RUNNING": "green",
    "SUCCEEDED": "bold green",
    "FAILED": "bold red",
    "CANCELLED": "yellow",
    "PAUSED": "yellow",
}


class _Console(Console):
    """One whose reader may leave: that is told as for what is written without it (__main__.py)."""

    def on_broken_pipe(self) -> None:
        """Its own ends the program with 1, as if a job had failed."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """stdout, or stderr; a pipe gets the same width everywhere."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else PLAIN_WIDTH
    return _Console(width=width, markup=False, highlight=False, emoji=False, stderr=stderr)


def table(*names: str, whole: Collection[str] = WHOLE) -> Table:
    """An empty table; whole: the columns that are never broken over lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        made.add_column(name, no_wrap=name in whole)
    return made


def sizing(asked: pb.WorkersSpec) -> str:
    """A policy as specs write it."""
    return pb.Sizing.Name(asked.policy).removeprefix("SIZING_").lower()


def fail(message: str) -> None:
    """Say what went wrong, on stderr."""
    click.secho(printable(message), fg="red", err=True)


def note(message: str) -> None:
    """Say something beside the point, on stderr."""
    click.echo(printable(message), err=True)


def plain(message: Message) -> dict[str, Any]:
    """A message as plain values: proto field names as written, zeros and empty lists included."""
    values: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return values


def write_json(value: Message | Sequence[Message], key: str = "", *, line: bool = False) -> None:
    """A message, or an object with a list of them under key, as JSON on stdout."""
    data = plain(value) if isinstance(value, Message) else {key: [plain(item) for item in value]}
    click.echo(json.dumps(data, ensure_ascii=False, indent=None if line else 2))
    if line:
        sys.stdout.flush()


def printable(text: str) -> str:
    """Text without control characters but line ends and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def one_line(text: str) -> str:
    """Text on one line."""
    return printable(" ".join(text.split()))


def state_name(state: pb.JobState) -> str:
    """RUNNING for JOB_STATE_RUNNING."""
    return pb.JobState.Name(state).removeprefix("JOB_STATE_")


def ref_name(ref: pb.CheckpointRef) -> str:
    """JOB@STEP."""
    return f"{ref.job_id}@{ref.step}"


def short_name(ref: pb.CheckpointRef) -> str:
    """The same, short enough for a column's head; the whole name stands nearby."""
    return f"..{ref.job_id[-6:]}@{ref.step}"


def rate(value: float) -> str:
    """A learning rate, momentum or decay."""
    return f"{value:.4g}"


def ratio(value: float) -> str:
    """A factor between two rates."""
    return f"x {value:.3g}" if value < float("inf") else "from 0"


def change(first: float, last: float) -> str:
    """Two values in order, or the one that both are."""
    return rate(first) if rate(first) == rate(last) else f"{rate(first)} .. {rate(last)}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what would be written as 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as the two units that matter."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes and whole % 60:
        return f"{minutes} min {whole % 60:02} s"
    return f"{minutes} min" if minutes else f"{whole} s"


def seconds(stamp: Timestamp) -> float:
    """Since the epoch."""
    return stamp.seconds + stamp.nanos / 1e9


def age(stamp: Timestamp) -> str:
    """How long ago."""
    return duration(time.time() - seconds(stamp))


def local_time(stamp: Timestamp) -> str:
    """Date and time of this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds(stamp)))


def clock(stamp: Timestamp) -> str:
    """Time of day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds(stamp)))
