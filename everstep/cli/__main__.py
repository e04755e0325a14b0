"""The `everstep` command: its subcommands, and the one table from errors to exit statuses.

Owns the exit statuses: 0; 1 the job failed or was cancelled; 2 usage or an invalid spec; 3 the
service can't be reached; 4 refused. Knows nothing of jobs.

Invariant: what went wrong is said on stderr in words, never as a stack trace.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from everstep import errors
from everstep.cli import (
    cluster,
    compare,
    data,
    jobs,
    logs,
    samples,
    serve,
    submissions,
    tokens,
    transfers,
    watch,
)
from everstep.cli.output import fail
from everstep.spec_text import SpecTextError
from trainer.contract.violations import SpecError

USAGE, UNREACHABLE, REFUSED = 2, 3, 4
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells count SIGINT and SIGPIPE

STATUSES: list[tuple[type[Exception], int]] = [
    (errors.InvalidRequestError, USAGE),
    (SpecError, USAGE),
    (SpecTextError, USAGE),
    (UnicodeError, USAGE),  # a word of the command line that is no text
    (errors.RefusedError, REFUSED),
    (errors.NotFoundError, REFUSED),
    (errors.EverstepError, UNREACHABLE),  # away, late, or at fault: it can't be used now
]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="everstep")
def everstep() -> None:
    """Train nanochat-class language models, and keep training them.

    The service is found by EVERSTEP_ADDRESS (with EVERSTEP_TOKEN, EVERSTEP_CA_CERT), else in the
    state folder of `everstep serve`: EVERSTEP_STATE, by default ./.everstep.
    """


for _command in (
    *serve.COMMANDS,
    *submissions.COMMANDS,
    *jobs.COMMANDS,
    *compare.COMMANDS,
    *watch.COMMANDS,
    *logs.COMMANDS,
    *samples.COMMANDS,
    *transfers.COMMANDS,
    *data.COMMANDS,
    *tokens.COMMANDS,
    *cluster.COMMANDS,
):
    everstep.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    try:
        status = everstep.main(
            list(arguments) if arguments is not None else None,
            prog_name="everstep",
            standalone_mode=False,
        )
        sys.stdout.flush()
        return status or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), None)
        if status is None:
            raise
        fail(str(error) if not isinstance(error, SpecError) else _lines(error))
        return status


def _lines(error: SpecError) -> str:
    return "\n".join(str(violation) for violation in error.violations)


def main() -> None:
    """`everstep` and `python -m everstep.cli`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale has no letters for
            stream.reconfigure(errors="replace")
    sys.exit(run())


if __name__ == "__main__":
    main()
