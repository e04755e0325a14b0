"""The machines of a cluster, what each has free, and where workers go on them. Pure.

A worker fits on one node or not at all; the workers of a job may lie on several.

Invariant: `Room.place` answers with a placement that fits, whenever there is one for workers of one
size, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from trainer.contract.devices import plain

GPU_TYPE = "ray.io/accelerator-type"  # the label that Ray gives a node with GPUs
# The node of each worker of a job, by the id that Ray gave the node.
Placement = tuple[str, ...]


@dataclass(frozen=True)
class Capacity:
    """GPUs and CPUs, of a cluster, of a node, or of what is left of it; and of a worker's need.

    gpu_type: what a node has, or a worker asks for, as trainer.contract.devices spells it; empty:
    unknown, or any.
    """

    gpus: int
    cpus: int
    gpu_type: str = ""

    def plus(self, given: Capacity) -> Capacity:
        """What there is with what somebody gives back, or has not got (negative)."""
        return replace(self, gpus=self.gpus + given.gpus, cpus=self.cpus + given.cpus)

    def times(self, number: int) -> Capacity:
        """What so many need."""
        return replace(self, gpus=self.gpus * number, cpus=self.cpus * number)

    def slots(self, worker: Capacity) -> int:
        """How many such workers fit in this."""
        if worker.gpu_type not in ("", self.gpu_type):
            return 0
        by_cpus = self.cpus // worker.cpus
        by_gpus = self.gpus // worker.gpus if worker.gpus else by_cpus
        return max(min(by_cpus, by_gpus), 0)


@dataclass(frozen=True)
class Node:
    """One machine. id: Ray's, another one each time that the machine joins.

    gpus, cpus: whole, all that Ray may give away there. alive: Ray still lists a machine that is
    gone. draining: nothing new starts there and what is there leaves: somebody said so, or it is
    being stopped. kept_out: why it must hold nothing; empty: it may.
    """

    id: str
    address: str
    gpus: int
    cpus: int
    alive: bool = True
    draining: bool = False
    kept_out: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether workers may be there."""
        return self.alive and not self.draining and not self.kept_out

    @property
    def capacity(self) -> Capacity:
        """All that it has."""
        return Capacity(self.gpus, self.cpus, plain(self.gpu_type)[0])

    @property
    def gpu_type(self) -> str:
        """What its GPUs are, as Ray names them; empty where it doesn't."""
        return self.labels.get(GPU_TYPE, "")


def whole(nodes: Iterable[Node]) -> Capacity:
    """What all usable nodes have together."""
    found = Capacity(0, 0)
    for node in nodes:
        found = found.plus(node.capacity) if node.usable else found
    return found


class Room:
    """What is free on each usable node. Workers on other nodes take nothing."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._free = {node.id: node.capacity for node in nodes if node.usable}

    def copy(self) -> Room:
        """Another one, to try something with."""
        made = Room(())
        made._free = dict(self._free)
        return made

    @property
    def nodes(self) -> set[str]:
        """The usable ones, by id."""
        return set(self._free)

    def free(self, worker: Capacity) -> Capacity:
        """What the nodes of a worker's type have left together; never negative."""
        left = [free for free in self._free.values() if worker.gpu_type in ("", free.gpu_type)]
        return Capacity(sum(max(f.gpus, 0) for f in left), sum(max(f.cpus, 0) for f in left))

    def slots(self, worker: Capacity) -> int:
        """How many such workers fit beside what is there."""
        return sum(free.slots(worker) for free in self._free.values())

    def place(self, worker: Capacity, number: int) -> Placement | None:
        """Nodes for so many workers: one with just enough for all, else as few as will do."""
        slots = {node: n for node, free in self._free.items() if (n := free.slots(worker))}
        if sum(slots.values()) < number:
            return None

        def spare(node: str) -> tuple[int, int]:
            gpus = self._free[node].gpus  # left alone by those who need none
            return gpus if not worker.gpus else 0, slots[node]

        order = sorted((node for node, n in slots.items() if n >= number), key=spare)[:1]
        order = order or sorted(slots, key=lambda node: -slots[node])
        return tuple(node for node in order for _ in range(slots[node]))[:number]

    def has(self, worker: Capacity, placement: Placement) -> bool:
        """Whether workers fit just there."""
        nodes = [self._free.get(node, Capacity(0, 0)).slots(worker) for node in placement]
        return all(n >= placement.count(node) for node, n in zip(placement, nodes, strict=True))

    def take(self, worker: Capacity, placement: Iterable[str]) -> None:
        """Workers are there from now on."""
        self._change(placement, Capacity(-worker.gpus, -worker.cpus))

    def give(self, worker: Capacity, placement: Iterable[str]) -> None:
        """Workers are gone."""
        self._change(placement, worker)

    def _change(self, placement: Iterable[str], by: Capacity) -> None:
        for node in placement:
            if node in self._free:
                self._free[node] = self._free[node].plus(by)
