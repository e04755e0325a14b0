"""The sequence of rows that a job trains on, and each rank's share of every step.

Knows nothing of torch, models or checkpoints; a position is all that a checkpoint must keep.

Invariant: the sequence of rows is a pure function of (binding, tokenizer, order_seed, T). A step
takes the next rows of it whatever the world size, and a loader made at `position_after` goes on
exactly where the one before it stopped, in any epoch.
Shapes: B rows a micro-step on one rank, T tokens of context, R rows.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainer.data.packing import Rows, pack, shuffled
from trainer.data.shards import ShardReader
from trainer.data.tokenizer import Tokenizer
from trainer.storage.nanochat_files import NanochatStart

Inputs = npt.NDArray[np.int32]
Targets = npt.NDArray[np.int64]  # the type that cross entropy takes
POLL_S = 0.1  # how soon a closing prefetcher's thread notices


class EmptyDataError(ValueError):
    """The data yields not one whole row: give more text, or a smaller max_seq_len."""


class PositionError(ValueError):
    """A stored position does not fit: it is not one that a loader wrote."""


@dataclass(frozen=True, order=True)
class Position:
    """The next row: indices into the epoch's shuffled shards, row groups and rows."""

    epoch: int = 0
    shard: int = 0
    row_group: int = 0
    row: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON values."""
        return {
            "epoch": self.epoch,
            "shard": self.shard,
            "row_group": self.row_group,
            "row": self.row,
        }

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """From JSON values; PositionError."""
        names = {"epoch", "shard", "row_group", "row"}
        if not isinstance(fields, dict) or set(fields) != names:
            raise PositionError(f"{fields!r}: must have exactly {', '.join(sorted(names))}")
        if any(type(value) is not int or value < 0 for value in fields.values()):
            raise PositionError(f"{fields!r}: must be whole numbers from 0")
        return cls(**fields)


START = Position()


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimizer step."""

    micro: list[tuple[Inputs, Targets]]  # (x_BT, y_BT) of each micro-step
    position_after: Position
    tokens: int  # of the whole step, over all ranks


class RowSequence:
    """The job's rows in order, from any position. Keeps one packed row group; for one thread."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Tokenizer,
        *,
        T: int,
        seed: int,
        passed: NanochatStart | None = None,
    ) -> None:
        """passed: what nanochat had read already of one epoch, which is left out of it."""
        self._passed = passed
        self._reader = reader
        self._tokenizer = tokenizer
        self._T = T
        self._seed = seed
        self._packed: tuple[tuple[int, int, int], Rows] | None = None

    def take(self, position: Position, count: int) -> tuple[Rows, Position]:
        """The next count rows [count, T + 1] from a position, and the position after them.

        Raises:
            EmptyDataError: a whole epoch has no row.
        """
        taken: list[Rows] = []
        missing = count
        empty_since: Position | None = None  # where a stretch without any row began
        while missing:
            if position.shard >= len(self._reader.binding.shards):
                position = Position(position.epoch + 1)
            rows = self._rows(position)
            here = rows[position.row : position.row + missing] if rows is not None else None
            if here is not None and len(here):
                taken.append(here)
                missing -= len(here)
                position = replace(position, row=position.row + len(here))
                empty_since = None
                continue
            empty_since = empty_since or position
            # Two epochs on, every row group has been seen from its first row.
            if position.epoch - empty_since.epoch >= 2:
                raise EmptyDataError(
                    f"{self._reader.binding.source} has no row of {self._T + 1} tokens in any "
                    "row group"
                )
            if rows is None:
                position = Position(position.epoch, position.shard + 1)
            else:
                position = Position(position.epoch, position.shard, position.row_group + 1)
        return np.concatenate(taken), position

    def _rows(self, at: Position) -> Rows | None:
        """The shuffled rows of the row group at a position; None past the shard's last."""
        key = (at.epoch, at.shard, at.row_group)
        if self._packed and self._packed[0] == key:
            return self._packed[1]
        shards = self._reader.binding.shards
        shard = shards[shuffled(len(shards), "shards", self._seed, at.epoch)[at.shard]]
        groups = self._reader.row_groups(shard)
        if at.row_group >= groups:
            return None
        order = shuffled(groups, "row groups", self._seed, at.epoch, shard.name)
        group = order[at.row_group]
        if self._was_passed(at.epoch, shards.index(shard), group):
            return np.empty((0, self._T + 1), dtype=np.int32)
        texts = self._reader.texts(shard, group)
        documents = self._tokenizer.encode_documents(texts, f"{shard.name} row group {group}")
        rows, _ = pack(documents, self._T)
        rows = rows[shuffled(len(rows), "rows", self._seed, at.epoch, shard.name, group)]
        self._packed = (key, rows)
        return rows

    def _was_passed(self, epoch: int, shard: int, group: int) -> bool:
        at = self._passed
        return at is not None and epoch == at.epoch and (shard, group) <= (at.shard, at.row_group)


class Loader:
    """One rank's batches. Every rank walks the same sequence and takes its slices.

    closing: the reader's; no step waits any longer for a store once it is set.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Tokenizer,
        *,
        T: int,
        rows_per_step: int,
        device_batch_size: int,
        order_seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Position = START,
        passed: NanochatStart | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        self._accum_steps, rest = divmod(rows_per_step, device_batch_size * world_size)
        if rest or not self._accum_steps:
            raise ValueError(
                f"{rows_per_step} rows a step: must be a multiple of device_batch_size "
                f"{device_batch_size} x world size {world_size}"
            )
        self._sequence = RowSequence(reader, tokenizer, T=T, seed=order_seed, passed=passed)
        self._T = T
        self._rows_per_step = rows_per_step
        self._B = device_batch_size
        self._rank = rank
        self._world_size = world_size
        self.position = position
        self.closing = reader.closing

    def next_step(self) -> StepBatch:
        """The next optimizer step; there is always one.

        Raises:
            EmptyDataError, DataChangedError, ShardFormatError, TokenizerError, StoreError.
        """
        rows, after = self._sequence.take(self.position, self._rows_per_step)
        micro = []
        for step in range(self._accum_steps):
            first = (step * self._world_size + self._rank) * self._B
            micro.append(split_targets(rows[first : first + self._B]))
        self.position = after
        return StepBatch(micro, after, self._rows_per_step * self._T)


def split_targets(rows: Rows) -> tuple[Inputs, Targets]:
    """Rows [B, T + 1] as inputs and targets [B, T], each contiguous."""
    return np.ascontiguousarray(rows[:, :-1]), rows[:, 1:].astype(np.int64)


class PrefetcherClosedError(RuntimeError):
    """The prefetcher was closed: make another one."""


class Prefetcher:
    """Prepares steps ahead in a thread of its own. Close it in the end.

    place: called in that thread with each array; gives what the device copies from.
    """

    def __init__(
        self,
        loader: Loader,
        place: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = np.asarray,
        depth: int = 2,
    ) -> None:
        self._loader = loader
        self._place = place
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=depth)
        self._stop = loader.closing
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def next_step(self) -> StepBatch:
        """As Loader.next_step, whose errors are raised here, now and at every later call.

        So are those of place.
        """
        while self._failure is None:
            if self._stop.is_set():
                raise PrefetcherClosedError("the prefetcher is closed")
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=POLL_S)
                if isinstance(item, StepBatch):
                    return item
                self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop and join the thread, after the step that it is preparing; one that waits for a
        store is given up. Safe to repeat; the loader's reader waits for nothing from now on.
        """
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            item: StepBatch | BaseException
            try:
                step = self._loader.next_step()
                micro = [(self._place(x), self._place(y)) for x, y in step.micro]
                item = replace(step, micro=micro)
            except BaseException as error:  # carried to the consumer, who raises it
                item = error
            self._hand_over(item)
            if isinstance(item, BaseException):
                return

    def _hand_over(self, item: StepBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return
