"""What a worker's process is set to: torch's own word for what its allocators run with."""

import os
import subprocess
import sys

from trainer.contract.memory import ALLOCATOR

CHILD = """
import tempfile
from pathlib import Path

import torch

from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.runtime import prepare

spec = JobSpec.parse({"model": {"depth": 2}})
prepare(spec, ModelShape.of(spec.model, 300), 0, 1, World(0, 1, 0), Path(tempfile.mkdtemp()))
print(torch._C._accelerator_getAllocatorSettings())
try:
    torch._C._accelerator_setAllocatorSettings("pinned_max_cached_size_mb:much")
except ValueError:
    print("torch reads it")  # of a key that it doesn't know it reads no value
"""


def test_snapshots_take_their_own_bytes_of_pinned_memory_not_the_next_power_of_two() -> None:
    unset = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env=unset, capture_output=True, text=True, check=True
    )
    assert child.stdout.splitlines() == [ALLOCATOR, "torch reads it"]
    settings = dict(each.split(":") for each in ALLOCATOR.split(","))
    cached_mb = int(settings["pinned_max_cached_size_mb"])
    assert cached_mb.bit_count() == 1, "a block of a larger bucket could be too small"
    assert "pinned_max_round_threshold_mb" not in settings, "what isn't cached isn't rounded"
