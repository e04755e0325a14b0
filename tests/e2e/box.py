"""The commands of docs/box.md, as a test runs them, and a client outside of the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from everstep import Client
from everstep.errors import ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from service.parts import free_ports

T = TypeVar("T")
PORTS = ("EVERSTEP_PORT", "EVERSTEP_RAY_PORT", "EVERSTEP_S3_PORT", "PROMETHEUS_PORT")
PROJECT = "everstep-e2e-"  # and the test process's id
PATIENCE_S = 240.0  # a start of Ray and of a job on two busy cores
# A job that takes one CPU and does not end by itself.
JOB: dict[str, Any] = {
    "name": "box",
    "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 64},
    "data": {"source": "builtin:python-docs", "tokenizer": "builtin:python-docs-512"},
    "batch": {"device_batch_size": 4, "total_batch_size": 256},
    "optimizer": {"smear_lr": 0.01},
    "schedule": {"num_iterations": 1_000_000},
    "evaluate": {"every": 100, "tokens": 1024},
    "sample": {"every": 0},
    "checkpoint": {"every_steps": 50, "every_s": 0},
    "resources": {"gpus_per_worker": 0, "cpus_per_worker": 1},
    "precision": {"compute": "fp32"},
}


class Box:
    """One clone and its stack."""

    def __init__(
        self, clone: Path, engine: dict[str, str], data: Path, files: Sequence[str] = ()
    ) -> None:
        """data: a folder of the box that jobs may read. files: on top of the form without a GPU."""
        self.clone, self.data = clone, data
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {
            **os.environ,
            **engine,
            "COMPOSE_FILE": ":".join(("docker-compose.yml", "docker-compose.cpu.yml", *files)),
            "COMPOSE_PROJECT_NAME": f"{PROJECT}{os.getpid()}",
            "COMPOSE_PROFILES": "",  # without Grafana: its image may not be at hand
            "EVERSTEP_MIN_FREE_GB": "8",
            "EVERSTEP_DATA": str(data),
            "EVERSTEP_STATE": ".everstep/compose",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of the client
            **{name: str(port) for name, port in self.ports.items()},
        }

    def follow_readme(self) -> None:
        """What README.md says of a box, to the letter."""
        section = (self.clone / "README.md").read_text().partition("## On a box with Docker\n")[2]
        commands = section.split("```\n")[1]
        assert commands.startswith("make up ")
        began = time.monotonic()
        self.run("bash", "-euc", commands)
        size = int(self.image("{{.Size}}")) / 1e9
        print(f"\nREADME: {time.monotonic() - began:.0f} s; the image: {size:.2f} GB")

    def run(self, *command: str) -> str:
        """A command in the clone; its output."""
        done = self._done(command)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def _done(self, command: Sequence[str], **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.clone,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            check=False,
        )

    def compose(self, *words: str) -> str:
        """`docker compose ...`."""
        return self.run("docker", "compose", *words)

    def kill(self, service: str) -> None:
        """`docker kill`, which the restart policy takes for a wish; then start it again."""
        self.run("docker", "kill", self.compose("ps", "--quiet", service).strip())
        self.compose("up", "--detach", "--wait", "--wait-timeout", str(int(PATIENCE_S)))

    def crash(self, service: str) -> None:
        """End what runs in a container from inside: the restart policy's case."""
        container = self.compose("ps", "--quiet", service).strip()
        code = "import psutil; [child.kill() for child in psutil.Process(1).children()]"
        subprocess.run(
            ["docker", "exec", container, "python", "-c", code], env=self.environment, check=False
        )

    def refusal(self, **changes: str) -> str:
        """What `make up` says when it refuses."""
        done = self._done(["make", "up"], **changes)
        assert done.returncode != 0
        return done.stderr

    def compose_refusal(self, *words: str, **changes: str) -> str:
        """What `docker compose ...` says when it refuses."""
        done = self._done(["docker", "compose", *words], **changes)
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def service_refusal(self, **changes: str) -> str:
        """What the service says when it refuses to start, whoever started it."""
        alone = ("run", "--rm", "--no-deps", "--no-TTY", "service")
        return self.compose_refusal(*alone, **changes)

    def remove(self) -> None:
        """All of it but image and secrets."""
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "1")

    def leftovers(self, *kind: str) -> str:
        """Ids of what the engine still has of this stack: ("ps", "--all"), ("volume", "ls"), ..."""
        label = f"label=com.docker.compose.project={self.environment['COMPOSE_PROJECT_NAME']}"
        return self.run("docker", *kind, "--quiet", "--filter", label)

    def image(self, fact: str) -> str:
        """What the engine says of the one image, in its own templates."""
        return self.run("docker", "image", "inspect", "everstep:local", "--format", fact).strip()

    def restarts(self, service: str) -> int:
        """How often the engine itself started a container again."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        return int(self.run("docker", "inspect", "--format", "{{.RestartCount}}", container))

    def gateway(self) -> str:
        """This box's own address in the network of containers that are none of the stack's."""
        config = "{{(index .IPAM.Config 0).Gateway}}"
        return self.run("docker", "network", "inspect", "bridge", "--format", config).strip()

    def from_elsewhere(self, told: dict[str, str], *words: str) -> str:
        """What the client says in such a container, by environment variables alone."""
        told = {**told, "EVERSTEP_ADDRESS": f"{self.gateway()}:{self.ports['EVERSTEP_PORT']}"}
        variables = [word for pair in told.items() for word in ("--env", "=".join(pair))]
        certificates = f"{self.clone}/.everstep/compose/tls:/tls:ro"
        started = ["docker", "run", "--rm", "--volume", certificates, *variables, "everstep:local"]
        done = self._done([*started, "everstep", *words])
        return done.stdout + done.stderr

    def client(self) -> Client:
        """From outside, by what `make up` left for clients."""
        return Client.from_state(self.clone / ".everstep/compose")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What the stack's Prometheus answers."""
        words = urllib.parse.urlencode({"query": expression})
        answer = self._prometheus(f"query?{words}")
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The alerts that its Prometheus evaluates."""
        groups = self._prometheus("rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _prometheus(self, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}/api/v1/{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def wait_until(condition: Callable[[], T | None], what: str) -> T:
    """Poll until the condition gives something true; a service that is away is waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except ServiceUnreachableError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain for {what}")


def wait_for_checkpoint(client: Client, job_id: str, step: int) -> pb.Job:
    """Wait until a job has a committed checkpoint after a step."""

    def reached() -> pb.Job | None:
        job = client.get(job_id)
        assert job.state != pb.JOB_STATE_FAILED, job.reason
        return job if job.HasField("checkpoint") and job.checkpoint.step > step else None

    began = time.monotonic()
    job = wait_until(reached, f"a checkpoint after step {step} of {job_id}")
    print(f"checkpoint at step {job.checkpoint.step} after {time.monotonic() - began:.0f} s")
    return job


def newest_attempt(job: pb.Job) -> pb.Attempt:
    return max(job.attempts, key=lambda attempt: attempt.number)


def goes_on(box: Box, job_id: str, before: pb.Job) -> None:
    """No step was lost over a stop: the job goes on from a checkpoint that the stop took."""
    with box.client() as client:
        stopped = wait_until(lambda: client.get(job_id), "the service")
        assert stopped.checkpoint.step >= before.step, "the stop's own checkpoint was committed"
        after = wait_for_checkpoint(client, job_id, stopped.checkpoint.step)
    assert len(after.attempts) > len(before.attempts)
    assert newest_attempt(after).start_step == stopped.checkpoint.step
