"""Parameters divided over any number of ranks: each has one owner, and none has much more to do."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.ownership import COPIES, owners
from trainer.contract.scaling import param_groups
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec

shapes = st.builds(
    lambda depth, kv, vocab: (
        JobSpec.parse({"model": {"depth": depth, "n_kv_head": kv, "aspect_ratio": 64}}),
        vocab,
    ),
    st.sampled_from([2, 4, 6, 12]),
    st.just(1),
    st.sampled_from([256, 32768]),
)


@given(of=shapes, ranks=st.integers(1, 9))
def test_each_parameter_has_one_owner_and_loads_differ_by_one_at_most(
    of: tuple[JobSpec, int], ranks: int
) -> None:
    spec, vocab = of
    shape = ModelShape.of(spec.model, vocab)
    sizes = shape.named_shapes()
    groups = param_groups(spec, shape)
    owner = owners(groups, sizes, ranks)
    assert owner == owners(groups, dict(reversed(sizes.items())), ranks)
    assert owner.keys() == sizes.keys()
    assert set(owner.values()) <= set(range(ranks))
    muon = {name for group in groups if group.kind == "muon" for name in group.parameters}
    work = {name: math.prod(sizes[name]) * min(sizes[name]) for name in muon}
    held = {
        name: COPIES["muon" if name in muon else "adamw"] * math.prod(size)
        for name, size in sizes.items()
    }
    for weights in (work, held):
        loads = [sum(w for n, w in weights.items() if owner[n] == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(weights.values())


def test_one_rank_owns_all() -> None:
    spec = JobSpec()
    shape = ModelShape.of(spec.model, 32768)
    owner = owners(param_groups(spec, shape), shape.named_shapes(), 1)
    assert set(owner.values()) == {0}
