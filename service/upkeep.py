"""Which machines may hold jobs: not those that are drained or stop, nor those that run other code.

Invariant: what was drained stays so over restarts of service, Ray and machine, until it is undone:
it is known by its address, for Ray names it anew each time that it joins.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from service.placement import Node
from service.store import DrainStore
from trainer.contract import build


class Upkeep:
    """Marks nodes before anybody decides by them. Load it before it is asked."""

    def __init__(self, store: DrainStore) -> None:
        self._store = store
        self._drained: dict[str, str] = {}
        self._ours = build.labels()

    async def load(self) -> None:
        """Read what was drained before."""
        self._drained = await self._store.all()

    def mark(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The nodes, each with why it may not be used."""
        return tuple(
            replace(
                node,
                draining=node.draining or node.address in self._drained,
                kept_out=build.difference(node.labels, self._ours),
            )
            for node in nodes
        )

    def why_unused(self, node: Node) -> str:
        """In words; empty: jobs may be there."""
        stops = "it is being stopped" if node.draining else ""
        by = self._drained.get(node.address)
        return ", ".join(filter(None, (f"drained by {by}" if by else stops, node.kept_out)))

    def is_drained(self, address: str) -> bool:
        """Whether nothing may start there by somebody's word."""
        return address in self._drained

    async def drain(self, node: Node, actor: str) -> None:
        """From now on nothing starts there, and what is there leaves. Durable; safe to repeat."""
        await self._store.add(node.address, actor, time.time())
        await self.load()

    async def undo(self, address: str) -> None:
        """Jobs may be there again. Safe to repeat."""
        await self._store.remove(address)
        await self.load()
