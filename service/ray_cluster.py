"""The only module of the service that knows Ray.

Ray runs in a child process, the agent: a Ray driver ends its own process when its cluster has been
gone for long, takes about 150 MB, and blocks; the service can afford none of that. The agent
answers one JSON line with another and holds no state, so it may be killed and started at any time.

Invariant: every call returns or raises ClusterAwayError within its timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from service.errors import ClusterAwayError
from service.placement import Node

NAMESPACE = "everstep"
HOST_PREFIX = "host-"
HOST_NAME = re.compile(rf"{HOST_PREFIX}([0-9A-Za-z]+)-(\d+)")
CALL_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 30.0  # importing Ray and connecting on a busy machine
STATUS_TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostStatus:
    """What an AttemptHost says of itself; absent where it didn't answer in time."""

    job_id: str
    host_number: int
    answered: bool
    finished: bool = False
    results: tuple[dict[str, Any], ...] = ()
    budget_spent: bool = False  # why it is finished


class RayCluster:
    """The service's side: calls the agent, restarts it when it is stuck or dead."""

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        """address: of Ray's GCS. environment: what the agent needs on top of ours."""
        self._address = address
        self._environment = environment
        self._agent: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def nodes(self) -> list[Node]:
        """Every machine that the cluster knows, those that are gone too."""
        return [Node(**node) for node in await self._call("nodes")]

    async def start_host(self, config: dict[str, Any]) -> None:
        """Start the host of a job; one that exists already under its name is left alone."""
        await self._call("start_host", config=config)

    async def hosts(self) -> list[HostStatus]:
        """Every host that the cluster knows."""
        found = await self._call("hosts")
        return [HostStatus(**{**host, "results": tuple(host["results"])}) for host in found]

    async def stop_host(self, job_id: str, host_number: int) -> None:
        """Ask a host to start no further attempt, and to give up one that waits for resources."""
        await self._call("stop_host", name=host_name(job_id, host_number))

    async def kill_host(self, job_id: str, host_number: int) -> None:
        """End a host and everything it started; no error where it is gone."""
        await self._call("kill_host", name=host_name(job_id, host_number))

    async def close(self) -> None:
        """End the agent. Hosts live on."""
        async with self._turn:
            await self._end_agent()

    async def _call(self, method: str, **arguments: Any) -> Any:
        async with self._turn:
            try:
                agent = await self._living_agent()
                return await self._ask(agent, CALL_TIMEOUT_S, method, arguments)
            except (TimeoutError, OSError, EOFError, ValueError) as error:
                await self._end_agent()
                raise ClusterAwayError(
                    f"Ray at {self._address} does not answer: {error}"
                ) from error

    async def _living_agent(self) -> asyncio.subprocess.Process:
        if self._agent is not None and self._agent.returncode is None:
            return self._agent
        self._agent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.ray_cluster",
            self._address,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
            limit=1 << 24,
            start_new_session=True,  # a Ctrl-C in our terminal is for us alone
        )
        await self._ask(self._agent, CONNECT_TIMEOUT_S, "hello", {})
        return self._agent

    async def _ask(
        self,
        agent: asyncio.subprocess.Process,
        timeout_s: float,
        method: str,
        arguments: dict[str, Any],
    ) -> Any:
        assert agent.stdin is not None
        assert agent.stdout is not None
        request = {"method": method, "arguments": arguments}
        agent.stdin.write(json.dumps(request).encode() + b"\n")
        async with asyncio.timeout(timeout_s):
            await agent.stdin.drain()
            line = await agent.stdout.readline()
        if not line:
            raise EOFError("the agent ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    async def _end_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is None:
            return
        with contextlib.suppress(ProcessLookupError):
            agent.kill()
        await agent.wait()


def host_name(job_id: str, host_number: int) -> str:
    """The name under which a host is registered in Ray."""
    return f"{HOST_PREFIX}{job_id}-{host_number}"


class Agent:
    """The agent's side: a Ray driver. Blocking; lives in its own process."""

    def __init__(self, address: str) -> None:
        import ray

        self._ray = ray
        self._address = address
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )

    def hello(self) -> str:
        """Answers once the connection stands."""
        return "ready"

    def nodes(self) -> list[dict[str, Any]]:
        """Every machine with its whole GPUs and CPUs. draining: Ray was told that it stops."""
        draining = self._ray._private.state.state.get_draining_nodes()
        return [
            {
                "id": node["NodeID"],
                "address": node["NodeManagerAddress"],
                "gpus": int(node["Resources"].get("GPU", 0)),
                "cpus": int(node["Resources"].get("CPU", 0)),
                "alive": node["Alive"],
                "draining": node["NodeID"] in draining,
                "labels": dict(node["Labels"]),
            }
            for node in self._ray.nodes()
        ]

    def start_host(self, config: dict[str, Any]) -> None:
        """Create the detached actor, or find it."""
        host_class = importlib.import_module("trainer.ray_entrypoint").AttemptHost
        name = host_name(config["job_id"], config["host_number"])
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            # With the head, never on the node beside the service: a host outlives the service.
            "resources": {"node:__internal_head__": 0.001},
            "max_concurrency": 8,
            "max_restarts": 0,  # the reconciler starts the next host, nobody else
            # Inherited by all that the host starts: Ray Train's cleaner of placement groups looks
            # for a cluster on this machine otherwise, and gives up where it finds two.
            "runtime_env": {"env_vars": {"RAY_ADDRESS": self._address}},
        }
        host = self._ray.remote(host_class).options(**options).remote(config)
        self._ray.get(host.status.remote(), timeout=CALL_TIMEOUT_S - 1)

    def hosts(self) -> list[dict[str, Any]]:
        """Every host with its status, asked of all at once."""
        names = [name for name in self._ray.util.list_named_actors() if HOST_NAME.fullmatch(name)]
        asked = {}
        for name in names:
            with contextlib.suppress(ValueError):  # gone since it was listed
                asked[name] = self._ray.get_actor(name).status.remote()
        self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=STATUS_TIMEOUT_S)
        return [found for name, answer in asked.items() if (found := self._status(name, answer))]

    def stop_host(self, name: str) -> None:
        """Pass the wish on."""
        with contextlib.suppress(ValueError):
            self._ray.get(self._ray.get_actor(name).stop.remote(), timeout=STATUS_TIMEOUT_S)

    def kill_host(self, name: str) -> None:
        """End the run first, so that its placement group goes with it, then the actor."""
        with contextlib.suppress(ValueError):
            host = self._ray.get_actor(name)
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(host.abort.remote(), timeout=STATUS_TIMEOUT_S)
            self._ray.kill(host)

    def _status(self, name: str, answer: Any) -> dict[str, Any] | None:
        match = HOST_NAME.fullmatch(name)
        assert match is not None, "only hosts are asked"
        known = {"job_id": match[1], "host_number": int(match[2])}
        try:
            return {**known, "answered": True, **self._ray.get(answer, timeout=0.1)}
        except self._ray.exceptions.ActorDiedError:
            return None  # not a host any more
        except self._ray.exceptions.RayError:  # late, or out of reach for a moment
            return {**known, "answered": False, "finished": False, "results": []}


def serve_agent() -> None:
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints must not look like an answer
    agent = Agent(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = getattr(agent, request["method"])(**request["arguments"])
            answers.write(json.dumps({"result": result}) + "\n")
        except Exception as error:  # whatever Ray raises is the caller's to judge
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


if __name__ == "__main__":
    serve_agent()
