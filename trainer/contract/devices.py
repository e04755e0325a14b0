"""GPUs by the name that the driver gives them: memory and dense bf16 peak.

Peaks are of tensor cores with fp32 accumulation, without sparsity, at the boost clock, as the
makers' data sheets have them (GeForce: tensor-core FLOPs a clock and SM x SMs x boost clock).

Invariant: what isn't in the table, or what a name leaves open, is None: absent, never wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
SAME_MEMORY = 0.12  # a driver keeps some of the memory to itself

# Share of the peak that training reaches by this project's FLOPs count (full windows, causal
# attention not halved). GeForce: 0.847 on an RTX 4070 and 0.842 on an RTX 5060 Ti, d12 in nanochat;
# their bf16 peak is half of what data-centre cards of the same silicon have, so it is easier to
# reach. Data-centre cards: an assumption, about what nanochat's own speed runs show.
GEFORCE_SHARE, DATA_CENTRE_SHARE = 0.84, 0.48

# name -> (memory in GiB, peak in TFLOP/s), one pair a variant
_TABLE: dict[str, tuple[tuple[float, float], ...]] = {
    "RTX 3060": ((12, 25.5), (8, 25.5)),
    "RTX 3060 Ti": ((8, 32.4),),
    "RTX 3070": ((8, 40.6),),
    "RTX 3070 Ti": ((8, 43.5),),
    "RTX 3080": ((10, 59.5), (12, 61.3)),
    "RTX 3080 Ti": ((12, 68.2),),
    "RTX 3090": ((24, 71.2),),
    "RTX 3090 Ti": ((24, 80.0),),
    "RTX 4060": ((8, 30.2),),
    "RTX 4060 Ti": ((8, 44.1), (16, 44.1)),
    "RTX 4070": ((12, 58.3),),
    "RTX 4070 SUPER": ((12, 71.0),),
    "RTX 4070 Ti": ((12, 80.2),),
    "RTX 4070 Ti SUPER": ((16, 88.2),),
    "RTX 4080": ((16, 97.5),),
    "RTX 4080 SUPER": ((16, 104.4),),
    "RTX 4090": ((24, 165.2),),
    "RTX 5060": ((8, 38.4),),
    "RTX 5060 Ti": ((8, 47.4), (16, 47.4)),
    "RTX 5070": ((12, 61.7),),
    "RTX 5070 Ti": ((16, 87.9),),
    "RTX 5080": ((16, 112.6),),
    "RTX 5090": ((32, 209.5),),
    "A100": ((40, 312.0), (80, 312.0)),
    "H100 PCIe": ((80, 756.0),),
    "H100 SXM": ((80, 989.4),),
    "H200": ((141, 989.4),),
    "L4": ((24, 121.0),),
    "L40S": ((48, 362.0),),
}


@dataclass(frozen=True)
class Device:
    """What is known of one device. free_bytes: what training may take, where somebody looked."""

    name: str
    memory_bytes: int | None = None
    peak_flops: float | None = None
    usual_share: float | None = None  # of the peak, in training
    free_bytes: int | None = None

    @property
    def usable_bytes(self) -> int | None:
        """What a plan compares with."""
        return self.free_bytes if self.free_bytes is not None else self.memory_bytes


def find_device(
    name: str, memory_bytes: int | None = None, free_bytes: int | None = None
) -> Device:
    """A device by its name ("NVIDIA GeForce RTX 4070", "rtx 4060 ti 16gb") and its memory."""
    wanted, told_gib = plain(name)
    variants = next((rows for known, rows in _TABLE.items() if plain(known)[0] == wanted), ())
    size = memory_bytes if memory_bytes is not None else told_gib and told_gib * GIB
    if size:
        variants = tuple(row for row in variants if abs(row[0] * GIB / size - 1) < SAME_MEMORY)
    sizes, peaks = {row[0] for row in variants}, {row[1] for row in variants}
    if memory_bytes is None and len(sizes) == 1:
        memory_bytes = int(sizes.pop() * GIB)
    peak = peaks.pop() * 1e12 if len(peaks) == 1 else None
    share = GEFORCE_SHARE if wanted.startswith("rtx") else DATA_CENTRE_SHARE
    return Device(name, memory_bytes, peak, share if peak else None, free_bytes)


def plain(name: str) -> tuple[str, int | None]:
    """A name without maker and spacing, and the memory that it tells."""
    text = name.lower().replace("nvidia", "").replace("geforce", "")
    memory = re.search(r"\b(\d+) ?gi?b\b", text)
    text = re.sub(r"\b\d+ ?gi?b\b", "", text)
    if "h100" in text and "hbm3" in text:  # what the driver calls the SXM form
        text = text.replace("hbm3", "sxm")
    if "a100" in text:
        text = re.sub(r"-?(sxm4|pcie|pg\d+)\S*", "", text)
    words = re.sub(r"[^a-z0-9]", "", text)
    return words, int(memory[1]) if memory else None
