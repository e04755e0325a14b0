"""The ranks of one attempt: who they are, and the few things they agree on.

Plain functions over torch.distributed that do nothing when there is one worker, so that the loop
has one shape for any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

SIGN_OF_LIFE_S = 5.0  # far less than ranks wait for one another
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
        """Add up tensors over the ranks, in place. Every rank must call it with tensors alike."""
        self._exchange([(tensor, None) for tensor in tensors], dist.all_reduce)

    def sum_at_owner_(self, owned: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Add up each tensor over the ranks, in place at its owner; elsewhere it is used up.

        Half the traffic of sum_. Every rank must call it with tensors and owners alike.
        """
        self._exchange(owned, lambda tensor, rank, **how: dist.reduce(tensor, dst=rank, **how))

    def start_sum_at(self, tensor: torch.Tensor, rank: int) -> Any:
        """The same of one tensor that travels alone, as work to wait for."""
        return dist.reduce(tensor, dst=rank, async_op=True)

    def spread_(self, owned: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Give every rank the owner's values of each tensor, in place. Every rank must call it."""
        self._exchange(owned, lambda tensor, rank, **how: dist.broadcast(tensor, src=rank, **how))

    def _exchange(
        self, tensors: Iterable[tuple[torch.Tensor, int | None]], collective: Callable[..., Any]
    ) -> None:
        """Large tensors travel as they are, all at once; the others of a dtype in one message.

        So no second copy of the gradients exists.
        """
        if self.size == 1:
            return
        on_their_way: list[Any] = []
        together: dict[tuple[torch.dtype, int | None], list[torch.Tensor]] = {}
        for tensor, rank in tensors:
            if travels_alone(tensor):
                on_their_way.append(collective(tensor, *_named(rank), async_op=True))
            else:
                together.setdefault((tensor.dtype, rank), []).append(tensor)
        for (_, rank), group in together.items():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            collective(flat, *_named(rank))
            offset = 0
            for tensor in group:
                tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
                offset += tensor.numel()
        for work in on_their_way:
            work.wait()

    def zero(self) -> torch.Tensor:
        """A scalar 0 in fp32 that can travel."""
        return torch.zeros((), device=_meeting_device() if self.size > 1 else None)

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

    def meet(self) -> None:
        """Return once every rank has called it."""
        self.all_true(True)

    def all_do(self, work: Callable[[], T]) -> T:
        """Do this rank's own work; return once every rank has done its own, however long it takes.

        For what may take longer than a collective waits; an error of work is raised at once. Work
        may not use collectives. Every rank must call it.
        """
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work)
            while True:
                wait([working], SIGN_OF_LIFE_S)
                if working.done():
                    working.result()  # its error isn't kept until the others are done
                if self.all_true(working.done())[0]:
                    return working.result()

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


def travels_alone(tensor: torch.Tensor) -> bool:
    """Whether it is sent as it is, and not in one message with others."""
    return tensor.nbytes >= OWN_MESSAGE_BYTES and tensor.is_contiguous()


def _named(rank: int | None) -> tuple[int, ...]:
    return () if rank is None else (rank,)


def _meeting_device() -> torch.device:
    """Where collective messages live: NCCL speaks only of device memory."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
