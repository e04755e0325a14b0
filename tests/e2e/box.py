"""The commands of docs/box.md, as a test runs them, and a client outside of the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
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


class Box:
    """One clone and its stack."""

    def __init__(self, clone: Path, engine: dict[str, str], data: Path) -> None:
        """data: a folder of the box that jobs may read."""
        self.clone, self.data = clone, data
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {
            **os.environ,
            **engine,
            "COMPOSE_FILE": "docker-compose.yml:docker-compose.cpu.yml",
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
        print(f"\nREADME: {time.monotonic() - began:.0f} s; the image: {self.image_size()}")

    def run(self, *command: str) -> str:
        """A command in the clone; its output."""
        done = subprocess.run(
            command,
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

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
        done = subprocess.run(
            ["make", "up"],
            cwd=self.clone,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        return done.stderr

    def image_size(self) -> str:
        """Of the one image, as the engine counts it."""
        image = self.run("docker", "image", "inspect", "everstep:local", "--format", "{{.Size}}")
        return f"{int(image) / 1e9:.2f} GB"

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
