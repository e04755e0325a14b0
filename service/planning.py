"""From what somebody wrote to what would run: everything that a spec refers to, looked up.

Data and tokenizer are bound, the checkpoint to start from is resolved (of a job or of nanochat),
what this cluster measured is found; trainer.contract.plan works out the rest. Creates nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from everstep.specs import merged
from everstep.v1 import everstep_pb2 as pb
from service.jobs import JobView
from service.lineage import Ancestor, lineage, nanochat_ancestor
from service.placement import Node
from service.scheduler import shortfall
from service.storage import Storage
from service.store import JobStore, RecordStore
from trainer.contract.devices import find_device
from trainer.contract.plan import Fork, Plan, Surroundings, make_plan
from trainer.contract.schedule import InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.speed import Measured, same_kind, work_of
from trainer.contract.violations import SpecError, Violation
from trainer.storage.binding import DataBinding
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest
from trainer.storage.nanochat_files import NanochatStart, NanochatSummary
from trainer.storage.object_store import NotFoundError

NANOCHAT = "nanochat:"
LOOKED_AT = 50  # jobs, the newest, for a measured rate
MEASURED_JOBS = 5
MEASURED_POINTS = 21  # of each, evenly spaced; their median is its rate


@dataclass(frozen=True)
class Parent:
    """What a job starts from: a checkpoint of a job, with its document, or one of nanochat's."""

    fork: Fork
    shape: ModelShape
    ref: CheckpointRef | None = None
    document: JobDocument | None = None
    nanochat: NanochatStart | None = None


@dataclass(frozen=True)
class Resolved:
    """A spec with everything that it refers to looked up."""

    spec: JobSpec
    binding: DataBinding
    start: CheckpointRef | None
    nanochat: NanochatStart | None
    plan: Plan
    ancestors: tuple[Ancestor, ...]


class Planner:
    """Reads the database, storage and what is known of the cluster."""

    def __init__(
        self,
        jobs: JobStore,
        records: RecordStore,
        storage: Storage,
        nodes: Callable[[], Sequence[Node] | None],
    ) -> None:
        self._jobs = jobs
        self._records = records
        self._storage = storage
        self._nodes = nodes

    async def plan(self, data: Mapping[str, Any], inherit: bool, device: str = "") -> Resolved:
        """Resolve and plan a spec. device: the GPU to plan for; empty: what jobs ran on here.

        Raises:
            SpecError: with every violation found.
            StorageAwayError: storage can't be reached.
        """
        spec = await self._parse(data, inherit)
        found = self._check_capacity(spec)
        parent: Parent | None = None
        try:
            parent = await self._parent(spec)
        except SpecError as error:
            found += error.violations
        try:
            binding = await self._bind(spec, parent.document if parent else None)
        except SpecError as error:
            raise SpecError([*found, *error.violations]) from error
        vocab_size = binding.tokenizer.vocab_size
        fork = None
        if parent is not None:
            found += _check_fit(spec, vocab_size, parent.shape)
            fork = _with_changes(parent, spec, binding)
        try:
            plan = make_plan(spec, vocab_size, fork, await self._surroundings(spec, device))
        except SpecError as error:
            raise SpecError([*found, *error.violations]) from error
        except ValueError as error:
            raise SpecError(
                [*found, Violation("start.from", spec.start.from_, str(error))]
            ) from error
        if found:
            raise SpecError(found)
        start = parent.ref if parent else None
        ancestors = await self._ancestors(start)
        if parent is not None and parent.nanochat is not None:
            ancestors = [nanochat_ancestor(parent.nanochat)]
        passed = _passed(parent, spec, binding) if parent else None
        return Resolved(spec, binding, start, passed, plan, tuple(ancestors))

    async def adopted(
        self, source: str, data: Mapping[str, Any]
    ) -> tuple[JobSpec, DataBinding, NanochatSummary]:
        """The spec of the job that ends with nanochat's checkpoint, and what it refers to.

        Model and batch are the checkpoint's; what data says otherwise of them is refused, but for
        device_batch_size, which is its machine's.

        Raises:
            SpecError: with every violation found.
        """
        summary = await self._storage.nanochat(source)
        told = {"start": {"from": source}, "schedule": {"num_iterations": summary.start.step}}
        spec = JobSpec.parse(merged(merged(summary.spec, data), told))
        binding = await self._storage.bind(spec.data)
        found = _check_fit(spec, binding.tokenizer.vocab_size, summary.shape)
        asked = spec.batch.total_batch_size
        if asked != (theirs := summary.spec["batch"].get("total_batch_size", asked)):
            found.append(Violation("batch.total_batch_size", asked, f"{source} has {theirs}"))
        if found:
            raise SpecError(found)
        return spec, binding, summary

    async def _parse(self, data: Mapping[str, Any], inherit: bool) -> JobSpec:
        if not inherit:
            return JobSpec.parse(data)
        start = data.get("start")
        name = start.get("from") if isinstance(start, Mapping) else None
        if not isinstance(name, str) or "@" not in name:
            raise SpecError([Violation("start.from", name, "names the job to inherit from")])
        parent = await self._jobs.get(name.rpartition("@")[0])
        # What the database doesn't know may still be in the bucket.
        spec = parent.spec.to_dict() if parent else (await self._document(name)).spec
        inherited = {k: v for k, v in spec.items() if k != "start"}
        asked_anew = {"guards": {"allow_lr_jump": False}}  # whoever allowed the parent's meant that
        return JobSpec.parse(merged(merged(inherited, asked_anew), data))

    async def _parent(self, spec: JobSpec) -> Parent | None:
        name = spec.start.from_
        if name is None:
            return None
        if name.startswith(NANOCHAT):
            summary = await self._storage.nanochat(name)
            start = summary.start
            fork = Fork(start.name, start.step, summary.in_force, summary.claimed)
            return Parent(fork, summary.shape, nanochat=start)
        document = await self._document(name)
        manifest = await self._storage.resolve(name)
        assert document.binding is not None
        model = JobSpec.parse(document.spec).model
        shape = ModelShape.of(model, document.binding.tokenizer.vocab_size)
        return Parent(_fork(manifest), shape, manifest.ref, document)

    async def _document(self, name: str) -> JobDocument:
        """That of the job of JOB@STEP; SpecError where there is none."""
        try:
            return await self._storage.document(name.rpartition("@")[0])
        except NotFoundError:
            raise SpecError([Violation("start.from", name, "there is no such job")]) from None

    async def _bind(self, spec: JobSpec, parent: JobDocument | None) -> DataBinding:
        """The parent's binding where the spec names the same data: its position stays valid."""
        if parent is not None and parent.binding is not None:
            theirs = JobSpec.parse(parent.spec).data
            if theirs == spec.data:
                return parent.binding
        return await self._storage.bind(spec.data)

    def _check_capacity(self, spec: JobSpec) -> list[Violation]:
        nodes = self._nodes()
        if nodes is None or spec.resources.wait_for_nodes:
            return []
        # A node that is drained may come back: then the job waits for it.
        there = [replace(node, draining=False) for node in nodes]
        lacks = shortfall(spec.resources, spec.possible_workers[0], there)
        return [
            Violation(f"resources.{field}", attrgetter(field)(spec.resources), reason)
            for field, reason in lacks.items()
        ]

    async def _surroundings(self, spec: JobSpec, device: str) -> Surroundings:
        """The device asked for, else the one that the newest job of this kind ran on."""
        if device:
            return Surroundings(find_device(device))
        views = await self._jobs.trained(among=LOOKED_AT)
        alike = [view for view in views if same_kind(spec, view.job.spec)]
        measured = [await self._measured(view) for view in alike[:MEASURED_JOBS]]
        events = (pb.Event.FromString(view.progress.in_force or b"") for view in alike)
        info = next((event.device for event in events if event.HasField("device")), None)
        known = find_device(info.name, info.memory_bytes, info.free_bytes or None) if info else None
        return Surroundings(known, [each for each in measured if each is not None])

    async def _measured(self, view: JobView) -> Measured | None:
        job = view.job
        try:
            document = await self._storage.document(job.id)
        except NotFoundError:
            return None
        records = await self._records.points(job.id, 0, None, MEASURED_POINTS, MEASURED_POINTS)
        points = [pb.WatchJobResponse.FromString(record.body).point for record in records]
        if not points or document.binding is None:
            return None
        # Of the newest attempt alone: those before may have had another number of workers.
        lately = [
            point
            for point, record in zip(points, records, strict=True)
            if record.attempt == records[-1].attempt
        ]
        step_s = statistics.median(point.step_s - point.data_wait_s for point in lately)
        # The job's own number is that of now: it may have been resized or set aside since.
        workers = len(lately[-1].rank_busy_s) or 1
        shape = ModelShape.of(job.spec.model, document.binding.tokenizer.vocab_size)
        return Measured(f"job {job.id}", step_s, work_of(job.spec, shape, workers))

    async def _ancestors(self, start: CheckpointRef | None) -> list[Ancestor]:
        if start is None:
            return []
        found = await lineage(self._jobs, self._storage, start.job_id)
        first = found[0]
        return [Ancestor(first.job_id, first.name, first.start_step, start.step), *found[1:]]


def _fork(manifest: Manifest) -> Fork:
    in_force = manifest.state.get("in_force")
    assert isinstance(in_force, dict), "every checkpoint of ours says what was in force"
    return Fork(str(manifest.ref), manifest.step, InForce.from_dict(in_force))


def _same_rows(parent: JobDocument, spec: JobSpec, binding: DataBinding) -> bool:
    """Whether a job reads on in the order of its parent."""
    old = JobSpec.parse(parent.spec)
    theirs = (old.data.order_seed, old.model.max_seq_len)
    return (
        parent.binding is not None
        and parent.binding.data_sha256 == binding.data_sha256
        and parent.binding.tokenizer.sha256 == binding.tokenizer.sha256
        and theirs == (spec.data.order_seed, spec.model.max_seq_len)
    )


def _passed(parent: Parent, spec: JobSpec, binding: DataBinding) -> NanochatStart | None:
    """What nanochat has read of the job's text, which is not read again in that epoch."""
    if parent.document is not None and _same_rows(parent.document, spec, binding):
        return parent.document.nanochat
    return parent.nanochat


def _with_changes(parent: Parent, spec: JobSpec, binding: DataBinding) -> Fork:
    """The fork, with what a continuation should know of its data and evaluation set."""
    changes = []
    if parent.nanochat is not None:
        at = parent.nanochat
        changes.append(
            f"data: goes on after row group {at.row_group} of shard {at.shard}, epoch {at.epoch} "
            "(nanochat's position, all counted from 0): the rest of that row group is left out, "
            "and the order from there is this job's own; that data.source is what nanochat read is "
            "taken on trust"
        )
    elif parent.document is not None and parent.document.binding is not None:
        theirs, old = parent.document.binding, JobSpec.parse(parent.document.spec)
        changes += _unseen_changes(old, spec)
        if not _same_rows(parent.document, spec, binding):
            changes.append(
                "data: not the parent's rows: training begins at the first of the new ones"
            )
        ours = (binding.validation, binding.tokenizer.sha256, spec.evaluate_rows)
        if ours != (theirs.validation, theirs.tokenizer.sha256, old.evaluate_rows):
            changes.append(
                "evaluation set: not the parent's (validation shard, tokenizer or number of rows): "
                "validation figures before and after don't compare"
            )
    fork = parent.fork
    return Fork(fork.name, fork.step, fork.in_force, fork.claimed, tuple(changes))


def _unseen_changes(old: JobSpec, new: JobSpec) -> list[str]:
    """What bears on weights or figures and stands in no rate or size of the plan, in words."""
    pairs = [
        (path, attrgetter(path)(old), attrgetter(path)(new))
        for path in (
            "optimizer.grad_clip_norm", "precision.compute", "precision.embeddings", "compile",
            "deterministic", "evaluate.every", "evaluate.tokens",
        )
    ]  # fmt: skip
    told = ", ".join(f"{path} {was} -> {now}" for path, was, now in pairs if was != now)
    return [f"not as in the parent: {told}"] if told else []


def _check_fit(spec: JobSpec, vocab_size: int, theirs: ModelShape) -> list[Violation]:
    """The weights must have the names and shapes that the parent's have."""
    ours = ModelShape.of(spec.model, vocab_size)
    found = []
    for field in ("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size"):
        old, new = getattr(theirs, field), getattr(ours, field)
        if old != new:
            reason = f"gives {field} {new}, but {spec.start.from_} has {old}"
            section = "data.tokenizer" if field == "vocab_size" else "model"
            found.append(Violation(section, spec.start.from_, reason))
    return found


def jump_message(plan: Plan) -> str:
    """What the guard says, with the ways out."""
    lines = "; ".join(str(jump) for jump in plan.jumps)
    name = plan.fork.name if plan.fork else ""
    settings = " ".join(f"--set {each}" for each in plan.ways_out)
    return (
        f"learning rates would jump above those in force at {name}: {lines}. "
        f"Ways out: other rates ({settings} goes on at the parent's), schedule.anchor: continue, "
        "or guards.allow_lr_jump: true"
    )
