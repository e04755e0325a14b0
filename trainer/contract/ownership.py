"""Which rank updates, keeps the optimizer state of, and writes each parameter.

Whole parameters only, so that a checkpoint says nothing of how many ranks wrote it and a resize is
nothing but a load. Knows no tensors and no collectives.

Invariant: every rank works out the same division from the same groups; each parameter has one
owner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trainer.contract.scaling import ParamGroup

# What a checkpoint holds of a parameter, in its own size: weight and moments.
COPIES = {"muon": 2, "adamw": 3}


def owners(
    groups: Sequence[ParamGroup], shapes: Mapping[str, tuple[int, ...]], ranks: int
) -> dict[str, int]:
    """The owner of each parameter of the groups.

    Matrices go by the work of their orthogonalisation, most first, each to the rank that has least
    of it; then tables and the rest, by size, to the rank that holds least.
    """
    matrices = [name for group in groups if group.kind == "muon" for name in group.parameters]
    others = [name for group in groups if group.kind != "muon" for name in group.parameters]
    sizes = {name: math.prod(shapes[name]) for name in (*matrices, *others)}
    work = {name: sizes[name] * min(shapes[name]) for name in matrices}
    owner = _deal(work, [0] * ranks)
    held = [0] * ranks
    for name, rank in owner.items():
        held[rank] += COPIES["muon"] * sizes[name]
    return owner | _deal({name: COPIES["adamw"] * sizes[name] for name in others}, held)


def _deal(weights: Mapping[str, int], load: list[int]) -> dict[str, int]:
    """The heaviest first, each to the least loaded; load grows by what is dealt."""
    owner: dict[str, int] = {}
    for name in sorted(weights, key=lambda each: (-weights[each], each)):
        rank = load.index(min(load))
        load[rank] += weights[name]
        owner[name] = rank
    return owner
