"""`everstep cluster`: the machines, who holds what, what is free, and why jobs wait."""

from __future__ import annotations

import time

import click
from rich.console import Console
from rich.text import Text

from everstep.cli import output as shown
from everstep.cli.join import join
from everstep.cli.options import json_option
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb

SILENT_S = 10.0  # Ray is asked every second


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def cluster(context: click.Context, output: str) -> None:
    """Show the machines: GPUs, CPUs, what is free, who holds what, and why jobs wait."""
    if context.invoked_subcommand is not None:
        return
    with Client() as client:
        found = client.cluster()
    if output == "json":
        shown.write_json(found)
    else:
        show_cluster(shown.console(), found)


def show_cluster(console: Console, found: pb.GetClusterResponse) -> None:
    """A table of nodes, one of their GPUs as far as jobs tell of them, and one of who waits."""
    nodes = shown.table("node", "address", "GPUs free", "type", "CPUs free", "held by")
    gpus = shown.table("node", "GPU", "", "memory", "use", "temperature", "power")
    for node in found.nodes:
        held = [f"{share.job_id} ({share.workers} x)" for share in node.shares]
        if node.unused_because:
            held.append(f"unused: {node.unused_because}")
        nodes.add_row(
            node.id[:12],
            node.address,
            f"{node.gpus_free} of {node.gpus}",
            shown.one_line(node.gpu_type),
            f"{node.cpus_free} of {node.cpus}",
            Text(shown.one_line(", ".join(held)), overflow="fold"),
        )
        for device in node.devices:
            gpus.add_row(
                node.address, str(device.index), shown.one_line(device.name), *_gpu(device)
            )
    silent_s = time.time() - shown.seconds(found.seen_time)
    if silent_s > SILENT_S:
        shown.note(f"Ray has not answered for {shown.duration(silent_s)}; this is what was there")
    console.print(nodes if found.nodes else Text("no node has anything to give"))
    if gpus.row_count:
        console.print(Text("\nGPUs, as jobs on them tell", style="bold"))
        console.print(gpus)
    if found.waiting:
        waiting = shown.table("waiting", "name", "because")
        for job in found.waiting:
            because = Text(shown.one_line(job.reason), overflow="fold")
            waiting.add_row(job.job_id, shown.one_line(job.job_name), because)
        console.print()
        console.print(waiting)


def _gpu(device: pb.DeviceSample) -> list[str]:
    """What the card says; what it doesn't stays empty."""
    said = device.HasField
    return [
        f"{shown.size(device.memory_used_bytes)} of {shown.size(device.memory_total_bytes)}",
        f"{device.utilization_ratio:.0%}" if said("utilization_ratio") else "",
        f"{device.temperature_celsius:.0f} C" if said("temperature_celsius") else "",
        f"{device.power_watts:.0f} W" if said("power_watts") else "",
    ]


@cluster.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let jobs onto it again.")
@json_option
def drain(node: str, undo: bool, output: str) -> None:
    """Move all jobs off NODE (its address, or the beginning of its id), and put nothing there.

    Waits until the last has left, each with a checkpoint. Needs a token of role admin.
    """
    with Client() as client:
        moved = client.drain(node, undo)
    if output == "json":
        shown.write_json(pb.DrainNodeResponse(job_ids=moved))
    elif undo:
        click.echo(f"jobs may be on {node} again")
    else:
        click.echo(f"{node} is empty; left it: {', '.join(moved) or 'nobody was there'}")


cluster.add_command(join)

COMMANDS = (cluster,)
