"""`everstep logs`: what the ranks of a job said, now or as they say it."""

from __future__ import annotations

from datetime import datetime

import click

from everstep.cli.options import json_option, whole
from everstep.cli.output import printable, write_json
from everstep.client import Client


@click.command()
@click.argument("job")
@click.option("--attempt", type=whole(1), default=None, help="Only this attempt.")
@click.option("--rank", type=whole(), default=None, help="Only this rank.")
@click.option("-f", "--follow", is_flag=True, help="Go on with lines as they come.")
@json_option
def logs(job: str, attempt: int | None, rank: int | None, follow: bool, output: str) -> None:
    """Print the log lines of JOB, of every rank and attempt. With -o json, one line each."""
    with Client() as client:
        for line in client.logs(job, attempt or 0, rank, follow):
            if output == "json":
                write_json(line, line=True)
                continue
            at = datetime.fromtimestamp(line.time.seconds).strftime("%H:%M:%S")
            click.echo(f"{at} {line.attempt}/{line.rank} {printable(line.line)}")


COMMANDS = (logs,)
