"""`everstep cluster join`: the one command that makes a further box part of the cluster.

Owns how image, compose file and secrets get there. Knows no job.

Invariant: what is printed holds no secret, and is run on the head's box by whoever may read them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import click

COMPOSE = "worker.compose.yml"
SECRETS = ("ray.token", "storage.env")
SHARED = ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "EVERSTEP_DATA", "EVERSTEP_SHM")
# Of compose's .env: the name, and the value in single quotes, in double ones, or without.
LINE = re.compile(r"""\s*(?:export\s+)?(\w+)=(?:'([^']*)'|"([^"]*)"|(.*?))(?:\s+#.*|\s*)""")
THERE = "everstep-worker"  # a folder in the home of whoever logs in


@click.command()
@click.argument("box")
@click.option("--head", envvar="EVERSTEP_HEAD", help="This box's address, as BOX reaches it.")
@click.option("--ip", help="BOX's address, as this box reaches it.  [default: what follows its @]")
@click.option(
    "--checkout",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="The folder of docker-compose.yml.  [default: .]",
)
@click.option("--image", default="everstep:local", help="[default: everstep:local]")
def join(box: str, head: str | None, ip: str | None, checkout: Path, image: str) -> None:
    """Print the one command that joins BOX, such as me@10.0.0.2, to this box's cluster.

    Run it here, where the stack runs: it sends image, compose file and two secrets by ssh, and
    starts a worker there. BOX needs Docker, and the NVIDIA container toolkit for its GPUs.
    """
    if not head:
        raise click.UsageError("say this box's address by --head or EVERSTEP_HEAD")
    deploy, secrets = (checkout / "deploy").resolve(), (checkout / ".everstep/compose").resolve()
    needed = [deploy / COMPOSE, *(secrets / name for name in SECRETS)]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise click.UsageError(f"--checkout: {', '.join(missing)} is not there: run make up first")
    told = {"EVERSTEP_HEAD": head, "EVERSTEP_IP": ip or box.rpartition("@")[2]}
    told |= _of_the_stack(checkout, head)
    click.echo(command(box, told, deploy, secrets, image))


def _of_the_stack(checkout: Path, head: str) -> dict[str, str]:
    """What the stack was told that its workers must know: by variables, or compose's .env."""
    written = checkout / ".env"
    lines = written.read_text().splitlines() if written.is_file() else []
    known = {}
    for found in filter(None, map(LINE.fullmatch, lines)):
        name, literal, quoted, bare = found.groups()
        known[name] = os.path.expandvars(quoted or bare or "") if literal is None else literal
    known |= os.environ
    if port := known.get("EVERSTEP_S3_PORT"):
        known.setdefault("AWS_ENDPOINT_URL_S3", f"http://{head}:{port}")
    return {key: known[key] for key in SHARED if known.get(key)}


def command(box: str, told: Mapping[str, str], deploy: Path, secrets: Path, image: str) -> str:
    """One line of shell for the head's box; told: the worker's variables."""
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in told.items())
    there = (
        f"umask 077 && mkdir -p {THERE} && cd {THERE} && tar xf - && chmod 644 ray.token && "
        f"{variables} "
        f"docker compose -f {COMPOSE} up --detach"
    )
    sent = ["tar", "cf", "-", "-C", str(deploy), COMPOSE, "-C", str(secrets), *SECRETS]
    to = shlex.join(["ssh", box])
    return (
        f"docker save {shlex.quote(image)} | {to} docker load && "
        f"{shlex.join(sent)} | {to} {shlex.quote(there)}"
    )
