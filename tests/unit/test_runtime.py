"""What a worker's process is set to: torch's own word for what its allocators run with."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from trainer.contract.memory import ALLOCATOR
from trainer.runtime import Runtime

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


def on(device: str) -> Runtime:
    return Runtime(torch.device(device), torch.float32, torch.float32, compile=False)


def test_a_batch_stays_where_it_is_for_a_cpu() -> None:
    batch = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert on("cpu").pinned(batch) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_pinned_for_a_gpu() -> None:
    batch = np.arange(6, dtype=np.int32).reshape(2, 3)
    pinned = on("cuda:0").pinned(batch)
    np.testing.assert_array_equal(pinned, batch)
    assert torch.from_numpy(pinned).is_pinned()
