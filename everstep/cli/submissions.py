"""`everstep plan` and `everstep submit`: a spec goes in, a plan or a job comes out.

Owns what is said before a job exists. Knows nothing of how specs are read or plans are drawn.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click
from google.protobuf.json_format import ParseDict

from everstep.cli.options import Asked, asked, json_option, spec_options
from everstep.cli.output import console, note, write_json
from everstep.cli.plan_view import show_plan
from everstep.cli.programs import command
from everstep.cli.watch import follow
from everstep.client import Client
from everstep.errors import EverstepError, FieldViolation, InvalidSpecError
from everstep.nanochat_flags import VOCAB_SIZE
from everstep.plans import plan_to_proto
from everstep.specs import spec_message
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.devices import find_device
from trainer.contract.plan import Surroundings, make_plan
from trainer.contract.spec import JobSpec

REFUSED = 4


@click.command()
@spec_options
@click.option("--device", default="", metavar="GPU", help="Plan for this GPU, such as 'RTX 4070'.")
@click.option("--offline", is_flag=True, help="Without a service.")
@json_option
def plan(output: str, device: str, offline: bool, **given: Any) -> int:
    """Show what SPEC would run, without running it.

    Parameters, FLOPs, batches, memory, time, and every group's learning rate; for a continuation
    beside the rates in force at its start. Exits with 4 where submit would refuse.

    With --offline no service is asked: fresh weights need nothing, nanochat's checkpoint its
    folder, and JOB@STEP the bucket that EVERSTEP_STORAGE names.
    """
    wanted = _asked(given)
    if offline:
        made = _offline(wanted, device)
    else:
        with Client() as client:
            made = client.plan(wanted.spec, wanted.inherit, device)
    if output == "json":
        write_json(made)
    else:
        show_plan(console(), made)
    return REFUSED if made.refusals else 0


@click.command()
@spec_options
@click.option("--wait", is_flag=True, help="Watch the job to its end; exit 1 unless it succeeds.")
@click.option("--request-id", help="Makes it safe to repeat: the same id, the same job.")
@json_option
def submit(wait: bool, request_id: str | None, output: str, **given: Any) -> int:
    """Queue a job that trains SPEC, and print its id."""
    wanted = _asked(given)
    with Client() as client:
        made = client.submit(wanted.spec, request_id, wanted.inherit)
        if output == "text":
            _show(made.plan if made.HasField("plan") else None, made.job.id)
        status = 0
        if wait:
            status = follow(client, made.job.id, output="text" if output == "text" else "none")
            made.job.CopyFrom(client.get(made.job.id))
        if output == "json":
            write_json(made)
    return status


def _offline(wanted: Asked, device: str) -> pb.Plan:
    start = wanted.spec.get("start")
    if wanted.inherit or (isinstance(start, dict) and start.get("from")):
        return _offline_continuation(wanted, device)
    spec = JobSpec.parse(wanted.spec)
    if spec.model.vocab_size is None:
        note(f"vocabulary taken for {VOCAB_SIZE:,}; --set model.vocab_size=... says another")
    where = Surroundings(find_device(device)) if device else None
    return plan_to_proto(make_plan(spec, spec.model.vocab_size or VOCAB_SIZE, where=where))


def _offline_continuation(wanted: Asked, device: str) -> pb.Plan:
    """The part that reads storage is a program of the service's, which must be installed here."""
    spec_message(wanted.spec, wanted.inherit)  # refused as with a service, before it is started
    asked = {"spec": wanted.spec, "inherit": wanted.inherit, "device": device}
    done = subprocess.run(
        command("service.offline"),
        input=json.dumps(asked) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EverstepError("planning without a service failed; what it said is above")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise EverstepError(answer["error"])
    if "violations" in answer:
        raise InvalidSpecError([FieldViolation(*each) for each in answer["violations"]])
    return ParseDict(answer["plan"], pb.Plan())


def _asked(given: dict[str, Any]) -> Asked:
    wanted = asked(**given)
    for line in wanted.notes:
        note(line)
    return wanted


def _show(made: Any, job_id: str) -> None:
    if made is None:
        note("submitted before with this request id")
    else:
        show_plan(console(), made, compact=True)
    click.echo(job_id)


COMMANDS = (plan, submit)
