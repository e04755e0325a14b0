"""One attempt from claim to outcome: puts the parts together and names how it ended.

For a rank under Ray as for a bare run; knows no Ray.

Invariant: `run_attempt` returns an outcome for every error that is not the process's own end, and
trains only after it has claimed an attempt number that names the checkpoint it starts from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from everstep.v1 import everstep_pb2 as pb
from trainer.assembly import Blueprint
from trainer.checkpoint.snapshot import Snapshots
from trainer.checkpoint.spool import Spool, salvage, sweep
from trainer.checkpoint.train_state import TrainState
from trainer.checkpoint.writer import CheckpointWriter
from trainer.contract.credential import AttemptIdentity, attempt_credential
from trainer.contract.memory import fitted, smaller_batch
from trainer.contract.outcome import (
    EXIT_CODES,
    FAILED_SAVE_S,
    FINAL_SAVE_S,
    AttemptResult,
    Outcome,
)
from trainer.contract.spec import JobSpec
from trainer.data.loader import Prefetcher
from trainer.distributed import World
from trainer.events import CheckpointPassedOver, Directive, Event, Point, Reporter, Warned
from trainer.failures import outcome_of
from trainer.gpu import watch_gpus
from trainer.logs import LoggingReporter, RankLog
from trainer.loop import Loop, LoopEnd, Parts
from trainer.output import secrets_of
from trainer.pace import Pace
from trainer.report import ServiceReporter
from trainer.runtime import look, prepare, require_card, settle
from trainer.start import START_BUDGET_S, Start, choose_start, load
from trainer.storage.layout import MAX_STEP
from trainer.storage.object_store import ObjectStore, StoreError, open_store
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retry import patiently
from trainer.watchdog import STALL_FLOOR_S, TICK_S, Stall, Watchdog

T = TypeVar("T")

MAX_MESSAGE = 2000
FIRST_RANK_S = 30.0  # what the other ranks leave rank 0 to end an attempt that stands still
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
    node_id: str = ""
    has_card: bool = False  # by Ray's word; logical GPUs have none, and train on the CPU
    output: tuple[int, ...] = ()  # what this process alone writes to, kept with the log
    on_claim: Callable[[int], None] = lambda number: None
    reporter: Reporter | None = None
    # Of an attempt that stands still: tells where a rank is and returns what all ranks have told;
    # tells how the attempt ends, for nobody will return from it; ends this process.
    stacks: Callable[[int, str], dict[int, str]] = lambda rank, text: {rank: text}
    on_stall: Callable[[AttemptResult], None] = lambda result: None
    end_process: Callable[[int], object] = os._exit
    stall_floor_s: float = STALL_FLOOR_S
    watch_tick_s: float = TICK_S


class _Progress:
    """How far an attempt got, for the result of one that failed."""

    attempt = 0
    state: TrainState | None = None
    spec: JobSpec | None = None  # with the device batch in force

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
        outcome = outcome_of(error)
        message = str(error) if outcome is not Outcome.CODE_ERROR else repr(error)
        if outcome is Outcome.OUT_OF_MEMORY:
            outcome, message = _out_of_memory(context, world, progress, message)
        return AttemptResult(progress.attempt, outcome, message[:MAX_MESSAGE], progress.step)


def _out_of_memory(
    context: AttemptContext, world: World, progress: _Progress, message: str
) -> tuple[Outcome, str]:
    """Note in the bucket what did not fit: no later attempt, on whichever host, goes back to it."""
    if progress.spec is None:  # a smaller batch is no help, so the restart is paid from the budget
        return Outcome.WORKER_LOST, f"out of memory before training began: {message}"
    rows = progress.spec.batch.device_batch_size
    smaller = smaller_batch(progress.spec, world.size)
    if smaller is None:
        return Outcome.OUT_OF_MEMORY_AT_ONE_ROW, f"not even one row fits: {message}"
    repository = CheckpointRepository(open_store(context.storage_uri), context.job_id)
    try:
        patiently(lambda: repository.note_too_large(progress.attempt, rows), START_BUDGET_S)
    except StoreError as error:
        return Outcome.STORE_UNAVAILABLE, f"out of memory, which could not be noted: {error}"
    return (
        Outcome.OUT_OF_MEMORY,
        f"device_batch_size {rows} does not fit, the next attempt takes {smaller}: {message}",
    )


def _run(
    context: AttemptContext, world: World, progress: _Progress, cleanup: contextlib.ExitStack
) -> AttemptResult:
    """Claim, build, train, save. What is opened is closed by cleanup, newest first."""
    own_log = _begin(context, world)
    cache = Path(context.cache_dir)
    store = open_store(context.storage_uri)
    repository = CheckpointRepository(store, context.job_id)
    # Reading may be repeated; so may salvage, and claiming: the number is then claimed anew.
    blueprint = patiently(
        lambda: Blueprint.read(repository.document(), context.threads), START_BUDGET_S
    )
    spool = Spool(cache / "spool", context.job_id)
    copies = cache / "restore" / f"{context.job_id}-{context.host_number}"
    cleanup.callback(shutil.rmtree, copies, ignore_errors=True)  # where loading fails
    start = _start(context, world, repository, blueprint, spool, copies)
    progress.attempt, progress.state = start.attempt, start.state
    asked = blueprint.spec.batch.device_batch_size
    blueprint = replace(blueprint, spec=fitted(blueprint.spec, world.size, start.too_large))
    progress.spec = blueprint.spec
    _ship_logs(context, world, own_log, store, start.attempt, cleanup)
    reporter = LoggingReporter(_reporter(context, world, start))
    cleanup.callback(reporter.close)
    runtime = prepare(
        blueprint.spec, blueprint.shape, blueprint.start_step, context.threads, world, cache
    )
    hardware = look(runtime.device)  # before anything of ours takes its memory
    validation = blueprint.validation(cache)
    _say_how_it_starts(reporter, start, blueprint.spec, asked, len(validation.rows))
    model, optimizer, sums = blueprint.model(runtime, world)
    load(start, store, copies, model, optimizer, world)
    writer = CheckpointWriter(
        repository,
        blueprint.provenance(start.attempt, validation),
        blueprint.retention(),
        Snapshots(model, optimizer, world),
        spool,
        reporter,
        world,
    )
    cleanup.callback(writer.close)
    # An attempt that fails doesn't give up a checkpoint that is on its way.
    cleanup.callback(writer.drain, FAILED_SAVE_S)
    reader = blueprint.shard_reader(cache)
    cleanup.callback(reader.close)
    batches = Prefetcher(blueprint.loader(reader, start.state.position, world), runtime.pinned)
    cleanup.callback(batches.close)
    parts = Parts(
        spec=blueprint.spec,
        world=world,
        device=runtime.device,
        model=model,
        learn=model.learn,
        settle=settle,
        optimizer=optimizer,
        sums=sums,
        schedule=blueprint.schedule(),
        batches=batches,
        reporter=reporter,
        writer=writer,
        evaluate=blueprint.evaluation(model, runtime, world, validation),
        sample=blueprint.sampler(model, runtime) if world.is_first else None,
        gpus=watch_gpus(world, runtime.device, cleanup),
        hardware=hardware,
        mfu=blueprint.mfu(hardware, world),
        watchdog=_watchdog(context, world, reporter, progress),
        pace=Pace(world, runtime.device),
    )
    return _ended(writer, world, start, Loop(parts, start.state).run())


def _begin(context: AttemptContext, world: World) -> RankLog:
    """Keep what this rank writes before anything can fail; first of that its card."""
    secrets = [context.host_key, *secrets_of(os.environ)]
    own_log = RankLog(context.storage_uri, context.job_id, world.rank, context.output, secrets)
    if context.has_card:
        require_card()
    return own_log


def _ship_logs(
    context: AttemptContext,
    world: World,
    own_log: RankLog,
    store: ObjectStore,
    attempt: int,
    cleanup: contextlib.ExitStack,
) -> None:
    """From here on the log is kept in the bucket; its first line says who speaks."""
    identity = AttemptIdentity(context.job_id, context.host_number, attempt)
    credential = attempt_credential(context.host_key, identity)
    cleanup.callback(own_log.ship(store, attempt, credential).close)
    place = (world.rank, world.size, attempt, context.host, os.getpid())
    log.info("rank %d of %d, attempt %d at %s, process %d", *place)
    if context.output and not own_log.files:
        log.warning("what is not logged is not kept: this process writes to a pipe, not to a file")


def _say_how_it_starts(
    reporter: Reporter, start: Start, spec: JobSpec, asked: int, validation_rows: int
) -> None:
    """What of the start is not as the spec would have it; asked: its device batch."""
    for rejected in start.rejected:
        reporter.event(CheckpointPassedOver(rejected.ref, rejected.reason))
    if start.other_data:
        message = "the data is not the parent's: training begins at its first row"
        reporter.event(Warned(start.state.step, message))
    if (rows := spec.batch.device_batch_size) != asked:
        message = (
            f"device_batch_size {rows} instead of {asked}, which ran out of memory; the step stays "
            f"{spec.batch.total_batch_size} tokens, but its sums are added in another "
            f"order: weights are no longer to the bit those of a run at {asked}"
        )
        reporter.event(Warned(start.state.step, message))
    if validation_rows < spec.evaluate_rows:
        message = (
            f"evaluate.tokens asks for {spec.evaluate_rows} rows of {spec.model.max_seq_len} "
            f"tokens, the validation shard has {validation_rows}: bits per byte is measured on them"
        )
        reporter.event(Warned(start.state.step, message))


def _start(
    context: AttemptContext,
    world: World,
    repository: CheckpointRepository,
    blueprint: Blueprint,
    spool: Spool,
    copies: Path,
) -> Start:
    """Every box brings what it still has to the store; then rank 0 chooses and claims.

    First the parts of all boxes, then the commit by the one that rank 0 of that time was on.
    """

    def choose() -> Start:
        start = choose_start(repository, blueprint.document, copies, context.host)
        return replace(start, too_large=repository.too_large())

    def on_each_box(work: Callable[[], T]) -> None:
        world.all_do(lambda: world.local_rank == 0 and patiently(work, START_BUDGET_S))

    for killed in copies.parent.glob(f"{context.job_id}-*"):  # while it loaded
        shutil.rmtree(killed, ignore_errors=True)
    on_each_box(lambda: salvage(spool, repository, commits=False))
    on_each_box(lambda: salvage(spool, repository, commits=True))
    chosen = world.all_do(lambda: patiently(choose, START_BUDGET_S) if world.is_first else None)
    if chosen is not None:
        context.on_claim(chosen.attempt)  # before any rank can tell how the attempt ended
    start = world.share_object(chosen)
    assert start is not None, "rank 0 has chosen"
    if world.local_rank == 0:
        spool.drop(MAX_STEP)  # of attempts that this one follows
        for left in (copies.parent, Path(context.cache_dir) / "spool"):
            sweep(left, context.job_id, time.time())
    world.meet()  # before anybody writes there
    return start


def _watchdog(
    context: AttemptContext, world: World, reporter: Reporter, progress: _Progress
) -> Watchdog:
    late = partial(_stands_still, context, world, reporter, progress)
    return Watchdog(late, context.stall_floor_s, context.watch_tick_s)


def _stands_still(
    context: AttemptContext, world: World, reporter: Reporter, progress: _Progress, stall: Stall
) -> None:
    """Say where every rank is; once sure, end this process, for its training thread never will."""
    words = f"{stall.words}; after step {progress.step} "
    log.error("%sthis rank is at\n%s", words, stall.stack)
    known = {world.rank: stall.stack}
    with contextlib.suppress(
        Exception
    ):  # the host may be gone; the end of this process is told too
        known |= context.stacks(world.rank, stall.stack)
    if not stall.sure:
        return
    if not world.is_first:
        time.sleep(FIRST_RANK_S)  # rank 0 speaks for all, if it can
    for rank, stack in sorted(known.items()):
        reporter.event(Warned(progress.step, f"{words}rank {rank} is at\n{stack[-MAX_MESSAGE:]}"))
    reporter.close()
    message = words + "every rank's place is in the events"
    result = AttemptResult(progress.attempt, Outcome.STALLED, message, progress.step)
    with contextlib.suppress(Exception):
        context.on_stall(result)
    context.end_process(EXIT_CODES[Outcome.STALLED])


def _ended(writer: CheckpointWriter, world: World, start: Start, end: LoopEnd) -> AttemptResult:
    """Wait for the last checkpoint: a job is not done before it is safe, of all ranks.

    Every rank tells the same end, but where one alone knows of it.
    """
    result = AttemptResult(start.attempt, end.outcome, end.message, start.state.step)
    if end.outcome in (Outcome.STALE_WRITER, Outcome.HYPERPARAMETERS_NOT_APPLIED):
        return result
    saved = writer.drain(FINAL_SAVE_S)
    saved, current, on_disk = world.all_true(saved, not writer.stale, writer.on_disk)
    if not current:
        message = "a newer attempt of this job is at work"
        return replace(result, outcome=Outcome.STALE_WRITER, message=message)
    committed = world.share_object(writer.committed)
    if committed is not None:
        writer.forget(committed.step)
        result = replace(result, checkpoint_step=committed.step)
    message = end.message
    if end.outcome is Outcome.NOT_FINITE:
        message += f"; the last good checkpoint is {committed or start.ref or 'none'}"
    if saved:
        return replace(result, message=message)
    kept = "stays on the boxes' disks, from where the next attempt there brings it to the store"
    message += (
        f"; the last checkpoint could not be stored within {FINAL_SAVE_S:.0f} s and "
        f"{kept if on_disk else 'not every disk took it: its steps are lost'}"
    )
    outcome = Outcome.STORE_UNAVAILABLE if end.outcome is Outcome.COMPLETED else end.outcome
    return replace(result, outcome=outcome, message=message)


def _reporter(context: AttemptContext, world: World, start: Start) -> Reporter:
    if context.reporter is not None:
        return context.reporter
    if not world.is_first:
        return _Silent()
    identity = AttemptIdentity(context.job_id, context.host_number, start.attempt)
    hello = pb.Hello(
        job_id=context.job_id,
        attempt=start.attempt,
        start_step=start.state.step,
        node_id=context.node_id,
    )
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
