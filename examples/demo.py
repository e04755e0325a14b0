"""First light: the whole system in one run of about three minutes on two CPU cores.

Starts the embedded service, trains a small model through it, and continues it with other learning
rates and a longer horizon, by the commands that a user would type. Ends what it started.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from everstep import Client
from everstep.cli import plots
from everstep.v1 import everstep_pb2 as pb

STATE = Path(".everstep/demo")
SPEC = "examples/first-light.yaml"
HORIZON = 320
# A third of the first job's rates, and a warm-down to the new horizon.
CHANGES = (
    "optimizer.embedding_lr=0.2",
    "optimizer.unembedding_lr=0.005",
    "optimizer.matrix_lr=0.027",
    "optimizer.scalar_lr=0.33",
    "optimizer.smear_lr=0.007",
    f"schedule.num_iterations={HORIZON}",
    "schedule.warmdown_ratio=0.2",
)
READY_S = 120.0
STOP_S = 120.0
SHOWN_METRICS = (
    "everstep_train_loss{",
    "everstep_validation_bits_per_byte{",
    "everstep_learning_rate{",
    "everstep_tokens_per_second{",
    "everstep_checkpoint_last_committed_timestamp_seconds{",
)
console = Console()


def main() -> int:
    """0 when every step of the demo worked."""
    began = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    say("Starting the service with its own Ray and S3 server (SeaweedFS); about ten seconds")
    with (STATE / "service.log").open("ab") as log:
        service = subprocess.Popen(
            command("serve", "--standalone", "--state", str(STATE)),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        facts = wait_until_ready(service)
        with Client.from_state(STATE) as client:
            tell(client, facts)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        console.print(
            f"[red]The demo failed:[/red] {error}\nThe service's log: {STATE}/service.log"
        )
        return 1
    finally:
        say("Stopping the service: it takes Ray and SeaweedFS down with it; the state stays")
        stop(service)
    say(f"Done in {time.monotonic() - began:.0f} s. Everything lies in {STATE}; to go on by hand:")
    console.print(
        f"  everstep serve --standalone --state {STATE}\n  everstep list", highlight=False
    )
    return 0


def tell(client: Client, facts: dict[str, str]) -> None:
    """The story: plan, train, look, continue, compare."""
    say("What would run? Nothing is spent yet")
    everstep("plan", SPEC)
    say("Training it: through gRPC to the service, by Ray Train to a worker, checkpoints to S3")
    everstep("submit", SPEC, "--wait")
    first = next(iter(client.list()))
    say("Its checkpoints in S3")
    everstep("checkpoints", first.id)
    parent = f"{first.id}@{first.step}"
    changes = [part for change in CHANGES for part in ("--set", change)]
    say(f"Continuing from {parent} with a third of every learning rate, to step {HORIZON}")
    everstep("submit", "--from", parent, *changes, "--wait")
    second = next(iter(client.list()))
    say("What its first step trained with, read back from the optimizer")
    show_in_force(client.get(first.id), client.get(second.id))
    say("Both curves")
    draw(client, [first, second])
    say(f"Prometheus can scrape {facts['metrics_url']}; among others it says")
    show_metrics(facts["metrics_url"])


def show_in_force(first: pb.Job, second: pb.Job) -> None:
    """Each group's rate in force in the first job and in the second; they must differ."""
    old = {values.group: values.learning_rate for values in first.in_force}
    for values in second.in_force:
        was = old[values.group]
        console.print(f"  {values.group:<16} {was:.6g} -> {values.learning_rate:.6g}")
        if values.learning_rate == was:
            raise RuntimeError(f"the new rate of {values.group} did not take effect")


def draw(client: Client, jobs: list[pb.Job]) -> None:
    """Training loss over steps, one curve a job."""
    names, curves = [], []
    for job in jobs:
        points = [r.point for r in client.watch(job.id) if r.HasField("point")]
        curves.append({point.step: point.loss_smoothed for point in points})
        names.append(f"...{job.id[-4:]}: steps {points[0].step} to {points[-1].step}")
    plots.draw(console, "loss, smoothed", names, curves)


def show_metrics(url: str) -> None:
    """A few lines of what a scrape gets."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    for prefix in SHOWN_METRICS:
        found = [line for line in lines if line.startswith(prefix)]
        if not found:
            raise RuntimeError(f"/metrics has no {prefix.rstrip('{')}")
        console.print(f"  {found[-1]}", highlight=False, soft_wrap=True)


def everstep(*words: str) -> None:
    """Run a command as a user would, and show it."""
    console.print(f"$ everstep {shlex.join(words)}", style="bold", highlight=False, soft_wrap=True)
    subprocess.run(command(*words), check=True, env={**os.environ, **address()})


def address() -> dict[str, str]:
    """How the command finds this demo's service."""
    facts = json.loads((STATE / "service.json").read_text())
    token = (STATE / "token").read_text().strip()
    return {"EVERSTEP_ADDRESS": facts["address"], "EVERSTEP_TOKEN": token}


def command(*words: str) -> list[str]:
    """The everstep command beside this Python."""
    return [str(Path(sys.executable).with_name("everstep")), *words]


def wait_until_ready(service: subprocess.Popen[bytes]) -> dict[str, str]:
    """What service.json says once it is there."""
    deadline = time.monotonic() + READY_S
    path = STATE / "service.json"
    path.unlink(missing_ok=True)
    while time.monotonic() < deadline:
        if path.exists():
            facts: dict[str, str] = json.loads(path.read_text())
            console.print(f"  ready at {facts['address']}", highlight=False)
            return facts
        if service.poll() is not None:
            raise RuntimeError(f"the service ended with status {service.returncode}")
        time.sleep(0.1)
    raise RuntimeError(f"the service was not ready after {READY_S:.0f} s")


def stop(service: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would, by its own pid."""
    if service.poll() is None:
        service.send_signal(signal.SIGTERM)
    service.wait(STOP_S)


def say(text: str) -> None:
    """What happens now."""
    console.rule(style="dim")
    console.print(text, style="bold cyan", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
