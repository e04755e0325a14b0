"""One attempt from claim to outcome: puts the parts together and names how it ended.

For a rank under Ray as for a bare run; knows no Ray.

Invariant: `run_attempt` returns an outcome for every error that is not the process's own end, and
trains only after it has claimed an attempt number that names the checkpoint it starts from.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everstep.v1 import everstep_pb2 as pb
from trainer.assembly import Blueprint
from trainer.checkpoint.train_state import StateMisfitError, TrainState, restore
from trainer.checkpoint.writer import CheckpointWriter
from trainer.contract.credential import AttemptIdentity, attempt_credential
from trainer.contract.outcome import AttemptResult, Outcome
from trainer.contract.violations import SpecError
from trainer.data.loader import EmptyDataError, Prefetcher
from trainer.data.shards import ShardFormatError
from trainer.data.validation import ValidationSet
from trainer.distributed import World
from trainer.events import CheckpointPassedOver, Directive, Event, Point, Reporter, Warned
from trainer.logs import LoggingReporter, LogShipper
from trainer.loop import Loop, Parts
from trainer.report import ServiceReporter
from trainer.runtime import Runtime, prepare
from trainer.start import Start, choose_start
from trainer.storage.binding import DataChangedError
from trainer.storage.documents import DocumentError
from trainer.storage.object_store import NotFoundError, StoreError, open_store
from trainer.storage.repository import (
    CheckpointRepository,
    CorruptCheckpointError,
    StaleWriterError,
)
from trainer.storage.retention import Retention

FINAL_SAVE_S = 300.0  # the last checkpoint's upload, before it is given up
FAILED_SAVE_S = 60.0
MAX_MESSAGE = 2000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttemptContext:
    """Where an attempt runs and whom it tells; reporter stands in for the service in bare runs."""

    job_id: str
    storage_uri: str
    cache_dir: str
    host: str
    threads: int
    host_number: int = 0
    host_key: str = ""
    service_address: str = ""
    service_ca: str | None = None
    on_claim: Callable[[int], None] = lambda number: None
    reporter: Reporter | None = None


# Errors by what they mean for the job, first match; an error of no listed kind is our own.
OUTCOMES: list[tuple[tuple[type[BaseException], ...], Outcome]] = [
    ((torch.OutOfMemoryError, MemoryError), Outcome.OUT_OF_MEMORY),
    ((StaleWriterError,), Outcome.STALE_WRITER),
    ((DataChangedError,), Outcome.DATA_CHANGED),
    ((StateMisfitError, CorruptCheckpointError), Outcome.CHECKPOINT_UNUSABLE),
    ((SpecError, DocumentError, EmptyDataError, ShardFormatError), Outcome.INVALID_JOB),
    ((NotFoundError,), Outcome.INVALID_JOB),
    ((StoreError,), Outcome.STORE_UNAVAILABLE),
]


class _Progress:
    """How far an attempt got, for the result of one that failed."""

    attempt = 0
    state: TrainState | None = None

    @property
    def step(self) -> int:
        return self.state.step if self.state is not None else 0


def run_attempt(context: AttemptContext, world: World) -> AttemptResult:
    """Run one attempt of a job on this rank; every rank calls it."""
    progress = _Progress()
    try:
        with contextlib.ExitStack() as cleanup:
            try:
                return _run(context, world, progress, cleanup)
            except Exception:
                log.exception("the attempt failed")  # while its log is still being shipped
                raise
    except Exception as error:
        outcome = next(
            (outcome for kinds, outcome in OUTCOMES if isinstance(error, kinds)),
            Outcome.CODE_ERROR,
        )
        message = str(error) if outcome is not Outcome.CODE_ERROR else repr(error)
        return AttemptResult(progress.attempt, outcome, message[:MAX_MESSAGE], progress.step)


def _run(
    context: AttemptContext, world: World, progress: _Progress, cleanup: contextlib.ExitStack
) -> AttemptResult:
    """Claim, build, train, save. What is opened is closed by cleanup, newest first."""
    cache = Path(context.cache_dir)
    store = open_store(context.storage_uri)
    repository = CheckpointRepository(store, context.job_id)
    blueprint = Blueprint.read(repository.document(), context.threads)
    start = _start(context, world, repository, blueprint, cache)
    progress.attempt, progress.state = start.attempt, start.state
    shipper = LogShipper(store, context.job_id, start.attempt, world.rank)
    cleanup.callback(shipper.close)
    log.info("rank %d of %d, attempt %d at %s", world.rank, world.size, start.attempt, context.host)
    reporter = LoggingReporter(_reporter(context, world, start))
    cleanup.callback(reporter.close)
    runtime = prepare(
        blueprint.spec, blueprint.shape, blueprint.start_step, context.threads, world, cache
    )
    for rejected in start.rejected:
        reporter.event(CheckpointPassedOver(rejected.ref, rejected.reason))
    if start.other_data:
        message = "the data is not the parent's: training begins at its first row"
        reporter.event(Warned(start.state.step, message))
    validation = blueprint.validation(cache)
    parts = _parts(
        blueprint, start, runtime, world, reporter, validation, repository, cache, cleanup
    )
    state = start.state
    end = Loop(parts, state).run()
    if parts.writer is None:
        return AttemptResult(start.attempt, end.outcome, end.message, state.step)
    outcome, message = _last_save(parts.writer, end.outcome, end.message)
    if outcome is Outcome.NOT_FINITE:
        message += f"; the last good checkpoint is {parts.writer.committed or start.ref or 'none'}"
    committed = parts.writer.committed
    saved = committed.step if committed else None
    return AttemptResult(start.attempt, outcome, message, state.step, saved)


def _start(
    context: AttemptContext,
    world: World,
    repository: CheckpointRepository,
    blueprint: Blueprint,
    cache: Path,
) -> Start:
    """Rank 0 chooses and claims; the others learn it."""
    chosen: Start | None = None
    if world.is_first:
        folder = cache / "restore" / f"{context.job_id}-{context.host_number}"
        chosen = choose_start(repository, blueprint.document, folder, context.host)
        context.on_claim(chosen.attempt)
    start = world.share_object(chosen)
    assert start is not None, "rank 0 has chosen"
    return start


def _parts(
    blueprint: Blueprint,
    start: Start,
    runtime: Runtime,
    world: World,
    reporter: Reporter,
    validation: ValidationSet,
    repository: CheckpointRepository,
    cache: Path,
    cleanup: contextlib.ExitStack,
) -> Parts:
    """Everything the loop works with."""
    model, optimizer = blueprint.model(runtime)
    if start.files:
        restore(start.files, start.state, model, optimizer)
    world.share(0)  # every rank has read the files
    if world.is_first:
        start.drop_files()
    reader = blueprint.shard_reader(cache)
    cleanup.callback(reader.close)
    batches = Prefetcher(blueprint.loader(reader, start.state.position, world))
    cleanup.callback(batches.close)
    writer = None
    if world.is_first:
        keep = blueprint.spec.checkpoint
        writer = CheckpointWriter(
            repository,
            blueprint.provenance(start.attempt, validation),
            Retention(keep.keep_last, keep.keep_every_steps, keep.keep_best),
            cache / "spool",
            reporter,
        )
        cleanup.callback(writer.close)
        # An attempt that fails doesn't give up a checkpoint that is on its way.
        cleanup.callback(writer.drain, FAILED_SAVE_S)
    return Parts(
        spec=blueprint.spec,
        world=world,
        device=runtime.device,
        model=model,
        forward=torch.compile(model, dynamic=False) if runtime.compile else model,
        optimizer=optimizer,
        schedule=blueprint.schedule(),
        batches=batches,
        reporter=reporter,
        writer=writer,
        evaluate=blueprint.evaluation(model, runtime, world, validation),
        sample=blueprint.sampler(model, runtime) if world.is_first else None,
    )


def _last_save(writer: CheckpointWriter, outcome: Outcome, message: str) -> tuple[Outcome, str]:
    """Wait for the last checkpoint: a job is not done before it is safe."""
    saved = writer.drain(FINAL_SAVE_S)
    if writer.stale:
        return Outcome.STALE_WRITER, "a newer attempt of this job is at work"
    if saved:
        return outcome, message
    message += f"; the last checkpoint could not be stored within {FINAL_SAVE_S:.0f} s"
    return Outcome.STORE_UNAVAILABLE if outcome is Outcome.COMPLETED else outcome, message


def _reporter(context: AttemptContext, world: World, start: Start) -> Reporter:
    if context.reporter is not None:
        return context.reporter
    if not world.is_first:
        return _Silent()
    identity = AttemptIdentity(context.job_id, context.host_number, start.attempt)
    hello = pb.Hello(job_id=context.job_id, attempt=start.attempt, start_step=start.state.step)
    credential = attempt_credential(context.host_key, identity)
    return ServiceReporter(context.service_address, context.service_ca, credential, hello)


class _Silent:
    """The reporter of every rank but the first."""

    def point(self, point: Point) -> None:
        """Nothing."""

    def event(self, event: Event) -> None:
        """Nothing."""

    def directive(self) -> Directive:
        """Rank 0's word counts; nobody asks."""
        return Directive.GO_ON

    def close(self) -> Any:
        """Nothing."""
