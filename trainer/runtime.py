"""What a worker's process is set to before it builds anything: device, threads, determinism.

The only module that changes process-wide settings of torch. Call `prepare` once, first.

Invariant: two attempts of one job get the same settings on the same kind of machine, whatever step
they start at: everything here is a function of the spec and the hardware.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.contract.shape import ModelShape
from trainer.contract.spec import Compile, Compute, Embeddings, JobSpec
from trainer.distributed import World

# On CPU compiling costs a minute or two of both cores and saves about a quarter of each step, at
# some 1e11 FLOP/s (assumption): it pays from here on.
CPU_COMPILE_PAYS_FLOPS = 5e13


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute."""

    device: torch.device
    compute_dtype: torch.dtype
    embedding_dtype: torch.dtype
    compile: bool


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
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if spec.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
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
    return Runtime(device, compute, tables, _compiles(spec, shape, start_step, device))


def _compiles(spec: JobSpec, shape: ModelShape, start_step: int, device: torch.device) -> bool:
    if spec.compile is not Compile.AUTO:
        return spec.compile is Compile.ON
    if device.type == "cuda":
        return True
    steps = spec.schedule.num_iterations - start_step
    flops = steps * spec.batch.total_batch_size * shape.flops_per_token
    return flops >= CPU_COMPILE_PAYS_FLOPS
