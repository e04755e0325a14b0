"""How a rank's state is divided over files, and the bytes of a file. Pure but for `write_part`.

Knows no jobs and no store; who owns a parameter is for trainer/contract/ownership.py to say.

Invariant: a file's bytes are a function of its tensors alone. Format: safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.storage.layout import part_name
from trainer.storage.manifest import Part

MODEL = "model."
OPTIMIZER = "optimizer."
PART_BYTES = 128 << 20  # large enough for throughput; parts are verified and fetched side by side
ALIGN_BYTES = 64
WRITE_BYTES = 8 << 20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def parameter_of(name: str) -> str:
    """The parameter that a tensor of the state belongs to."""
    if name.startswith(OPTIMIZER):
        return name.removeprefix(OPTIMIZER).rpartition(".")[0]
    return name.removeprefix(MODEL)


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its rank's buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class PartLayout:
    """One file: its header, and the stretch [start, end) of the rank's buffer that follows it."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def start(self) -> int:
        """Where its bytes begin in the buffer."""
        return self.slots[0].start

    @property
    def end(self) -> int:
        """And where they end."""
        return self.slots[-1].end


def lay_out(tensors: Mapping[str, Tensor], rank: int) -> tuple[PartLayout, ...]:
    """Files for what a rank writes, in order of name, each about PART_BYTES."""
    found: list[PartLayout] = []
    start = 0
    for number, names in enumerate(_groups(tensors)):
        slots = []
        # Wide types first, so that every tensor is aligned to its own.
        for name in sorted(names, key=lambda each: (-tensors[each].element_size(), each)):
            tensor = tensors[name]
            end = start + tensor.nbytes
            slots.append(Slot(name, tensor.dtype, tuple(tensor.shape), start, end))
            start = end
        found.append(PartLayout(part_name(number, rank), _header(slots), tuple(slots)))
        start = -(-start // ALIGN_BYTES) * ALIGN_BYTES
    return tuple(found)


def write_part(path: Path, layout: PartLayout, buffer: memoryview) -> Part:
    """Write one file from the rank's buffer; its description comes from the bytes on their way."""
    digest = hashlib.sha256(layout.header)
    with path.open("wb") as file:
        file.write(layout.header)
        for start in range(layout.start, layout.end, WRITE_BYTES):
            piece = buffer[start : min(start + WRITE_BYTES, layout.end)]
            digest.update(piece)
            file.write(piece)
    return Part(
        name=layout.name,
        size_bytes=len(layout.header) + layout.end - layout.start,
        sha256=digest.hexdigest(),
        tensors=tuple(slot.name for slot in layout.slots),
    )


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        if names and size + tensors[name].nbytes > PART_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    if names:
        yield names


def _header(slots: list[Slot]) -> bytes:
    first = slots[0].start
    entries = {
        slot.name: {
            "dtype": DTYPES[slot.dtype],
            "shape": slot.shape,
            "data_offsets": (slot.start - first, slot.end - first),
        }
        for slot in slots
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
