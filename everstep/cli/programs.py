"""The service's own programs, started from the command line: `python -m service` and its like.

Knows their names; imports none of them, for the client is installed without them too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

NOT_INSTALLED = "the service isn't installed here: pip install 'everstep[service,trainer]'"


def command(module: str, *words: str) -> list[str]:
    """The command that runs a module of the service; click.UsageError where it isn't installed."""
    return [sys.executable, *_search_path(), "-m", module, *words]


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
