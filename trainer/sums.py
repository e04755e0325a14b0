"""Gradients on their way to the ranks that own them, while the backward pass goes on.

Owns when a gradient leaves and in which order. Must not know the network or the optimizer.

Invariant: a gradient leaves after the last micro-step has added to it, and every rank sends the
same messages in the same order, the one that rank 0's first step came by them in. Where a rank
comes by them otherwise they only leave later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from trainer.distributed import World, travels_alone


class GradientSums:
    """Adds a step's gradients up over the ranks, each at its owner; elsewhere it is used up.

    Args:
        owned: every parameter with the rank that owns it, alike on every rank.
    """

    def __init__(self, world: World, owned: Iterable[tuple[nn.Parameter, int]]) -> None:
        self._world = world
        self._owned = list(owned)
        self._number = {id(parameter): n for n, (parameter, _) in enumerate(self._owned)}
        self._order: list[int] | None = None
        self._complete: list[int] = []
        self._sent: dict[int, Any] = {}
        self._last = False

    def last(self) -> None:
        """Call before a step's last micro-step, or gradients leave no sooner than at finish."""
        self._last = self._world.size > 1

    def added(self, parameter: nn.Parameter) -> None:
        """Call when a micro-step has added to a parameter's gradient, once a micro-step."""
        number = self._number[id(parameter)]
        if self._last and _grad_travels_alone(parameter):
            self._complete.append(number)
            self._send(set(self._complete))

    def finish(self) -> int:
        """Return once all sums are at their owners, with how many left before; on every rank."""
        if self._world.size == 1:
            return 0
        before = len(self._sent)
        alone = {n for n, (each, _) in enumerate(self._owned) if _grad_travels_alone(each)}
        if self._order is None:
            rest = sorted(alone - set(self._complete))
            self._order = self._world.share_object([*self._complete, *rest])
        self._send(alone)
        small = [each for n, each in enumerate(self._owned) if n not in alone]
        self._world.sum_at_owner_(
            (parameter.grad, rank) for parameter, rank in small if parameter.grad is not None
        )
        for work in self._sent.values():
            work.wait()
        self._last = False
        self._complete.clear()
        self._sent.clear()
        return before

    def _send(self, complete: set[int]) -> None:
        """Those that are complete, up to the first in the common order that is not."""
        for number in self._order or ():
            if number not in complete:
                return
            parameter, rank = self._owned[number]
            if number not in self._sent and parameter.grad is not None:
                self._sent[number] = self._world.start_sum_at(parameter.grad, rank)


def _grad_travels_alone(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and travels_alone(parameter.grad)
