"""`everstep list`, `get`, `cancel`, `pause`, `resume`, `update`, `delete`, `checkpoints`, ...

Owns what is asked and said about jobs that exist. Knows nothing of layout (job_view.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import click

from everstep.cli.job_view import (
    checkpoint_table,
    job_table,
    lineage_tree,
    metric_table,
    show_job,
)
from everstep.cli.options import json_option, whole
from everstep.cli.output import console, note, ref_name, state_name, write_json
from everstep.client import Client
from everstep.errors import NotFoundError
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import INT32_MAX

CHECKPOINT_BAD = 1
SHOWN_POINTS = 20

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
@click.option(
    "--priority", type=whole(-INT32_MAX), help="Higher runs first; counts while the job waits."
)
@click.option("--keep-last", type=whole(), metavar="N", help="Keep the N newest checkpoints.")
@click.option(
    "--keep-every-steps", type=whole(), metavar="N", help="Keep those at multiples of N; 0: none."
)
@click.option("--keep-best/--no-keep-best", default=None, help="Keep the best by validation.")
@json_option
def update(
    job: str,
    priority: int | None,
    keep_last: int | None,
    keep_every_steps: int | None,
    keep_best: bool | None,
    output: str,
) -> None:
    """Change JOB: its priority, and from its next checkpoint on which of them it keeps."""
    retention = pb.CheckpointSpec(
        keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best
    )
    with Client() as client:
        found = client.update(job, priority, retention if retention.ListFields() else None)
    if output == "json":
        write_json(found)
    else:
        keep = found.spec.checkpoint
        click.echo(
            f"{found.id}: priority {found.spec.priority}; keeps the last {keep.keep_last}, "
            f"every {keep.keep_every_steps} steps, {'and' if keep.keep_best else 'not'} the best"
        )


@click.command()
@click.argument("job")
@click.option("--checkpoints", is_flag=True, help="Even if it has checkpoints: they go with it.")
@json_option
def delete(job: str, checkpoints: bool, output: str) -> None:
    """Forget JOB for good: checkpoints, logs, metrics, history. It must be final."""
    with Client() as client:
        client.delete(job, checkpoints)
    if output == "json":
        write_json(pb.DeleteJobResponse())
    else:
        click.echo(f"{job} is deleted")


@click.command()
@click.argument("job")
@click.option("--verify", is_flag=True, help="Read every byte back; exits with 1 if any is bad.")
@click.option(
    "--delete",
    "step",
    type=whole(),
    metavar="STEP",
    help="Delete the checkpoint at STEP, unless something depends on it.",
)
@json_option
def checkpoints(job: str, verify: bool, step: int | None, output: str) -> int:
    """List the committed checkpoints of JOB, newest first; or verify them, or delete one."""
    if verify and step is not None:
        raise click.UsageError("give --verify or --delete, not both")
    with Client() as client:
        if step is not None:
            client.delete_checkpoint(f"{job}@{step}")
            if output == "text":
                click.echo(f"{job}@{step} is deleted")
            else:
                write_json(pb.DeleteCheckpointResponse())
            return 0
        found = client.checkpoints(job)
        if verify:
            return _verify(client, found, output)
    if output == "json":
        write_json(found, "checkpoints")
    elif found:
        console().print(checkpoint_table(found))
    else:
        note("no checkpoints")
    return 0


@click.command()
@click.argument("job")
@json_option
def lineage(job: str, output: str) -> None:
    """Show where JOB came from, back to fresh weights or nanochat, and what forked on the way."""
    with Client() as client:
        found = client.lineage(job)
    if output == "json":
        write_json(found)
    else:
        console().print(lineage_tree(found))


@click.command()
@click.argument("job")
@click.option("--from-step", type=whole(), default=0, metavar="STEP", help="From this step.")
@click.option(
    "--to-step",
    type=whole(1),
    metavar="STEP",
    help="To this step.  [default: the last]",
)
@click.option(
    "--points",
    type=whole(),
    default=SHOWN_POINTS,
    show_default=True,
    help="At most this many, evenly spaced; 0: all.",
)
@json_option
def metrics(job: str, from_step: int, to_step: int | None, points: int, output: str) -> None:
    """Show what the steps of JOB measured. Where a step was trained twice, the later time."""
    with Client() as client:
        found = client.metrics(job, from_step, to_step or 0, points)
    if output == "json":
        write_json(found, "points")
    elif found:
        console().print(metric_table(found))
    else:
        note("no points")


def _verify(client: Client, listed: Sequence[pb.Checkpoint], output: str) -> int:
    checked = []
    for item in listed:
        try:
            checked.append(client.verify(ref_name(item.ref)))
        except NotFoundError:
            note(f"{ref_name(item.ref)} was deleted meanwhile")
    if output == "json":
        write_json(checked, "checkpoints")
    elif checked:
        problems = ["; ".join(each.problems) for each in checked]
        console().print(checkpoint_table([each.checkpoint for each in checked], problems))
    else:
        note("no checkpoints")
    return CHECKPOINT_BAD if any(each.problems for each in checked) else 0


def _say_stopped(stopped: pb.CancelJobResponse | pb.PauseJobResponse, output: str) -> None:
    if output == "json":
        write_json(stopped)
        return
    final = stopped.final_checkpoint
    if final.HasField("checkpoint"):
        why = "" if final.manifest_sha256 else f": {final.reason}"  # the store could not be asked
        left = f"its last checkpoint is {ref_name(final.checkpoint)}{why}"
    else:
        left = f"no checkpoint is known: {final.reason}"
    click.echo(f"{stopped.job.id} is {state_name(stopped.job.state)}; {left}")


COMMANDS = (list_, get, cancel, pause, resume, update, delete, checkpoints, lineage, metrics)
