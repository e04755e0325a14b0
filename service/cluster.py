"""The machines as people see them: what each has, who holds what there, and why others wait; drain.

Decides nothing: the scheduler does, by what upkeep says of a node. Absent figures stay absent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from everstep.v1 import everstep_pb2 as pb
from service import convert, events
from service.errors import ClusterAwayError, NodeNotFoundError, PreconditionError, require
from service.jobs import Job
from service.placement import Node
from service.scheduler import worker_of
from service.store import JobStore, RecordStore
from service.upkeep import Upkeep
from trainer.contract.states import JobState

LOOK_S = 0.2  # how often a drain looks whether a node is empty
log = logging.getLogger(__name__)


class Cluster:
    """What GetCluster shows."""

    def __init__(
        self,
        jobs: JobStore,
        records: RecordStore,
        nodes: Callable[[], Sequence[Node] | None],
        seen_at: Callable[[], float],
        samples: Mapping[str, tuple[str, Sequence[pb.DeviceSample]]],
        upkeep: Upkeep,
        wake: Callable[[], None],
        explained: Callable[[Job], Job],
    ) -> None:
        """nodes: the cluster's, None while unknown. seen_at: since when. samples: see Metrics.

        wake: makes the reconciler look now. explained: a job with the reason why it waits.
        """
        self._jobs = jobs
        self._records = records
        self._nodes = nodes
        self._seen_at = seen_at
        self._samples = samples
        self._upkeep = upkeep
        self._wake = wake
        self._explained = explained

    async def look(self) -> pb.GetClusterResponse:
        """All machines; ClusterAwayError while none is known."""
        nodes = self._known()
        jobs = await self._jobs.unfinished()
        holding = [job for job in jobs if job.holds_resources]
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        queued.sort(key=lambda job: (-job.spec.priority, job.submission))
        return pb.GetClusterResponse(
            nodes=[self._node(node, holding) for node in nodes],
            seen_time=convert.timestamp(self._seen_at()),
            waiting=[
                pb.WaitingJob(job_id=job.id, job_name=job.spec.name, reason=job.reason)
                for job in map(self._explained, queued)
            ],
        )

    async def drain(self, name: str, actor: str = "") -> list[str]:
        """Put nothing more on a node, and wait until all that is there has left, with a checkpoint.

        name: its address, or the beginning of its id. Returns the jobs that were there; each goes
        on elsewhere, or is queued. Safe to repeat.

        Raises:
            NodeNotFoundError: there is none, or several.
            PreconditionError: somebody has undone it meanwhile.
        """
        node = self._find(name)
        await self._upkeep.drain(node, actor)
        moved = await self._there(node)
        for job_id in moved:
            told = events.requested(f"drain node {node.address}", actor, time.time())
            await self._records.append(job_id, [told])
        self._wake()
        # A decision under way may still know the node as it was.
        while not self._is_draining(node) or await self._there(node):
            if not self._upkeep.is_drained(node.address):
                raise PreconditionError(f"draining {node.address} was undone meanwhile")
            await asyncio.sleep(LOOK_S)
        return moved

    async def undrain(self, name: str, actor: str = "") -> None:
        """Let jobs onto a node again; NodeNotFoundError. Safe to repeat.

        By its address also where the machine isn't there now.
        """
        address = name if self._upkeep.is_drained(name) else self._find(name).address
        await self._upkeep.undo(address)
        log.info("draining node %s undone by %s", address, actor)
        self._wake()

    def _is_draining(self, node: Node) -> bool:
        return all(each.draining for each in self._nodes() or () if each.id == node.id)

    async def _there(self, node: Node) -> list[str]:
        jobs = await self._jobs.unfinished()
        return [job.id for job in jobs if job.holds_resources and node.id in job.placement]

    def _known(self) -> Sequence[Node]:
        nodes = self._nodes()
        if nodes is None:
            raise ClusterAwayError("Ray has not answered since the service started")
        return [node for node in nodes if node.alive and (node.gpus > 0 or node.cpus > 0)]

    def _find(self, name: str) -> Node:
        require(name != "", "node_id: say which node: its address, or the beginning of its id")
        known = self._known()
        found = [node for node in known if node.address == name or node.id.startswith(name)]
        if len(found) != 1:
            there = ", ".join(node.address for node in known)
            several = f"{len(found)} nodes are" if found else "no node is"
            raise NodeNotFoundError(f"node_id: {name[:80]!r}: {several} called so; there: {there}")
        return found[0]

    def _node(self, node: Node, holding: Iterable[Job]) -> pb.Node:
        shares = [
            _share(job, number) for job in holding if (number := job.placement.count(node.id))
        ]
        devices = {
            sample.index: sample
            for share in shares
            for told_on, samples in [self._samples.get(share.job_id, ("", ()))]
            for sample in samples
            if told_on == node.id
        }
        return pb.Node(
            id=node.id,
            address=node.address,
            gpus=node.gpus,
            gpus_free=max(node.gpus - sum(share.gpus for share in shares), 0),
            cpus=node.cpus,
            cpus_free=max(node.cpus - sum(share.cpus for share in shares), 0),
            job_ids=[share.job_id for share in shares],
            gpu_type=node.gpu_type,
            shares=shares,
            devices=[devices[index] for index in sorted(devices)],
            unused_because=self._upkeep.why_unused(node),
        )


def _share(job: Job, number: int) -> pb.NodeShare:
    taken = worker_of(job.spec.resources).times(number)
    return pb.NodeShare(
        job_id=job.id, job_name=job.spec.name, workers=number, gpus=taken.gpus, cpus=taken.cpus
    )
