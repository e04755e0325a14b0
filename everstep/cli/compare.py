"""`everstep compare`: jobs side by side, their curves drawn and in figures.

Owns the layout. Works nothing out but which steps are shown.
"""

from __future__ import annotations

import click
from rich.table import Table

from everstep.cli import output, plots
from everstep.cli.options import json_option
from everstep.client import Client
from everstep.v1 import everstep_pb2 as pb

SHOWN_STEPS = 20


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB JOB...")
@json_option
def compare(jobs: tuple[str, ...], **given: str) -> None:
    """Compare jobs: specs, values in force, loss and validation on common steps, tokens, time."""
    with Client() as client:
        found = client.compare(jobs)
    if given["output"] == "json":
        output.write_json(found)
    else:
        _show(found)


def _show(found: pb.CompareJobsResponse) -> None:
    heads = [f"{curve.name} ..{curve.job_id[-6:]}" for curve in found.curves]
    facts = output.table("", *map(output.one_line, heads), whole=())
    for item in found.differences:
        facts.add_row(item.field, *item.values)
    for name in ("start_step", "end_step", "tokens"):
        facts.add_row(name, *(f"{getattr(curve, name):,}" for curve in found.curves))
    facts.add_row("training time", *(output.duration(curve.train_s) for curve in found.curves))
    rates = [{row.group: row.learning_rate for row in curve.in_force} for curve in found.curves]
    for group in dict.fromkeys(name for each in rates for name in each):
        cells = (output.rate(each[group]) if group in each else "-" for each in rates)
        facts.add_row(f"first rate: {group}", *cells)
    console = output.console()
    console.print(facts)
    losses = [dict(zip(each.loss_steps, each.loss, strict=True)) for each in found.curves]
    plots.draw(console, "loss, smoothed", heads, losses)
    console.print(_curves("loss at step", heads, losses))
    if found.validation_refused:
        output.note(f"not compared: {found.validation_refused}")
        return
    figures = [dict(zip(each.steps, each.validation_bpb, strict=True)) for each in found.curves]
    plots.draw(console, "bits/byte", heads, _on_common_steps(figures))
    console.print(_curves("bits/byte at step", heads, figures))


def _curves(what: str, heads: list[str], curves: list[dict[int, float]]) -> Table:
    """A line a step, of common steps where there are any; a star marks the lowest figure."""
    curves = _on_common_steps(curves)
    steps = sorted(set().union(*curves))
    every = max(-(-len(steps) // SHOWN_STEPS), 1)
    table = output.table(what, *map(output.one_line, heads), whole=())
    for step in steps[::-1][::every][::-1]:
        low = min(curve[step] for curve in curves if step in curve)
        cells = (
            f"{curve[step]:.4f}{' *' * (curve[step] == low)}" if step in curve else ""
            for curve in curves
        )
        table.add_row(f"{step:,}", *cells)
    return table


def _on_common_steps(curves: list[dict[int, float]]) -> list[dict[int, float]]:
    """The curves on the steps that all have; as they are where they have none in common."""
    common = set.intersection(*(set(curve) for curve in curves))
    return [{step: curve[step] for step in sorted(common or curve)} for curve in curves]


COMMANDS = (compare,)
