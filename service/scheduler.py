"""Which jobs start, grow, shrink, move or make way, and where. A pure function of a snapshot.

Priority by priority, the highest first: its queued jobs start in order of submission, then its jobs
that may grow take what is still free, then comes the next priority. A queued job that fits never
overtakes one before it that waits for others to end, so nobody starves. What the whole cluster
can't hold waits out of others' way.

Invariant: nothing is taken from a job but for one that then starts: the number of its workers from
an elastic one for a job of at least its priority, its place from a preemptible one for a job of
higher priority. What grows takes only what no job before it can use. So no two jobs take turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from service.jobs import Job
from service.placement import Capacity, Node, Placement, Room, whole
from service.waiting import Waiting, rank
from trainer.contract.devices import plain
from trainer.contract.spec import ResourcesSpec, Sizing
from trainer.contract.states import JobState


@dataclass(frozen=True)
class Move:
    """A job with the place that it gets, empty where it is queued, and why."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Decision:
    """What to start now, and what to stop with a checkpoint: each goes on in another place.

    waiting: why the other queued jobs wait, by id.
    """

    start: tuple[Move, ...]
    stop: tuple[Move, ...]
    waiting: Mapping[str, str]


def worker_of(resources: ResourcesSpec) -> Capacity:
    """What one worker takes of its node."""
    wanted = plain(resources.gpu_type)[0] if resources.gpu_type else ""
    return Capacity(resources.gpus_per_worker, resources.cpus_per_worker, wanted)


def numbers_of(job: Job) -> tuple[int, ...]:
    """The numbers of workers that a job may start on, ascending.

    One whose policy is fixed keeps the number that it was given first.
    """
    if job.workers and job.spec.resources.workers.policy is Sizing.FIXED:
        return (job.workers,)
    return job.spec.possible_workers


def shortfall(resources: ResourcesSpec, least: int, nodes: Iterable[Node]) -> dict[str, str]:
    """What keeps even an empty cluster from holding so many workers, by field; empty: nothing."""
    nodes = [node for node in nodes if node.usable]
    worker, found = worker_of(resources), {}
    if Room(nodes).slots(worker) >= least:
        return {}
    if worker.gpu_type:
        types = sorted({node.gpu_type for node in nodes if node.gpu_type})
        nodes = [node for node in nodes if node.capacity.gpu_type == worker.gpu_type]
        if not nodes:
            there = f"there are {', '.join(types)}" if types else "no node names its GPUs"
            return {"gpu_type": f"no node has GPUs of type {resources.gpu_type}: {there}"}
    need, total = worker.times(least), whole(nodes)
    for unit in ("gpu", "cpu"):
        field = f"{unit}s_per_worker"
        most = max((getattr(node, f"{unit}s") for node in nodes), default=0)
        needed, have = getattr(need, f"{unit}s"), getattr(total, f"{unit}s")
        if needed > have:
            words = f"needs {needed} {unit.upper()}, the cluster has {have}"
            found[field] = f"with {least} worker{'s' * (least > 1)} it {words}"
        elif getattr(worker, f"{unit}s") > most:
            found[field] = f"a worker must fit on one node, the largest has {most} {unit.upper()}"
    if not found:
        found["workers.min"] = (
            f"{least} workers of {worker.gpus} GPU and {worker.cpus} CPU, each on one node: the "
            f"cluster has places for {Room(nodes).slots(worker)}"
        )
    return found


def decide(
    queued: Sequence[Job],
    holding: Sequence[Job],
    nodes: Sequence[Node],
    leaving: Mapping[str, Placement] | None = None,
    now: float = 0.0,
) -> Decision:
    """Who gets which place.

    Args:
        queued: jobs that want to run and hold nothing.
        holding: jobs that hold resources.
        nodes: the cluster's.
        leaving: ids of those among holding that were told to stop, with the place that each goes
            on in; empty where it is queued, or is done.
        now: seconds since the epoch, for the pauses between changes of a job's number.
    """
    this = _Round(holding, nodes, leaving or {}, now)
    for job in this.staying:
        this.leave_lost_nodes(job)
    groups: dict[int, list[Job]] = {}
    for job in queued:
        groups.setdefault(job.spec.priority, []).append(job)
    for priority in sorted(groups.keys() | {j.spec.priority for j in this.staying}, reverse=True):
        begun = this.admit(groups.get(priority, ()))
        trains = [job for job in this.staying if job.spec.priority == priority]
        for job in sorted(begun + trains, key=rank):
            this.grow(job)
    waiting = Waiting(queued, this.why, this.start.keys())
    return Decision(tuple(this.start.values()), tuple(this.stop.values()), waiting)


def settle(job: Job, others: Iterable[Job], nodes: Sequence[Node]) -> Job | None:
    """The job in its place if that is still there, else in the next best; None: there is none.

    others: the jobs that hold resources beside it.
    """
    room = Room(nodes)
    for each in others:
        room.take(worker_of(each.spec.resources), _held(each, room))
    if job.placement and room.has(worker_of(job.spec.resources), job.placement):
        return job
    placement = _largest(room, job, _no_more_than(job))
    return placed(job, placement) if placement else None


def placed(job: Job, placement: Placement) -> Job:
    """The job in another place; queued, with an empty one, it keeps its number."""
    return replace(job, placement=placement, workers=len(placement) or job.workers)


def _no_more_than(job: Job) -> list[int]:
    """The numbers of workers that it can go on with, having lost some."""
    return [n for n in numbers_of(job) if n <= max(job.workers, 1)]


def _gives(job: Job) -> bool:
    """Whether it gives workers back for a queued job."""
    return job.spec.resources.workers.policy is Sizing.ELASTIC


def _held(job: Job, room: Room) -> Placement:
    """Where a job's workers are; of one started by an older service, where they might be."""
    return job.placement or _largest(room, job, numbers_of(job)[:1]) or ()


def _largest(room: Room, job: Job, numbers: Sequence[int]) -> Placement | None:
    """A place for the largest of these numbers of its workers that there is one for."""
    worker = worker_of(job.spec.resources)
    slots = room.slots(worker)
    most = max((n for n in numbers if n <= slots), default=0)
    return room.place(worker, most) if most else None


def _words(capacity: Capacity) -> str:
    kind = f" of type {capacity.gpu_type}" if capacity.gpu_type else ""
    return f"{capacity.gpus} GPU{kind} and {capacity.cpus} CPU"


class _Round:
    """One decision in the making. room: free now; soon: once all that are told to stop have."""

    def __init__(
        self,
        holding: Sequence[Job],
        nodes: Sequence[Node],
        leaving: Mapping[str, Placement],
        now: float,
    ) -> None:
        self._nodes, self._now, self._empty = nodes, now, Room(nodes)
        self._room, self._soon = Room(nodes), Room(nodes)
        self.staying: list[Job] = []  # each with its place
        for job in sorted(holding, key=rank):
            held, worker = _held(job, self._room), worker_of(job.spec.resources)
            then = leaving.get(job.id, held)
            # What it leaves for is kept for it; what it has, it has until it is gone.
            self._room.take(worker, (Counter(held) | Counter(then)).elements())
            self._soon.take(worker, then)
            if job.id not in leaving:
                self.staying.append(replace(job, placement=held))
        self.start: dict[str, Move] = {}
        self.stop: dict[str, Move] = {}
        self._blocked: Job | None = None
        self._lacks = ""  # of the blocked one

    def leave_lost_nodes(self, job: Job) -> None:
        """A job on a node that is gone or drained goes on elsewhere, on no more workers."""
        lost = [node for node in job.placement if node not in self._room.nodes]
        if not lost:
            return
        room = self._room.copy()
        room.give(worker_of(job.spec.resources), job.placement)
        placement = _largest(room, job, _no_more_than(job)) or ()
        self._move(job, placement, f"{len(lost)} of its workers lost, or must leave, their node")

    def admit(self, group: Iterable[Job]) -> list[Job]:
        """Start queued jobs of one priority, up to the first that waits for others to end.

        Returns those that start; see who could make way for that one.
        """
        begun: list[Job] = []
        if self._blocked is not None:
            return begun
        for job in sorted(group, key=rank):
            numbers = numbers_of(job)
            if self._never(job, numbers[0]):
                continue  # what can't run until the cluster grows back keeps no others from running
            placement = _largest(self._room, job, numbers[:1] if _gives(job) else numbers)
            if not placement:
                self._block(job, numbers[0])
                break
            self._begin(job, placement)
            begun.append(self.start[job.id].job)
        return begun

    def why(self, job: Job) -> str:
        """Why a queued job that doesn't start waits, in words that follow its place."""
        if self._never(job, least := numbers_of(job)[0]):
            return f": {'; '.join(shortfall(job.spec.resources, least, self._nodes).values())}"
        assert self._blocked is not None, "it would have started"
        behind = f", behind job {self._blocked.id}"
        return self._lacks if job.id == self._blocked.id else behind

    def _never(self, job: Job, least: int) -> bool:
        """Whether not even the empty cluster holds it."""
        return self._empty.slots(worker_of(job.spec.resources)) < least

    def _block(self, job: Job, least: int) -> None:
        """The first that waits for others to end: nobody behind it starts."""
        worker = worker_of(job.spec.resources)
        self._blocked = job
        free, total = self._room.free(worker), self._empty.free(worker)
        need = _words(worker.times(least))
        self._lacks = (
            f": needs {need}, free are {free.gpus} and {free.cpus} of {total.gpus} and {total.cpus}"
        )
        if asked := self._make_way(job):
            self._lacks = f": {', '.join(asked)} makes way for it"

    def grow(self, job: Job) -> None:
        """Let a job have what no queued job of at least its priority can use."""
        begins = job.id in self.start
        policy = job.spec.resources.workers.policy
        if policy is Sizing.FIXED or (policy is Sizing.GROW and self._blocked is not None):
            return
        if not begins and not self._may_change(job):
            return
        room, worker = self._room.copy(), worker_of(job.spec.resources)
        room.give(worker, job.placement)
        placement = _largest(room, job, numbers_of(job)) or ()
        if len(placement) <= len(job.placement):
            return
        if begins:
            self._room.give(worker, job.placement)
            self._soon.give(worker, job.placement)
            self._begin(job, placement)
        else:
            self._move(job, placement, "there is room for more")

    def _begin(self, job: Job, placement: Placement) -> None:
        worker, number = worker_of(job.spec.resources), len(placement)
        self._room.take(worker, placement)
        self._soon.take(worker, placement)
        reason = f"its resources are free; {number} worker{'s start' if number > 1 else ' starts'}"
        free = min(number + self._room.slots(worker), job.spec.resources.workers.max)
        possible = numbers_of(job)
        if number < free and not any(number < n <= free for n in possible):
            known = ", ".join(map(str, possible))
            reason += f" ({free} have room, but a step divides only among {known})"
        self.start[job.id] = Move(placed(job, placement), reason)

    def _move(self, job: Job, placement: Placement, reason: str) -> None:
        """Have a job stop, and keep what it goes on with."""
        worker = worker_of(job.spec.resources)
        self._room.take(worker, (Counter(placement) - Counter(job.placement)).elements())
        self._soon.give(worker, job.placement)
        self._soon.take(worker, placement)
        self.stop[job.id] = Move(placed(job, placement), reason)

    def _may_change(self, job: Job) -> bool:
        """Whether its number may change now; once it trains, and not twice in a short time."""
        pause_s = job.spec.resources.workers.cooldown_s
        rested = job.resized_at is None or self._now - job.resized_at >= pause_s
        return rested and job.state is JobState.RUNNING and job.id not in self.stop

    def _make_way(self, job: Job) -> list[str]:
        """Tell those who must so that a job can start, and keep its place; their ids.

        Nobody where what is about to be free is enough, or where nobody who may be asked has
        enough.
        """
        shares = self._shares(job)
        if shares is None:
            return []
        places = self._with(job, shares)
        assert places is not None, "shares are such that it fits"
        for each, number in zip(self._named(shares), shares.values(), strict=True):
            reason = f"job {job.id} can start" if number else f"preempted by job {job.id}"
            self._move(each, places[each.id], reason)
        self._room.take(worker_of(job.spec.resources), places[job.id])
        return list(shares)

    def _shares(self, job: Job) -> dict[str, int] | None:
        """By id, how many workers those keep who must give some up; None: that would not help."""
        shares: dict[str, int] = {}
        offers = self._offers(job)
        while self._with(job, shares) is None:
            if (offer := next(offers, None)) is None:
                return None
            shares[offer[0].id] = offer[1]
        for each in reversed(self._named(shares)):  # who isn't needed goes on, or gives up less
            rest = {key: number for key, number in shares.items() if key != each.id}
            kept = [n for n in numbers_of(each) if shares[each.id] < n < len(each.placement)]
            may = [n for n in reversed(kept) if _gives(each) and self._may_change(each)]
            trials = [rest, *({**shares, each.id: n} for n in may)]
            shares = next((t for t in trials if self._with(job, t) is not None), shares)
        return shares

    def _offers(self, job: Job) -> Iterator[tuple[Job, int]]:
        """Who could give up workers, down to how many: lowest priority first, then youngest."""
        asked = sorted(self.staying, key=lambda job: (job.spec.priority, -job.submission))
        for each in asked:
            least = numbers_of(each)[0]
            gives = _gives(each) and each.spec.priority <= job.spec.priority
            if gives and least < len(each.placement) and self._may_change(each):
                yield each, least
        for each in asked:
            lower = each.spec.preemptible and each.spec.priority < job.spec.priority
            if lower and each.id not in self.stop:
                yield each, 0

    def _with(self, job: Job, shares: Mapping[str, int]) -> dict[str, Placement] | None:
        """Places for a job and for those who keep only so many workers; None: there are none."""
        room, named = self._soon.copy(), self._named(shares)
        for each in named:
            room.give(worker_of(each.spec.resources), each.placement)
        found: dict[str, Placement] = {}
        for each, number in ((job, numbers_of(job)[0]), *zip(named, shares.values(), strict=True)):
            placement = room.place(worker_of(each.spec.resources), number)
            if placement is None:
                return None
            room.take(worker_of(each.spec.resources), placement)
            found[each.id] = placement
        return found

    def _named(self, shares: Mapping[str, int]) -> list[Job]:
        by_id = {job.id: job for job in self.staying}
        return [by_id[each] for each in shares]
