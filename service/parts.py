"""Processes that the embedded default starts beside the service: found again, supervised, ended.

A part outlives the service that started it, so its pid and start time are on disk. It leads a
session of its own, which every process that it starts belongs to, and they inherit a mark in their
environment (which some overwrite with a title): so `end` finds all that is left of a part, by pid,
never by name.

Invariant: after `end` returns, no process of the part is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

MARK = "EVERSTEP_PART"
ADOPT_S = 8.0
POLL_S = 0.5
BACKOFF_S = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """How a part is started, and when it is ready."""

    arguments: Sequence[str]
    environment: dict[str, str]
    ready: Callable[[], Awaitable[bool]]
    end_grace_s: float  # from the polite end to the hard one: what it takes to save its state


@dataclass(frozen=True)
class Leader:
    """The process that we started: its number, and what tells it from a later one with it."""

    pid: int
    started: float
    booted: float


class PartFailedError(RuntimeError):
    """A part did not start: its log says why."""


class Part:
    """One supervised process tree."""

    def __init__(self, name: str, folder: Path, command: Command) -> None:
        """folder: where pid file and log lie; its path is part of the mark."""
        self.name = name
        self._command = command
        self._pid_file = folder / f"{name}.pid.json"
        self._log = folder / f"{name}.log"
        self._mark = f"{folder.resolve()}:{name}"
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self, timeout_s: float) -> bool:
        """Adopt the part if it runs and is ready, else start it. Whether it was adopted.

        Raises:
            PartFailedError: it ended, or was not ready in time.
        """
        if self.alive() and await self._is_ready(ADOPT_S):
            return True
        await self.end()
        self._launch()
        if not await self._is_ready(timeout_s):
            await self.end()
            raise PartFailedError(
                f"{self.name} did not start within {timeout_s:.0f} s: {self._tail()}"
            )
        return False

    def alive(self) -> bool:
        """Whether the process that we started is still that process."""
        if self._child is not None:
            return self._child.poll() is None
        leader = self._leader()
        return leader is not None and _is(leader)

    async def end(self) -> None:
        """End the part and all it started: politely, then by force."""
        for kill in (False, True):
            found = self._processes()
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill() if kill else process.terminate()
            grace_s = ADOPT_S if kill else self._command.end_grace_s
            deadline = asyncio.get_running_loop().time() + grace_s
            while self._processes() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.05)
            if not self._processes():
                break
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)
            self._child = None
        self._pid_file.unlink(missing_ok=True)

    async def supervise(self, revived: Callable[[], Awaitable[None]]) -> None:
        """Bring the part back when it dies, for ever; revived is called each time it is back."""
        while True:
            await asyncio.sleep(POLL_S)
            if self.alive():
                continue
            log.warning("%s is gone; starting it again", self.name)
            try:
                await self.start(timeout_s=60)
            except PartFailedError as error:
                log.error("%s", error)
                await asyncio.sleep(BACKOFF_S)
                continue
            await revived()

    def _launch(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                self._command.arguments,
                env={**self._command.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in our terminal is for us to pass on
            )
        started = psutil.Process(self._child.pid).create_time()
        leader = Leader(self._child.pid, started, psutil.boot_time())
        self._pid_file.write_text(json.dumps(asdict(leader)))

    async def _is_ready(self, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline and self.alive():
            if await self._command.ready():
                return True
            await asyncio.sleep(0.1)
        return False

    def _processes(self) -> list[psutil.Process]:
        """Every living process of the part: of its session, or with its mark."""
        if self._child is not None:
            self._child.poll()  # reap, or it stays a zombie
        leader = self._leader()
        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and self._owns(process, leader)
        ]

    def _owns(self, process: psutil.Process, leader: Leader | None) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if leader is not None and os.getsid(process.pid) == leader.pid:
                # The number may be another session's by now, if ours ended long ago.
                return process.pid != leader.pid or _is(leader)
            return process.environ().get(MARK) == self._mark
        except (psutil.Error, OSError):
            return False  # gone, or somebody else's

    def _leader(self) -> Leader | None:
        try:
            leader = Leader(**json.loads(self._pid_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        # After a reboot the number says nothing; nor where another process has it now.
        taken = psutil.pid_exists(leader.pid) and not _is(leader)
        return None if leader.booted != psutil.boot_time() or taken else leader

    def _tail(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()[-3:]
        except OSError:
            lines = []
        return " | ".join(lines) or "no output"


def _is(leader: Leader) -> bool:
    """Whether the leader itself is alive."""
    try:
        process = psutil.Process(leader.pid)
        same = process.create_time() == leader.started
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free on loopback now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens there."""
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def plain_environment() -> dict[str, str]:
    """Our environment without what belongs to one process alone."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EVERSTEP_"))}
