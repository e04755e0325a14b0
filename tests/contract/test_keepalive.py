"""A silent watch over a real connection: kept alive by pings, and missed when the peer is gone.

Between client and server is a proxy of its own processes, one a connection: stopped (SIGSTOP) it
sends nothing any more, no FIN either, while the kernel goes on to acknowledge what it is sent. A
firewall that forgot a connection looks the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep import Client, connection
from everstep.v1 import everstep_pb2 as pb
from service import server
from service.jobs import Desired
from tests.fakes.api import ADMIN, served

PING_MS, ANSWER_MS = 500, 1500
SILENT_PINGS = 6
PING_BYTES = "17"  # of HTTP/2's frame, which carries nothing else
GONE_S = 10.0
WAIT_S = 30.0
PROXY = """
import os, select, signal, socket, sys
host, port = sys.argv[1].split(":")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
while True:
    near, _ = listener.accept()
    if os.fork():
        near.close()
        continue
    listener.close()
    print("serves", os.getpid(), flush=True)
    far = socket.create_connection((host, int(port)))
    while True:
        for ready in select.select([near, far], [], [])[0]:
            data = ready.recv(65536)
            if not data:
                os._exit(0)
            (far if ready is near else near).sendall(data)
            print("up" if ready is near else "down", len(data), flush=True)
"""


class Proxy:
    """lines: what it did so far: the processes that serve connections, and the bytes each way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._out = process.stdout
        self.lines: list[list[str]] = []
        self.address = f"127.0.0.1:{self.read()[1]}"

    def read(self) -> list[str]:
        self.lines.append(self._out.readline().split())
        return self.lines[-1]

    def serves(self) -> list[int]:
        return [int(pid) for word, pid in self.lines if word == "serves"]

    async def follow(self) -> None:
        while await asyncio.to_thread(self.read):
            pass


@contextlib.contextmanager
def proxy(address: str) -> Iterator[Proxy]:
    with subprocess.Popen(
        [sys.executable, "-c", PROXY, address], stdout=subprocess.PIPE, text=True
    ) as process:
        made = Proxy(process)
        try:
            yield made
        finally:
            for pid in made.serves():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()


async def until(condition: Callable[[], object], what: str) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < WAIT_S, what
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_silent_watch_is_kept_alive_and_goes_on_when_its_connection_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEPALIVE_MS", (PING_MS, ANSWER_MS))
    quick = {"grpc.keepalive_time_ms": PING_MS, "grpc.http2.ping_timeout_ms": ANSWER_MS}
    monkeypatch.setattr(server, "OPTIONS", [*{**dict(server.OPTIONS), **quick}.items()])
    seen: list[pb.WatchJobResponse] = []
    async with served(tmp_path) as api:
        job_id = (await api.submit()).job.id
        with proxy(api.address) as between, Client(between.address, ADMIN) as client:

            def watch() -> None:
                for record in client.watch(job_id):
                    seen.append(record)

            def pings() -> int:
                return between.lines.count(["up", PING_BYTES])

            watching = asyncio.create_task(asyncio.to_thread(watch))
            following = asyncio.create_task(between.follow())
            await until(lambda: seen, "the first record")
            before = pings()
            await until(lambda: pings() >= before + SILENT_PINGS, "pings through a silent watch")
            assert (len(seen), len(between.serves())) == (1, 1), "nothing else was said"

            os.kill(between.serves()[0], signal.SIGSTOP)
            await api.call("UpdateJob", pb.UpdateJobRequest(job_id=job_id, priority=3))
            took_s = await until(lambda: len(seen) == 2, "what happened meanwhile")
            assert seen[1].event.message == "change priority from 0 to 3"
            assert len(between.serves()) == 2, "by another connection"
            assert took_s < GONE_S
            await until(lambda: api.gate._open[None] == 1, "the server lets go of the dead watch")

            await api.plane.want(job_id, Desired.CANCELLED)
            await api.plane.tick()
            await asyncio.wait_for(watching, WAIT_S)
        await asyncio.wait_for(following, WAIT_S)
    assert [record.cursor for record in seen] == list(range(1, len(seen) + 1))
