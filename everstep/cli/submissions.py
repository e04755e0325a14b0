"""`everstep plan` and `everstep submit`: a spec goes in, a plan or a job comes out.

Owns what is said before a job exists. Knows nothing of how specs are read or plans are drawn.
"""

from __future__ import annotations

from typing import Any

import click

from everstep.cli.options import Asked, asked, json_option, spec_options
from everstep.cli.output import console, note, write_json
from everstep.cli.plan_view import show_plan
from everstep.cli.watch import follow
from everstep.client import Client

REFUSED = 4


@click.command()
@spec_options
@json_option
def plan(output: str, **given: Any) -> int:
    """Show what SPEC would run, without running it.

    Parameters, FLOPs, batches, and every group's learning rate; for a continuation beside the
    rates in force at its start. Exits with 4 where submit would refuse.
    """
    wanted = _asked(given)
    with Client() as client:
        made = client.plan(wanted.spec, wanted.inherit)
    if output == "json":
        write_json(made)
    else:
        show_plan(console(), made)
    return REFUSED if made.refusals else 0


@click.command()
@spec_options
@click.option("--wait", is_flag=True, help="Watch the job to its end; exit 1 unless it succeeds.")
@click.option("--request-id", help="Makes it safe to repeat: the same id, the same job.")
@json_option
def submit(wait: bool, request_id: str | None, output: str, **given: Any) -> int:
    """Queue a job that trains SPEC, and print its id."""
    wanted = _asked(given)
    with Client() as client:
        made = client.submit(wanted.spec, request_id, wanted.inherit)
        if output == "text":
            _show(made.plan if made.HasField("plan") else None, made.job.id)
        status = 0
        if wait:
            status = follow(client, made.job.id, output="text" if output == "text" else "none")
            made.job.CopyFrom(client.get(made.job.id))
        if output == "json":
            write_json(made)
    return status


def _asked(given: dict[str, Any]) -> Asked:
    wanted = asked(**given)
    for line in wanted.notes:
        note(line)
    return wanted


def _show(made: Any, job_id: str) -> None:
    if made is None:
        note("submitted before with this request id")
    else:
        show_plan(console(), made, compact=True)
    click.echo(job_id)


COMMANDS = (plan, submit)
