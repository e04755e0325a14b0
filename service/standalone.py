"""The embedded default: Ray and SeaweedFS beside the service, no Docker, no account.

All state is in one folder; ports and keys are chosen once and kept there, since hosts on Ray live
longer than the service and go on using them. Sockets and Ray's session files are scratch and lie in
a short path of their own, since the names of sockets are bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import BaseModel

from service.parts import Command, Part, accepts, free_ports, plain_environment

BUCKET = "everstep"
# Ray rewrites 127.0.0.1 to the machine's own address; its other loopback addresses it leaves.
RAY_IP = "127.0.0.2"
RAY_GCS_PORTS = range(20_000, 30_000)  # outside those that Ray gives to workers
OBJECT_STORE_BYTES = 128 << 20  # checkpoints and data don't go through it
SEAWEEDFS_PARTS = ("s3", "master", "volume", "filer", "admin")
START_S = 60.0
SEAWEEDFS_END_S = 10.0  # flushes its volumes
# A box whose Ray is gone refuses at once and is missed after 3 s, else after 15 or more. One that
# is only silent keeps Ray's own 10 s for each answer. As in the Dockerfile.
NODE_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
RAY_END_S = 2.0  # has nothing to save: jobs are stopped by then


class Wiring(BaseModel):
    """Ports and secrets, made once for a state folder."""

    grpc_port: int
    metrics_port: int
    seaweedfs: dict[str, tuple[int, int]]  # part to its HTTP and gRPC port
    ray_gcs_port: int
    ray_dashboard_port: int
    ray_client_port: int
    s3_access_key: str
    s3_secret_key: str
    admin_token: str
    secret: str
    ray_token: str

    @classmethod
    def load(cls, path: Path) -> Wiring:
        """Read it, or make it."""
        if path.exists():
            return cls.model_validate_json(path.read_text())
        ports = free_ports(2 * len(SEAWEEDFS_PARTS) + 4)
        pairs = zip(ports[:-4:2], ports[1:-4:2], strict=True)
        wiring = cls(
            grpc_port=ports[-1],
            metrics_port=ports[-2],
            seaweedfs=dict(zip(SEAWEEDFS_PARTS, pairs, strict=True)),
            ray_gcs_port=_gcs_port(),
            ray_dashboard_port=ports[-3],
            ray_client_port=ports[-4],
            s3_access_key=secrets.token_hex(8),
            s3_secret_key=secrets.token_hex(24),
            admin_token=secrets.token_urlsafe(32),
            secret=secrets.token_hex(32),
            ray_token=secrets.token_hex(32),
        )
        write_secret(path, wiring.model_dump_json())
        return wiring

    @property
    def s3_endpoint(self) -> str:
        """Where SeaweedFS answers."""
        return f"http://127.0.0.1:{self.seaweedfs['s3'][0]}"

    @property
    def s3_environment(self) -> dict[str, str]:
        """The standard variables, for us and for workers."""
        return {
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Standalone:
    """Ray and SeaweedFS of one state folder."""

    def __init__(self, state: Path, cpus: int | None = None, gpus: int | None = None) -> None:
        """cpus, gpus: what Ray is told of; None: what it finds."""
        self._state = state.resolve()
        self._folder = self._state / "parts"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.wiring = Wiring.load(self._folder / "wiring.json")
        token = self._folder / "ray.token"
        write_secret(token, self.wiring.ray_token)
        self.ray_environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            **NODE_CHECKS,
        }
        digest = hashlib.sha256(str(self._state).encode()).hexdigest()[:8]
        self._scratch = Path(tempfile.gettempdir()) / f"everstep-{digest}"
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self._seaweedfs = Part("seaweedfs", self._folder, self._seaweedfs_command())
        self._ray = Part("ray", self._folder, self._ray_command(cpus, gpus))

    @property
    def ray_address(self) -> str:
        """Ray's GCS."""
        return f"{RAY_IP}:{self.wiring.ray_gcs_port}"

    async def start(self, say: Callable[[str], None]) -> bool:
        """Start both, or find them running; whether Ray was found, with jobs perhaps at work.

        Raises:
            PartFailedError: one won't start; neither is left running then, unless it was found.
        """
        say("starting SeaweedFS (S3) and Ray")
        found = await asyncio.gather(
            self._seaweedfs.start(START_S), self._ray.start(START_S), return_exceptions=True
        )
        for outcome in found:
            if isinstance(outcome, BaseException):
                raise outcome
        if all(found):
            say("found both running: jobs were not disturbed")
        return bool(found[1])

    async def supervise(self, ray_revived: Callable[[], Awaitable[None]]) -> None:
        """Bring back what dies, for ever."""

        async def nothing() -> None:
            return None

        await asyncio.gather(self._seaweedfs.supervise(nothing), self._ray.supervise(ray_revived))

    async def end(self) -> None:
        """End both; the state stays."""
        await asyncio.gather(self._ray.end(), self._seaweedfs.end())
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _seaweedfs_command(self) -> Command:
        folder = self._state / "seaweedfs"
        folder.mkdir(exist_ok=True)
        ports = [
            flag
            for name, (http, grpc) in self.wiring.seaweedfs.items()
            for flag in (f"-{name}.port={http}", f"-{name}.port.grpc={grpc}")
        ]
        arguments = [
            _program("weed"),
            "mini",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={folder}",
            f"-bucket={BUCKET}",
            f"-s3.localSocket={self._scratch}/s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            *ports,
        ]
        port = self.wiring.seaweedfs["s3"][0]
        keys = {k: v for k, v in self.wiring.s3_environment.items() if "KEY" in k}
        environment = {**plain_environment(), **keys, "TMPDIR": str(self._scratch)}
        return Command(arguments, environment, lambda: accepts(port), SEAWEEDFS_END_S)

    def _ray_command(self, cpus: int | None, gpus: int | None) -> Command:
        arguments = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--node-ip-address={RAY_IP}",
            f"--port={self.wiring.ray_gcs_port}",
            f"--num-cpus={cpus or os.cpu_count() or 1}",
            *([f"--num-gpus={gpus}"] if gpus is not None else []),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--include-dashboard=true",  # with it off, a killed host holds its GPUs for a minute
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.wiring.ray_dashboard_port}",
            "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={self.wiring.ray_client_port}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--temp-dir={self._scratch}/ray",
            "--disable-usage-stats",
        ]
        environment = {
            **plain_environment(),
            **self.wiring.s3_environment,
            **self.ray_environment,
            "TMPDIR": str(self._scratch),  # what killed processes leave goes with it
        }
        dashboard = self.wiring.ray_dashboard_port

        async def ready() -> bool:
            return await accepts(self.wiring.ray_gcs_port, RAY_IP) and await accepts(dashboard)

        return Command(arguments, environment, ready, RAY_END_S)


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def write_service_file(path: Path, facts: dict[str, object]) -> None:
    """What a client on this machine needs to find the service."""
    write_secret(path, json.dumps(facts, indent=1) + "\n")


def _gcs_port() -> int:
    """A free port that Ray won't give to a worker."""
    while True:
        port = random.choice(RAY_GCS_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((RAY_IP, port))
            except OSError:
                continue
            return port


def _program(name: str) -> str:
    """A program that a dependency installed beside our Python, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name
