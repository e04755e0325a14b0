"""The training loop over injected parts. Knows no Ray, no S3, no gRPC.

Invariant: a step either happens whole (update, state, position) or not at all, and what it applies
is what the schedule says: the first step proves it by reading the optimizer's groups back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoint.train_state import TrainState
from trainer.checkpoint.writer import CheckpointWriter, Waits
from trainer.contract.devices import Device
from trainer.contract.outcome import Outcome
from trainer.contract.schedule import GroupValues, Schedule
from trainer.contract.spec import JobSpec
from trainer.data.loader import StepBatch
from trainer.distributed import World
from trainer.events import (
    Directive,
    Evaluated,
    GpuSample,
    Point,
    Reporter,
    Sampled,
    ValuesInForce,
    Warned,
)
from trainer.optim import Optimizer, clip_grad_norm
from trainer.pace import Pace
from trainer.sums import GradientSums
from trainer.watchdog import Watchdog

SMOOTHING = 0.9  # weight of the past in the smoothed loss
APPLIED_TOLERANCE = 1e-9  # relative; values read back against the schedule's


class Batches(Protocol):
    """Where steps' tokens come from."""

    def next_step(self) -> StepBatch:
        """This rank's part of the next step."""


@dataclass(frozen=True)
class Parts:
    """All that a loop works with.

    learn: of inputs and targets, adds to the gradients of their mean loss a share of it, the last
    argument; returns the loss.
    """

    spec: JobSpec
    world: World
    device: torch.device
    model: nn.Module
    learn: Callable[[Tensor, Tensor, float], Tensor]
    optimizer: Optimizer
    sums: GradientSums
    schedule: Schedule
    batches: Batches
    reporter: Reporter
    writer: CheckpointWriter
    evaluate: Callable[[], tuple[float, str]]  # bits per byte and the evaluation set; all ranks
    sample: Callable[[], str] | None  # rank 0's
    gpus: Callable[[], tuple[GpuSample, ...]] = tuple  # new samples, or none
    hardware: Device | None = None  # what this rank computes on
    mfu: Callable[[float], float | None] = lambda step_s: None  # of a step that took so long
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(lambda stall: None))
    pace: Pace = field(default_factory=lambda: Pace(World(), torch.device("cpu")))
    settle: Callable[[], None] = lambda: None  # once, when the first step has compiled all there is


@dataclass(frozen=True)
class LoopEnd:
    """How the loop ended."""

    outcome: Outcome
    message: str


class Loop:
    """Trains from state.step to the horizon."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self._parts = parts
        self._state = state
        self._horizon = parts.spec.schedule.num_iterations
        self._saved_step = state.step  # what is already in a checkpoint, or need not be
        self._saved_at = time.monotonic()
        self._due_since: float | None = None  # a checkpoint that found no room; on all ranks alike
        self._checkpoint_s = 0.0  # spent on checkpoints since the last point
        self._told = Directive.GO_ON  # rank 0's word, as it came with the last step's sums

    def run(self) -> LoopEnd:
        """Train until the horizon, a stop, or a failure that the end names."""
        with self._parts.watchdog:
            return self._run()

    def _run(self) -> LoopEnd:
        first = True
        if self._parts.world.size > 1:
            self._told = Directive(self._parts.world.share(self._asked().value))
        while self._state.step < self._horizon:
            if self._agree() is Directive.STOP:
                self._checkpoint(wait=True)
                return LoopEnd(Outcome.STOPPED, f"stopped as asked after step {self._state.step}")
            if self._parts.writer.stale:
                return LoopEnd(Outcome.STALE_WRITER, "a newer attempt of this job is at work")
            end = self._step(first)
            if end is not None:
                return end
            if first:
                self._parts.settle()
            first = False
            with self._parts.watchdog.elsewhere():
                self._after_step()
        self._checkpoint(wait=True)
        return LoopEnd(Outcome.COMPLETED, f"reached the horizon, step {self._horizon}")

    def _step(self, first: bool) -> LoopEnd | None:
        """One optimizer step; an end where it must not be applied."""
        parts, state = self._parts, self._state
        began = time.monotonic()
        with parts.watchdog.elsewhere():  # a slow disk is no standstill of ours
            batch = parts.batches.next_step()
        data_wait_s = time.monotonic() - began
        values = parts.schedule.at(state.step)
        parts.optimizer.apply(values)
        parts.pace.begin(data_wait_s)
        loss_sum = torch.zeros((), device=parts.device)
        share = 1.0 / (len(batch.micro) * parts.world.size)
        for left, (x, y) in zip(range(len(batch.micro))[::-1], batch.micro, strict=True):
            if not left:
                parts.sums.last()
            x_BT = torch.from_numpy(x).to(parts.device, torch.int64, non_blocking=True)
            y_BT = torch.from_numpy(y).to(parts.device, non_blocking=True)
            loss_sum += parts.learn(x_BT, y_BT, share) * share
        gradient_norm, mean_loss, word, *busy_s = self._reduce(loss_sum)
        self._told = Directive(int(word))
        if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
            message = (
                f"step {state.step + 1}: loss {mean_loss}, gradient norm {gradient_norm}; "
                "no update was applied"
            )
            return LoopEnd(Outcome.NOT_FINITE, message)
        read_back = parts.optimizer.read()
        if first and (wrong := _differences(values.groups, read_back)):
            return LoopEnd(Outcome.HYPERPARAMETERS_NOT_APPLIED, "; ".join(wrong))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.world.spread_(parts.optimizer.owned(lambda parameter: parameter.data))
        past = state.loss_smoothed
        smoothed = mean_loss if past is None else SMOOTHING * past + (1 - SMOOTHING) * mean_loss
        state.step += 1
        state.tokens += batch.tokens
        state.position = batch.position_after
        state.in_force = values
        state.loss_smoothed = smoothed
        state.validation_bpb = None
        if first:
            parts.reporter.event(ValuesInForce(state.step, read_back, parts.hardware))
        step_s = time.monotonic() - began
        parts.watchdog.step(step_s - data_wait_s)
        parts.reporter.point(
            Point(
                step=state.step,
                loss=mean_loss,
                loss_smoothed=smoothed,
                gradient_norm=gradient_norm,
                step_s=step_s,
                data_wait_s=data_wait_s,
                tokens=state.tokens,
                tokens_per_s=batch.tokens / step_s,
                groups=values.groups,
                mfu_ratio=parts.mfu(step_s),
                devices=parts.gpus(),
                checkpoint_s=self._checkpoint_s,
                rank_busy_s=tuple(busy_s),
            )
        )
        self._checkpoint_s = 0.0
        for words in parts.pace.judge(busy_s):
            parts.reporter.event(Warned(state.step, words))
        return None

    @torch.no_grad()
    def _reduce(self, loss_sum: Tensor) -> list[float]:
        """Gradients to their owners; then their norm, the mean loss, rank 0's word, and the
        seconds that each rank was busy in the step before.
        """
        parts, world = self._parts, self._parts.world
        told = torch.zeros(2 + world.size, dtype=torch.float64, device=parts.device)
        told[0], told[2 + world.rank] = loss_sum, parts.pace.last_s
        told[1] = self._asked().value if world.size > 1 else 0
        parts.pace.end()
        parts.sums.finish()
        world.sum_([told])
        most = parts.spec.optimizer.grad_clip_norm
        norm = clip_grad_norm(parts.optimizer.own_parameters, most, world)
        found: list[float] = torch.cat([norm.double()[None], told]).tolist()  # the step's one sync
        return found

    def _after_step(self) -> None:
        """What is due at this step boundary: evaluation first, for the checkpoint carries it."""
        spec, state = self._parts.spec, self._state
        last = state.step == self._horizon
        if last or (spec.evaluate.every and state.step % spec.evaluate.every == 0):
            began = time.monotonic()
            bpb, evaluation_set = self._parts.evaluate()
            # A manifest takes no other; of bad weights the next step's loss tells.
            state.validation_bpb = bpb if math.isfinite(bpb) else None
            took_s = time.monotonic() - began
            self._parts.reporter.event(Evaluated(state.step, bpb, evaluation_set, took_s))
        due = spec.sample.every and state.step % spec.sample.every == 0
        if due and self._parts.sample is not None:
            began = time.monotonic()
            text = self._parts.sample()
            self._parts.reporter.event(Sampled(state.step, text, time.monotonic() - began))
        every = spec.checkpoint.every_steps
        if not last and every and state.step % every == 0:
            self._checkpoint()

    def _agree(self) -> Directive:
        """What to do before the next step: rank 0's word, common to all ranks.

        Of several as it was in the step before: a message of its own would wait for the device.
        """
        word = self._asked() if self._parts.world.size == 1 else self._told
        if word is Directive.CHECKPOINT or self._due_since is not None:
            self._checkpoint()
        return word

    def _asked(self) -> Directive:
        """Rank 0's word on what to do before the next step; the others have none."""
        if not self._parts.world.is_first:
            return Directive.GO_ON
        word = self._parts.reporter.directive()
        limit_s = self._parts.spec.checkpoint.every_s
        if limit_s and time.monotonic() - self._saved_at >= limit_s:
            word = max(word, Directive.CHECKPOINT, key=lambda each: each.value)
        return word

    def _checkpoint(self, wait: bool = False) -> None:
        """Hand a snapshot to the writer, unless these weights are in a checkpoint already.

        Where a rank has no room for one, all try again at the next step; wait: they wait for it.
        """
        if self._state.step == self._saved_step:
            return
        began = time.monotonic()
        with self._parts.watchdog.elsewhere():
            self._snapshot(wait)
        self._checkpoint_s += time.monotonic() - began

    def _snapshot(self, wait: bool) -> None:
        writer, world = self._parts.writer, self._parts.world
        began = time.monotonic()
        due_since = self._due_since or began
        if wait:
            writer.wait_for_room()
        room, well = world.all_true(writer.snapshots.room, writer.well)
        self._due_since = None if room else due_since
        if not room:
            return
        upcoming = world.share_object(writer.upcoming(well))
        taken = writer.snapshots.take(self._state)
        waits = Waits(time.monotonic() - began, began - due_since)
        writer.save(taken, waits, upcoming)
        self._saved_step = self._state.step
        self._saved_at = time.monotonic()


def _differences(wanted: dict[str, GroupValues], found: dict[str, GroupValues]) -> list[str]:
    """Where the optimizer would run with other values than the schedule's."""
    wrong = []
    for group, want in wanted.items():
        have = found[group]
        for name in ("lr", "momentum", "weight_decay"):
            ours, theirs = getattr(want, name), getattr(have, name)
            if not math.isclose(ours, theirs, rel_tol=APPLIED_TOLERANCE, abs_tol=0.0):
                wrong.append(f"{group} {name}: asked {ours!r}, in the optimizer {theirs!r}")
    return wrong
