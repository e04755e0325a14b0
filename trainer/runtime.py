"""What a worker's process is set to before it builds anything: device, threads, determinism.

The only module that changes process-wide settings of torch. Call `prepare` once, first.

Invariant: two attempts of one job get the same settings on the same kind of machine, whatever step
they start at: everything here is a function of the spec and the hardware.
"""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch._dynamo.config
import torch._functorch.config

from trainer.contract.devices import Device, find_device
from trainer.contract.memory import ALLOCATOR, compiles
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Compute, Embeddings, JobSpec
from trainer.distributed import World

MEMORY = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of this container's own, under cgroup v2


KINDS_OF_LAYER = 64  # far more than windows and value embeddings make; beyond, compiling fails


class NoCardError(RuntimeError):
    """The card that this process was given is not there for CUDA."""


def require_card() -> None:
    """Raise NoCardError where CUDA has no device: a GPU's work on a CPU would take months."""
    if not torch.cuda.is_available():
        reason = "CUDA has no device in this process; see nvidia-smi and dmesg on its box"
        raise NoCardError(f"the worker was given a card, but {reason}")


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute."""

    device: torch.device
    compute_dtype: torch.dtype
    embedding_dtype: torch.dtype
    compile: bool

    def pinned(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array where a GPU copies from beside what it computes; on a CPU as it is.

        For any thread. Torch's allocator gives the memory to nobody else before the copy is done.
        """
        if self.device.type != "cuda":
            return array
        with torch.cuda.device(self.device):  # each thread has its own; the first one otherwise
            pinned: npt.NDArray[Any] = torch.from_numpy(array).pin_memory().numpy()
            return pinned


def prepare(
    spec: JobSpec, shape: ModelShape, start_step: int, threads: int, world: World, cache: Path
) -> Runtime:
    """Set this process up for a job.

    Args:
        start_step: the job's own start (not the attempt's).
        threads: of torch, within operations.
        cache: folder that survives restarts, for compiled kernels.
    """
    # Read by torch when it first compiles or touches CUDA, so before either.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)
    if spec.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    # What a pointwise kernel can make again from what is kept anyway isn't kept for the backward
    # pass: a third less is alive at its start, and steps take no longer (docs/log.md).
    functorch = torch._functorch.config
    functorch.ban_recompute_used_far_apart = False
    functorch.ban_recompute_long_fusible_chains = False
    functorch.ban_recompute_materialized_backward = False
    torch._dynamo.config.recompile_limit = KINDS_OF_LAYER
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(spec.deterministic)
    # Filling every fresh tensor costs time and hides nothing here: no kernel reads what it
    # didn't write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cpu")
    if spec.resources.gpus_per_worker and torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    low = spec.precision.compute is Compute.BF16
    compute = torch.bfloat16 if low else torch.float32
    tables = compute if spec.precision.embeddings is Embeddings.COMPUTE else torch.float32
    return Runtime(
        device, compute, tables, compiles(spec, shape, start_step, gpu=device.type == "cuda")
    )


def settle() -> None:
    """Once all is compiled: give back what nobody holds any more, and have Python's collector leave
    alone what compiling keeps. It would be gone through again and again. Takes some 0.2 s.
    """
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def look(device: torch.device) -> Device:
    """What is known of a device, and what of its memory is free now.

    On a CPU: the machine's memory, or less where this container may not have all of it.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        card = torch.cuda.get_device_properties(device)
        return find_device(card.name, card.total_memory, free_bytes)
    lines = (line.split() for line in MEMORY.read_text().splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines}
    limit = found["MemTotal:"]
    if CONTAINER_LIMIT.exists() and (text := CONTAINER_LIMIT.read_text().strip()) != "max":
        limit = min(limit, int(text))
    return Device("cpu", memory_bytes=limit, free_bytes=min(found["MemAvailable:"], limit))
