"""The machines as people see them: what each has, who holds what there, and why others wait.

Works nothing out that decides anything: the scheduler does. Absent figures stay absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from everstep.v1 import everstep_pb2 as pb
from service.errors import ClusterAwayError
from service.jobs import Job
from service.placement import Node
from service.scheduler import worker_of
from service.store import JobStore
from trainer.contract.states import JobState

GPU_TYPE = "ray.io/accelerator-type"  # the label that Ray gives a node with GPUs


class Cluster:
    """What GetCluster shows."""

    def __init__(
        self,
        jobs: JobStore,
        nodes: Callable[[], Sequence[Node] | None],
        samples: Mapping[str, tuple[str, Sequence[pb.DeviceSample]]],
    ) -> None:
        """nodes: the cluster's, None while unknown. samples: see Metrics.samples."""
        self._jobs = jobs
        self._nodes = nodes
        self._samples = samples

    async def look(self) -> pb.GetClusterResponse:
        """All machines; ClusterAwayError while none is known."""
        nodes = self._nodes()
        if nodes is None:
            raise ClusterAwayError("Ray has not answered since the service started")
        jobs = await self._jobs.unfinished()
        holding = [job for job in jobs if job.holds_resources]
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        queued.sort(key=lambda job: (-job.spec.priority, job.submission))
        return pb.GetClusterResponse(
            nodes=[self._node(node, holding) for node in nodes if node.alive and any_of(node)],
            waiting=[
                pb.WaitingJob(job_id=job.id, job_name=job.spec.name, reason=job.reason)
                for job in queued
            ],
        )

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
            gpu_type=node.labels.get(GPU_TYPE, ""),
            shares=shares,
            devices=[devices[index] for index in sorted(devices)],
            unused_because="it is being drained" if node.draining else "",
        )


def any_of(node: Node) -> bool:
    """Whether it has anything to give: the node beside the service has not."""
    return node.gpus > 0 or node.cpus > 0


def _share(job: Job, number: int) -> pb.NodeShare:
    taken = worker_of(job.spec.resources).times(number)
    return pb.NodeShare(
        job_id=job.id, job_name=job.spec.name, workers=number, gpus=taken.gpus, cpus=taken.cpus
    )
