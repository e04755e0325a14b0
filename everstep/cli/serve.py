"""`everstep serve` and `everstep doctor`: become the service, or its look at this machine.

Knows only that these are `python -m service` and `python -m service.doctor`; imports neither.

Invariant: the process is replaced, so signals and the exit status are the service's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from everstep.cli.options import json_option
from everstep.cli.programs import command


@click.command()
@click.option("--standalone", is_flag=True, help="Start Ray and an S3 store beside the service.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of all state.  [default: ./.everstep]",
)
def serve(standalone: bool, state: Path | None) -> None:
    """Run the service until Ctrl-C or SIGTERM.

    Says one line when it is ready, and writes its address to DIR/service.json.
    """
    _become("service", state, ["--standalone"] if standalone else [])


@click.command()
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="The service's folder of state.  [default: ./.everstep]",
)
@json_option
def doctor(state: Path | None, output: str) -> None:
    """Look at this machine: GPU and driver, disk, ports, Ray, the store, the clock.

    Says what to do about what is wrong, and exits with 1 if anything is.
    """
    _become("service.doctor", state, ["--json"] if output == "json" else [])


def _become(module: str, state: Path | None, words: list[str]) -> None:
    if state is not None:
        words = [*words, "--state", str(state)]
    sys.stdout.flush()
    os.execv(sys.executable, command(module, *words))


COMMANDS = (serve, doctor)
