"""`everstep sample`: what a checkpoint writes."""

from __future__ import annotations

import json
import sys

import click

from everstep.cli.options import INT64_MAX, json_option, whole
from everstep.cli.output import note, printable
from everstep.client import Client


@click.command()
@click.argument("checkpoint", metavar="JOB@STEP")
@click.argument("prompt", default="")
@click.option("--tokens", type=whole(1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option("--top-k", type=whole(), default=0, help="Only among the K likeliest.")
@click.option("--seed", type=whole(most=INT64_MAX), default=0, help="Of the draws.")
@json_option
def sample(
    checkpoint: str,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    output: str,
) -> None:
    """Write on from PROMPT with the weights of JOB@STEP (or JOB@latest).

    Computed by the service on its CPU; jobs that train aren't disturbed.
    """
    with Client() as client:
        pieces = client.sample(
            checkpoint,
            prompt,
            max_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        if output == "json":
            click.echo(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
            return
        begun = False
        for piece in pieces:
            # The prompt once it is sure that something follows: a refusal says only itself.
            click.echo(("" if begun else prompt) + printable(piece), nl=False)
            sys.stdout.flush()
            begun = True
        click.echo("" if begun else prompt)
        if not begun:
            note("the model ends the text here")


COMMANDS = (sample,)
