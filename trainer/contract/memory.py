"""How much memory a worker's device needs at the peak of a step, by part.

What is exact: weights, gradients and optimizer state follow from the shape and the precision. What
is fitted: activations kept for the backward pass, the loss's chunks, and the update's temporaries,
from a grid of sizes on two CPU cores (benchmarks/memory.py prints predicted against measured).
Attention keeps no T x T matrix (scaled_dot_product_attention) and the loss no whole logits.

Invariant: linear in rows but for the loss, whose chunks are bounded; never below what is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from trainer.contract.devices import Device
from trainer.contract.ownership import owners
from trainer.contract.scaling import param_groups
from trainer.contract.shape import ModelShape
from trainer.contract.spec import Compile, Compute, Embeddings, JobSpec

FP32_BYTES, BF16_BYTES = 4, 2
CPU_CHUNK_BYTES = 32 * 2**20  # of one chunk's fp32 logits (trainer/loss.py)
GPU_CHUNK_BYTES = 256 * 2**20
CPU_PROCESS_BYTES = 340 * 10**6  # Python with torch loaded
GPU_CONTEXT_BYTES = 500 * 10**6  # assumption: CUDA's context and libraries, outside torch's count
# On CPU compiling costs a minute or two of both cores and saves about a quarter of each step, at
# some 1e11 FLOP/s (assumption): it pays from here on.
CPU_COMPILE_PAYS_FLOPS = 5e13
SNAPSHOTS = 2  # alive at most: the one being written and the next
# Torch's configuration of its allocators (PYTORCH_CUDA_ALLOC_CONF), read once, when torch is loaded
# or first used. Pinned host memory is rounded up to a power of two, for the sake of a cache of
# freed blocks; past the size that is cached it is not. So a snapshot takes its own bytes, as
# planned, and batches are far below. A power of two itself: a cached block must not be too small.
ALLOCATOR = "expandable_segments:True,pinned_max_cached_size_mb:64"


@dataclass(frozen=True)
class Kept:
    """Fitted: elements of the compute type kept for backward, and copies of temporaries.

    A layer keeps stream times the width and kv times the width of keys; the embedding and the last
    norm keep stem times the width. matrix_bytes: of copies of a matrix's weight. logits: fp32
    copies of a chunk's logits; head: of lm_head's gradient. update: fp32 copies of the largest
    stack of matrices; table: of the largest table.
    """

    stream: float
    logits: float
    head: float
    update: float
    table: float
    matrix_bytes: int = 0
    stem: float = 0.0
    kv: float = 3.6


# By whether it is compiled and whether it computes in bf16, which CPUs do through fp32 copies.
ON_CPU = {
    (False, False): Kept(stream=16.6, logits=7.1, head=0.0, update=7.0, table=5.0),
    (False, True): Kept(stream=34.9, logits=6.55, head=2.5, update=7.0, table=7.0, matrix_bytes=6),
    (True, False): Kept(stream=8.25, logits=0.75, head=0.1, update=3.6, table=1.0),
    (True, True): Kept(stream=8.0, logits=1.5, head=3.9, update=3.6, table=1.0, matrix_bytes=2),
}
# Assumption, for nothing was measured there: what compiled code on a CPU kept while it made nothing
# again, and three more gradients of lm_head. Rather too much than a plan that ends out of memory.
_GPU_EAGER = Kept(stream=19.9, stem=5.8, logits=5.2, head=4.0, update=7.0, table=7.0)
_GPU_COMPILED = Kept(stream=14.9, stem=6.0, logits=2.8, head=4.0, update=3.6, table=1.0)
ON_GPU = {
    (compiled, low): replace(kept, matrix_bytes=2 * low)
    for compiled, kept in ((False, _GPU_EAGER), (True, _GPU_COMPILED))
    for low in (False, True)
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step. parts: what is alive then, by name, in order.

    device_bytes: what the device has free, or all of it; None where unknown. largest_batch: the
    largest device_batch_size that fits and divides the step, 0 where none does; None as before.
    """

    parts: dict[str, int]
    device_bytes: int | None
    largest_batch: int | None
    snapshot_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def estimate_memory(
    spec: JobSpec, shape: ModelShape, device: Device | None = None, start_step: int = 0
) -> MemoryEstimate:
    """What one worker needs, and what would fit."""
    compiled = compiles(spec, shape, start_step, gpu=spec.resources.gpus_per_worker > 0)
    shares = _shares(spec, shape)
    moments = max(moments for _, moments in shares)
    parts = partial(_parts, spec, shape, moments, compiled)
    limit = device.usable_bytes if device is not None else None
    largest = None
    if limit is not None:
        step_rows = spec.batch.total_batch_size // spec.model.max_seq_len
        most = step_rows // spec.possible_workers[0]
        fitting = (
            each
            for each in range(most, 0, -1)
            if most % each == 0 and sum(parts(each).values()) <= limit
        )
        largest = next(fitting, 0)
    snapshot = SNAPSHOTS * max(map(sum, shares))
    return MemoryEstimate(parts(spec.batch.device_batch_size), limit, largest, snapshot)


def compiles(spec: JobSpec, shape: ModelShape, start_step: int, gpu: bool) -> bool:
    """Whether torch.compile is used."""
    if spec.compile is not Compile.AUTO or gpu:
        return spec.compile is not Compile.OFF
    steps = spec.schedule.num_iterations - start_step
    flops = steps * spec.batch.total_batch_size * shape.flops_per_token
    return flops >= CPU_COMPILE_PAYS_FLOPS


def smaller_batch(spec: JobSpec, world_size: int) -> int | None:
    """The largest device_batch_size up to half of the spec's that divides a worker's rows.

    None at one row: there is nothing smaller, and the step's tokens stay what was asked for.
    """
    rows = spec.batch.total_batch_size // spec.model.max_seq_len // world_size
    half = spec.batch.device_batch_size // 2
    return next((each for each in range(half, 0, -1) if rows % each == 0), None)


def fitted(spec: JobSpec, world_size: int, too_large: int | None) -> JobSpec:
    """The spec with its device batch halved until it is below one that ran out of memory.

    The global batch stays; only how a step is cut into micro-steps changes.
    """
    while too_large is not None and spec.batch.device_batch_size >= too_large:
        smaller = smaller_batch(spec, world_size)
        if smaller is None:
            break
        batch = spec.batch.model_copy(update={"device_batch_size": smaller})
        spec = spec.model_copy(update={"batch": batch})
    return spec


def state_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """A checkpoint: weights, AdamW's two moments, Muon's momentum and row moments."""
    return sum(sum(_bytes_of(spec, *each)) for each in shape.named_shapes().items())


def weight_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """All weights in the types that they are kept in; gradients have the same."""
    counts = shape.parameter_counts()
    tables = counts.wte + counts.value_embeds
    return tables * _table_bytes(spec) + (counts.total - tables) * FP32_BYTES


def size(count: float) -> str:
    """Bytes in decimal units, for messages."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _parts(
    spec: JobSpec, shape: ModelShape, moments: int, compiled: bool, rows: int
) -> dict[str, int]:
    """What is alive at the peak: either the end of a forward pass or the update."""
    gpu = spec.resources.gpus_per_worker > 0
    low = spec.precision.compute is Compute.BF16
    kept = (ON_GPU if gpu else ON_CPU)[compiled, low]
    weights = weight_bytes(spec, shape)
    found = {
        "weights": weights,
        "gradients": weights,
        "optimizer": moments,
    }
    activations, loss = _forward(shape, rows * shape.sequence_len, kept, low, gpu)
    update = _update(shape, kept)
    if activations + loss >= update:
        found |= {"activations": activations, "loss": loss}
    else:
        found["update"] = update
    found["process"] = GPU_CONTEXT_BYTES if gpu else CPU_PROCESS_BYTES
    return found


def _forward(shape: ModelShape, tokens: int, kept: Kept, low: bool, gpu: bool) -> tuple[int, int]:
    """Bytes of activations, and of the loss's chunk and gradients."""
    element = BF16_BYTES if low else FP32_BYTES
    width, kv_width = shape.n_embd, shape.n_kv_head * shape.head_dim
    layer = kept.stream * width + kept.kv * kv_width
    activations = tokens * element * (shape.n_layer * layer + kept.stem * width)
    activations += shape.parameter_counts().matrices * kept.matrix_bytes
    logits = tokens * shape.padded_vocab_size * FP32_BYTES
    bound = GPU_CHUNK_BYTES if gpu else CPU_CHUNK_BYTES
    chunks = -(-logits // bound)
    head = shape.padded_vocab_size * width * FP32_BYTES
    loss = kept.logits * logits / chunks + kept.head * head + tokens * width * element
    return int(activations), int(loss)


def _update(shape: ModelShape, kept: Kept) -> int:
    stacks: dict[tuple[int, ...], int] = {}
    for _, matrix in _matrices(shape):
        stacks[matrix] = stacks.get(matrix, 0) + matrix[0] * matrix[1]
    table = shape.padded_vocab_size * shape.n_embd
    return int(FP32_BYTES * max(kept.update * max(stacks.values()), kept.table * table))


def _shares(spec: JobSpec, shape: ModelShape) -> list[tuple[int, int]]:
    """Bytes of the weights that each worker owns and of their moments, on the fewest workers."""
    shapes = shape.named_shapes()
    held = [(0, 0)] * spec.possible_workers[0]
    for name, rank in owners(param_groups(spec, shape), shapes, len(held)).items():
        weight, moments = _bytes_of(spec, name, shapes[name])
        held[rank] = (held[rank][0] + weight, held[rank][1] + moments)
    return held


def _bytes_of(spec: JobSpec, name: str, size: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of a parameter, and of its moments."""
    count = math.prod(size)
    if name.startswith("transformer.h."):
        return FP32_BYTES * count, FP32_BYTES * (count + max(size))
    table = name.startswith(("transformer.wte.", "value_embeds."))
    weight = count * (_table_bytes(spec) if table else FP32_BYTES)
    return weight, 2 * weight


def _matrices(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    named = shape.named_shapes().items()
    return [(name, each) for name, each in named if name.startswith("transformer.h.")]


def _table_bytes(spec: JobSpec) -> int:
    low = spec.precision.compute is Compute.BF16
    return BF16_BYTES if low and spec.precision.embeddings is Embeddings.COMPUTE else FP32_BYTES
