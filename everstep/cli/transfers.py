"""`everstep export` and `everstep import`: checkpoints to and from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from everstep.cli.options import asked, json_option, written_options
from everstep.cli.output import note, ref_name, write_json
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb


@click.command()
@click.argument("checkpoint", metavar="JOB@STEP")
@click.option(
    "--to",
    "target",
    required=True,
    metavar="FOLDER",
    help="A folder where the service runs, or an s3: URI.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["nanochat", "safetensors"]),
    default="nanochat",
    show_default=True,
    help="nanochat: what it trains on from; safetensors: with a config.json.",
)
@json_option
def export(checkpoint: str, target: str, form: str, output: str) -> None:
    """Write the checkpoint JOB@STEP (or JOB@latest) for another program, and print its files.

    Weights and optimizer state are written as they are. tokenizer/ belongs into nanochat's base
    folder, the other files into base_checkpoints/<tag> there.
    """
    uri = target if ":" in target else f"file:{Path(target).absolute()}"
    with Client() as client:
        files = client.export(checkpoint, uri, form)
    if output == "json":
        write_json(pb.ExportCheckpointResponse(files=files))
    else:
        click.echo("\n".join(files))


@click.command("import")
@click.argument("source", metavar="nanochat:FOLDER@STEP")
@written_options
@json_option
def import_(source: str, output: str, **given: Any) -> None:
    """Make a checkpoint of nanochat's the end of a job of its own, and print its name.

    Nothing is trained; `submit --from` continues from it. SPEC or --set name data and tokenizer;
    model and batch are the checkpoint's.
    """
    wanted = asked(start=None, nanochat=None, **given)
    with Client() as client:
        made = client.import_checkpoint(source, wanted.spec)
    if output == "json":
        write_json(made)
    else:
        note(f"it lies in {made.uri}")
        click.echo(ref_name(made.ref))


COMMANDS = (export, import_)
