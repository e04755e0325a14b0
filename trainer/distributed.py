"""The ranks of one attempt: who they are, and the few things they agree on.

Plain functions over torch.distributed that do nothing when there is one worker, so that the loop
has one shape for any world size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

OWN_MESSAGE_BYTES = 1 << 20  # from here on a message's latency no longer counts


@dataclass(frozen=True)
class World:
    """One rank among the workers of an attempt."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the attempt."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add up tensors over the ranks, in place.

        Large ones travel as they are, all at once; the others of a dtype in one message. So no
        second copy of the gradients exists. Every rank must call it with tensors alike.
        """
        if self.size == 1:
            return
        on_their_way: list[Any] = []
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes >= OWN_MESSAGE_BYTES and tensor.is_contiguous():
                on_their_way.append(dist.all_reduce(tensor, async_op=True))
            else:
                by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            offset = 0
            for tensor in group:
                tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
                offset += tensor.numel()
        for work in on_their_way:
            work.wait()

    def share(self, value: int) -> int:
        """Rank 0's value, on every rank. Every rank must call it at the same point."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=_meeting_device())
        dist.broadcast(box, src=0)
        return int(box.item())

    def all_true(self, *values: bool) -> list[bool]:
        """For each value whether it is true on every rank. Every rank must call it."""
        if self.size == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.int64, device=_meeting_device())
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return [bool(value) for value in box.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank; for small values at the start."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share_object(self, value: T) -> T:
        """Rank 0's value, pickled between our own processes; for small values at the start."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=_meeting_device())
        return box[0]


def _meeting_device() -> torch.device:
    """Where collective messages live: NCCL speaks only of device memory."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
