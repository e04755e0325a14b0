"""A cluster without Ray: hosts that do what a test says, and faults that it scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from service.errors import ClusterAwayError
from service.placement import Node
from service.ray_cluster import HostStatus
from trainer.contract.outcome import AttemptResult

HostKey = tuple[str, int]  # job id and host number


def machine(number: int, gpus: int = 0, cpus: int = 0, **facts: Any) -> Node:
    """A node of a test's own making."""
    return Node(f"node{number}", f"10.0.0.{number}", gpus, cpus, **facts)


@dataclass
class Fault:
    """Raised by the next call of a method, before or after it took effect; then it is gone."""

    method: str
    error: BaseException
    after: bool = False
    fired: bool = False


@dataclass
class FakeRayCluster:
    """The methods of service.ray_cluster.RayCluster over a dict of hosts."""

    machines: list[Node] = field(default_factory=lambda: [machine(1, cpus=4)])
    away: bool = False
    known: dict[HostKey, HostStatus] = field(default_factory=dict)
    started: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[HostKey] = field(default_factory=list)
    killed: list[HostKey] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    async def nodes(self) -> list[Node]:
        return self._call("nodes", lambda: list(self.machines))

    async def start_host(self, config: dict[str, Any]) -> None:
        key = (config["job_id"], config["host_number"])

        def start() -> None:
            self.started.append(config)
            self.known.setdefault(key, HostStatus(*key, answered=True))

        self._call("start_host", start)

    async def hosts(self) -> list[HostStatus]:
        return self._call("hosts", lambda: list(self.known.values()))

    async def stop_host(self, job_id: str, host_number: int) -> None:
        self._call("stop_host", lambda: self.stopped.append((job_id, host_number)))

    async def kill_host(self, job_id: str, host_number: int) -> None:
        def kill() -> None:
            self.killed.append((job_id, host_number))
            self.known.pop((job_id, host_number), None)

        self._call("kill_host", kill)

    async def close(self) -> None:
        """Hosts live on."""

    def ends(self, key: HostKey, *results: AttemptResult, budget_spent: bool = False) -> None:
        """The host's attempts so far ended like this, and it starts no other."""
        self.says(key, *results, finished=True)
        self.known[key] = replace(self.known[key], budget_spent=budget_spent)

    def says(self, key: HostKey, *results: AttemptResult, finished: bool = False) -> None:
        """The host's attempts so far ended like this."""
        plain = tuple({**r.to_dict(), "outcome": r.outcome.value} for r in results)
        self.known[key] = replace(self.known[key], finished=finished, results=plain)

    def lose(self, key: HostKey) -> None:
        """The host dies."""
        del self.known[key]

    def script(self, method: str, error: BaseException, after: bool = False) -> Fault:
        """Let the next call of a method fail."""
        self.faults.append(Fault(method, error, after))
        return self.faults[-1]

    def _call(self, method: str, effect: Callable[[], Any]) -> Any:
        if self.away:
            raise ClusterAwayError("scripted: Ray does not answer")
        fault = next((f for f in self.faults if f.method == method and not f.fired), None)
        if fault is not None and not fault.after:
            fault.fired = True
            raise fault.error
        result = effect()
        if fault is not None:
            fault.fired = True
            raise fault.error
        return result
