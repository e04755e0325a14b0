"""`everstep watch`, and following a submitted job to its end.

Owns when following ends and with which status. Knows nothing of how records are drawn.
"""

from __future__ import annotations

import click

from everstep.cli.options import INT64_MAX, json_option, whole
from everstep.cli.output import console, fail, note, state_name, write_json
from everstep.cli.watch_view import LiveView, PlainView, View
from everstep.client import FINAL_STATES, Client
from everstep.errors import EverstepError, RefusedError, ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb

JOB_FAILED = 1


@click.command()
@click.argument("job")
@click.option("--cursor", type=whole(most=INT64_MAX), default=0, help="Go on after this record.")
@json_option
def watch(job: str, cursor: int, output: str) -> int:
    """Follow JOB to its end: progress, events, values in force. Exits with 1 unless it succeeds.

    With -o json, one record a line; its cursor is what --cursor takes.
    """
    with Client() as client:
        return follow(client, job, cursor, output)


def follow(client: Client, job_id: str, cursor: int = 0, output: str = "text") -> int:
    """Follow a job to its end as text, as json, or silently (none); returns the exit status."""
    job = client.get(job_id)
    view = _view(client, job, output)
    try:
        with view:
            for record in client.watch(job_id, cursor):
                cursor = record.cursor
                view.show(record)
    except (KeyboardInterrupt, ServiceUnreachableError, RefusedError):  # no end of the job
        note(f"the job goes on; to come back: everstep watch {job_id} --cursor {cursor}")
        raise
    job = client.get(job_id)
    assert job.state in FINAL_STATES, "a watch ends with its job"
    if job.state == pb.JOB_STATE_SUCCEEDED:
        return 0
    fail(f"job {job.id} is {state_name(job.state)}: {job.reason}")
    return JOB_FAILED


def _view(client: Client, job: pb.Job, output: str) -> View:
    if output == "json":
        return _JsonLines()
    if output == "none":
        return View()
    out = console()
    parents = _parents(client, job)
    return LiveView(out, job, parents) if out.is_terminal else PlainView(out, job, parents)


def _parents(client: Client, job: pb.Job) -> dict[str, pb.GroupValues]:
    """What was in force where a continuation left its parent; empty where it can't be told."""
    if not job.HasField("start"):
        return {}
    try:
        plan = client.plan(job.spec)
    except EverstepError:  # the parent's checkpoint may be gone by now
        return {}
    return {row.group: row.parent for row in plan.rates if row.HasField("parent")}


class _JsonLines(View):
    def show(self, record: pb.WatchJobResponse) -> None:
        write_json(record, line=True)


COMMANDS = (watch,)
