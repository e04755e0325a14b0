"""`everstep token create`, `list`, `revoke`: who may talk to the service, and how far."""

from __future__ import annotations

from typing import cast

import click
from rich.table import Table

from everstep.cli import output as shown
from everstep.cli.options import json_option
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb

ROLES = [name.removeprefix("ROLE_").lower() for name in pb.Role.keys()[1:]]  # but UNSPECIFIED


@click.group()
def token() -> None:
    """Make, list and revoke bearer tokens (needs one of role admin)."""


@token.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    required=True,
    help="read: look at everything; submit: also run jobs; admin: also delete, and make tokens.",
)
@json_option
def create(name: str, role: str, output: str) -> None:
    """Make a token for NAME, by which events will call its holder.

    Its secret, for EVERSTEP_TOKEN, is printed on stdout, this once.
    """
    with Client() as client:
        number = cast("pb.Role", pb.Role.Value(f"ROLE_{role.upper()}"))
        made = client.create_token(name, number)
    if output == "json":
        shown.write_json(made)
    else:
        shown.note(f"token {made.token.name} of role {role}; it is not shown again:")
        click.echo(made.secret)


@token.command("list")
@json_option
def list_(output: str) -> None:
    """List tokens, oldest first, without their secrets."""
    with Client() as client:
        found = client.tokens()
    if output == "json":
        shown.write_json(found, "tokens")
        return
    table = Table("token", "name", "role", "made", "revoked", box=None)
    for each in found:
        revoked = shown.local_time(each.revoke_time) if each.HasField("revoke_time") else ""
        made = shown.local_time(each.create_time)
        role = pb.Role.Name(each.role).removeprefix("ROLE_").lower()
        table.add_row(each.id, shown.one_line(each.name), role, made, revoked)
    shown.console().print(table)


@token.command()
@click.argument("name")
@json_option
def revoke(name: str, output: str) -> None:
    """Take the token called NAME (or with this id) out of use."""
    with Client() as client:
        found = client.revoke_token(name)
    if output == "json":
        shown.write_json(found)
    else:
        click.echo(f"token {found.name} is revoked")


COMMANDS = (token,)
