"""Real servers for tests, each in a folder of its own, on free ports of 127.0.0.1.

A server is ended by its own process object, never by name. Nothing is read from the environment
but PATH; what a client needs is in the value that the context manager yields.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_S = 30.0  # a loaded machine; usually half a second
KEYS = {"AWS_ACCESS_KEY_ID": "everstep", "AWS_SECRET_ACCESS_KEY": "everstep-test-secret"}
TRIES = 3  # another process may take a port between our choice and the server's bind


@dataclass
class S3Server:
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
def seaweedfs(folder: Path, bucket: str = "everstep") -> Iterator[S3Server]:
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


@contextlib.contextmanager
def moto(folder: Path, bucket: str = "everstep") -> Iterator[S3Server]:
    """moto's S3 server with one bucket, in memory."""
    port = free_ports(1)[0]
    command = [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder, port, bucket) as server:
        client = _client(server)
        with contextlib.closing(client):
            client.create_bucket(Bucket=bucket)
        yield server


@contextlib.contextmanager
def rclone(folder: Path, bucket: str = "everstep") -> Iterator[S3Server]:
    """rclone's S3 server over a folder: a bucket is a folder in it."""
    (folder / "data" / bucket).mkdir(parents=True)
    port = free_ports(1)[0]
    command = [_program("rclone"), "serve", "s3", str(folder / "data")]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", ",".join(KEYS.values())]
    with _running(command, folder, port, bucket) as server:
        yield server


@contextlib.contextmanager
def _running(command: list[str], folder: Path, port: int, bucket: str) -> Iterator[S3Server]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder)},
        )
    try:
        deadline = time.monotonic() + START_S
        while not _accepts(port):
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, f"{command[0]} did not start"
            time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", bucket, *KEYS.values(), process, [port])
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _program(name: str) -> str:
    return shutil.which(name) or str(Path(sys.executable).with_name(name))


def _launch(folder: Path, bucket: str) -> S3Server:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("s3", "master", "volume", "filer", "admin")
    ports = free_ports(2 * len(names))
    flags = []
    for name, http, grpc in zip(names, ports[::2], ports[1::2], strict=True):
        flags += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    command = [
        _program("weed"),
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
    with (folder / "weed.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder), **KEYS},
        )
    endpoint = f"http://127.0.0.1:{ports[0]}"
    return S3Server(endpoint, bucket, *KEYS.values(), process, ports)


def _ready(server: S3Server) -> bool:
    """Wait until the bucket is there."""
    client = _client(server)
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


def _client(server: S3Server) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=2, retries={"total_max_attempts": 1}),
    )


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Prometheus that scrapes a target as the stack's does; yields what answers a query.

    A query that can't be answered yet has no result.
    """
    port = free_ports(1)[0]
    config = folder / "prometheus.yml"
    scraped = {"job_name": "everstep", "static_configs": [{"targets": [target]}]}
    often = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config.write_text(json.dumps({"global": often, "scrape_configs": [scraped]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )

    def ask(query: str) -> list[dict[str, Any]]:
        words = urllib.parse.urlencode({"query": query})
        url = f"http://127.0.0.1:{port}/api/v1/query?{words}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except OSError:
            return []

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(START_S)
