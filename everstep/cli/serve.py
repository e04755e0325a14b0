"""`everstep serve`: becomes the service.

Knows only that the service is `python -m service`; imports nothing of it.

Invariant: the process is replaced, so signals and the exit status are the service's own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import click

NOT_INSTALLED = "the service isn't installed here: pip install 'everstep[service,trainer]'"


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
    command = [sys.executable, *_search_path(), "-m", "service"]
    if standalone:
        command.append("--standalone")
    if state is not None:
        command += ["--state", str(state)]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _search_path() -> list[str]:
    """Python's option that keeps a folder named service where the user stands from being ours."""
    try:
        found = importlib.util.find_spec("service.__main__")
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise click.UsageError(NOT_INSTALLED)
    run_in_place = Path(found.origin).parents[1] == Path.cwd()
    return [] if run_in_place else ["-P"]


COMMANDS = (serve,)
