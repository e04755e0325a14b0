"""State divided over any number of ranks, written as files, is the whole state again, once each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint import shares
from trainer.storage.manifest import Part

sizes = st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
states = st.dictionaries(st.sampled_from([f"p{n}" for n in range(9)]), sizes, min_size=1)


def state_of(layout: dict[str, tuple[int, torch.dtype]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (count, dtype) in layout.items():
        keys = (f"model.{name}", f"optimizer.{name}.exp_avg")
        tensors |= {key: torch.randn(count, generator=generator).to(dtype) for key in keys}
    return tensors


@settings(max_examples=60)
@given(layout=states, ranks=st.integers(1, 5), part_bytes=st.sampled_from([1, 64, 1 << 20]))
def test_any_number_of_ranks_writes_every_tensor_once(
    layout: dict[str, tuple[int, torch.dtype]], ranks: int, part_bytes: int
) -> None:
    tensors = state_of(layout)
    owner = {name: number % ranks for number, name in enumerate(sorted(tensors))}
    read: dict[str, Tensor] = {}
    described: list[Part] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(shares, "PART_BYTES", part_bytes),
    ):
        for rank in range(ranks):
            own = {name: tensor for name, tensor in tensors.items() if owner[name] == rank}
            layouts = shares.lay_out(own, rank)
            buffer = torch.zeros(layouts[-1].end if layouts else 0, dtype=torch.uint8)
            for slot in (slot for part in layouts for slot in part.slots):
                place = buffer[slot.start : slot.end].view(slot.dtype).view(slot.shape)
                place.copy_(own[slot.name])
            for each in layouts:
                path = Path(folder) / each.name
                part = shares.write_part(path, each, buffer.numpy().data)
                assert part == Part.of_file(path, each.name, part.tensors)
                found = load_file(path)
                assert set(found) == set(part.tensors or ())
                assert not read.keys() & found.keys()
                read |= found
                described.append(part)
    assert len({part.name for part in described}) == len(described)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
