"""Real servers for tests, each in a folder of its own, on free ports of 127.0.0.1.

A server is ended by its own process object, never by name. Nothing is read from the environment
but PATH; what a client needs is in the value that the context manager yields.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_S = 30.0  # a loaded machine; usually half a second
TRIES = 3  # another process may take a port between our choice and the server's bind


@dataclass
class SeaweedFS:
    """A running S3 server, and how to reach it."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]
    ports: list[int]

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables that boto3 reads."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def seaweedfs(folder: Path, bucket: str = "everstep") -> Iterator[SeaweedFS]:
    """SeaweedFS with one bucket, its data and log in folder; killed at the end."""
    for last_try in (False,) * (TRIES - 1) + (True,):
        server = _launch(folder, bucket)
        try:
            if _ready(server):
                yield server
                return
        finally:
            server.process.kill()  # its data is thrown away; a graceful stop takes seconds
            server.process.wait()
            for port in server.ports:  # it makes its sockets in /tmp whatever it is told
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)
        if last_try:
            raise RuntimeError(f"SeaweedFS did not start; see {folder}/weed.log")


def _launch(folder: Path, bucket: str) -> SeaweedFS:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("s3", "master", "volume", "filer", "admin")
    ports = free_ports(2 * len(names))
    flags = []
    for name, http, grpc in zip(names, ports[::2], ports[1::2], strict=True):
        flags += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    command = [
        shutil.which("weed") or str(Path(sys.executable).with_name("weed")),
        "mini",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder}",
        f"-bucket={bucket}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        *flags,
    ]
    keys = {"AWS_ACCESS_KEY_ID": "everstep", "AWS_SECRET_ACCESS_KEY": "everstep-test-secret"}
    with (folder / "weed.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder), **keys},
        )
    endpoint = f"http://127.0.0.1:{ports[0]}"
    return SeaweedFS(endpoint, bucket, *keys.values(), process, ports)


def _ready(server: SeaweedFS) -> bool:
    """Wait until the bucket is there."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=2, retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + START_S
    with contextlib.closing(client):
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                client.head_bucket(Bucket=server.bucket)
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
            else:
                return True
    return False
