"""`everstep list`, `get`, `cancel`, `pause`, `resume`, `checkpoints`: jobs that exist.

Owns what is asked and said about one job or many. Knows nothing of layout (job_view.py).
"""

from __future__ import annotations

from typing import cast

import click

from everstep.cli.job_view import checkpoint_table, job_table, show_job
from everstep.cli.options import json_option
from everstep.cli.output import console, note, ref_name, state_name, write_json
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb

STATES = [name.removeprefix("JOB_STATE_") for name in pb.JobState.keys()[1:]]  # but UNSPECIFIED


@click.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES, case_sensitive=False),
    help="Only jobs in this state; may be repeated.",
)
@json_option
def list_(states: tuple[str, ...], output: str) -> None:
    """List jobs, newest first."""
    with Client() as client:
        # The stubs type an enum's numbers as the enum, and Value's result as int.
        wanted = [cast("pb.JobState", pb.JobState.Value(f"JOB_STATE_{state}")) for state in states]
        jobs = [*client.list(wanted)]
    if output == "json":
        write_json(jobs, "jobs")
    elif jobs:
        console().print(job_table(jobs))
    else:
        note("no jobs")


@click.command()
@click.argument("job")
@json_option
def get(job: str, output: str) -> None:
    """Show JOB: progress, values in force, attempts.

    With -o json its .spec is a SPEC file for submit.
    """
    with Client() as client:
        found = client.get(job)
    if output == "json":
        write_json(found)
    else:
        show_job(console(), found)


@click.command()
@click.argument("job")
@json_option
def cancel(job: str, output: str) -> None:
    """Stop JOB for good; waits for its last checkpoint."""
    with Client() as client:
        _say_stopped(client.cancel(job), output)


@click.command()
@click.argument("job")
@json_option
def pause(job: str, output: str) -> None:
    """Checkpoint JOB and free its resources; waits until it has."""
    with Client() as client:
        _say_stopped(client.pause(job), output)


@click.command()
@click.argument("job")
@json_option
def resume(job: str, output: str) -> None:
    """Queue a paused JOB again."""
    with Client() as client:
        found = client.resume(job)
    if output == "json":
        write_json(found)
    else:
        click.echo(f"{found.id} is {state_name(found.state)}")


@click.command()
@click.argument("job")
@json_option
def checkpoints(job: str, output: str) -> None:
    """List the committed checkpoints of JOB, newest first."""
    with Client() as client:
        found = client.checkpoints(job)
    if output == "json":
        write_json(found, "checkpoints")
    elif found:
        console().print(checkpoint_table(found))
    else:
        note("no checkpoints")


def _say_stopped(stopped: pb.CancelJobResponse | pb.PauseJobResponse, output: str) -> None:
    if output == "json":
        write_json(stopped)
        return
    final = stopped.final_checkpoint
    if final.HasField("checkpoint"):
        left = f"its last checkpoint is {ref_name(final.checkpoint)}"
    else:
        left = f"there is no checkpoint: {final.reason}"
    click.echo(f"{stopped.job.id} is {state_name(stopped.job.state)}; {left}")


COMMANDS = (list_, get, cancel, pause, resume, checkpoints)
