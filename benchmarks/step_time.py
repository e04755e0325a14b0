"""A step of ours by part, and its share of this machine's own GEMM peak.

`python -m benchmarks.step_time [--depth 4] [--dtype fp32] [--eager]` (threads told; CPU only).
The peak is the quickest product among the shapes that the model multiplies, in the dtype in which
this machine multiplies it, taken in alternation with the steps; FLOPs a token are the plan's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.arithmetic import operand, product
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm
from trainer.runtime import prepare

WARM_STEPS = 2
PRODUCTS = 3  # of each shape, of which the quickest counts


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Step time and share of the GEMM peak.")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--device-batch-size", type=int, default=4)
    parser.add_argument("--total-batch-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    spec = JobSpec.parse(
        {
            "model": {
                "depth": asked.depth,
                "head_dim": 64,
                "max_seq_len": asked.max_seq_len,
                "vocab_size": asked.vocab_size,
            },
            "batch": {
                "device_batch_size": asked.device_batch_size,
                "total_batch_size": asked.total_batch_size,
            },
            "evaluate": {"tokens": asked.max_seq_len},
            "precision": {"compute": asked.dtype},
            "compile": "off" if asked.eager else "on",
            "resources": {"gpus_per_worker": 0},
        }
    )
    shape = ModelShape.of(spec.model, asked.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        step, rows = stepper(spec, shape, asked.threads, Path(folder))
        for _ in range(WARM_STEPS):
            step()
        steps, peaks = [], []
        for _ in range(asked.rounds):
            peaks.append(gemm_peak(shape, rows, torch.bfloat16 if asked.dtype == "bf16" else None))
            steps.append(step())
    tell(spec, shape, steps, peaks)


def stepper(
    spec: JobSpec, shape: ModelShape, threads: int, cache: Path
) -> tuple[Callable[[], dict[str, float]], int]:
    """A function that trains one step and gives its seconds by part; rows of a matmul."""
    runtime = prepare(spec, shape, 0, threads, World(), cache)
    groups = param_groups(spec, shape)
    model = GPT(shape, runtime.compute_dtype, runtime.embedding_dtype)
    model.init_weights(0)
    optimizer = Optimizer(model, groups, runtime.compute_dtype, compile=runtime.compile)
    if runtime.compile:
        model.compile_loss()
    schedule = Schedule(spec.schedule, groups)
    generator = torch.Generator().manual_seed(0)
    batch = (spec.batch.device_batch_size, spec.model.max_seq_len + 1)
    micro_steps = spec.batch.total_batch_size // (batch[0] * spec.model.max_seq_len)

    def step() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(micro_steps):
            ids_BT = torch.randint(0, shape.vocab_size, batch, generator=generator)
            model.learn(ids_BT[:, :-1], ids_BT[:, 1:], 1.0 / micro_steps)
        passed = time.perf_counter()
        clip_grad_norm(model.parameters())
        optimizer.apply(schedule.at(0))
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        return {"forward and backward": passed - began, "optimizer": done - passed}

    return step, batch[0] * spec.model.max_seq_len


def gemm_peak(shape: ModelShape, rows: int, dtype: torch.dtype | None) -> dict[str, float]:
    """FLOPs a second of products of the model's shapes [rows, inner] x [inner, columns]."""
    found = {}
    for inner, columns in (
        (shape.n_embd, shape.n_embd),
        (shape.n_embd, 4 * shape.n_embd),
        (shape.n_embd, shape.padded_vocab_size),
    ):
        left = operand(torch.randn(rows, inner).to(dtype or torch.float32))
        right = operand(torch.randn(columns, inner).to(dtype or torch.float32))
        quickest = float("inf")
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            product(left, right)
            quickest = min(quickest, time.perf_counter() - began)
        found[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / quickest
    return found


def tell(
    spec: JobSpec, shape: ModelShape, steps: list[dict[str, float]], peaks: list[dict[str, float]]
) -> None:
    """Print the medians."""
    step_s = statistics.median(sum(parts.values()) for parts in steps)
    parts = ", ".join(f"{p} {1000 * statistics.median(s[p] for s in steps):.0f}" for p in steps[0])
    tokens = spec.batch.total_batch_size
    print(f"{tokens / step_s:,.0f} tokens/s; {1000 * step_s:.0f} ms a step: {parts}")
    rates = {name: statistics.median(peak[name] for peak in peaks) for name in peaks[0]}
    best = max(rates, key=lambda name: rates[name])
    for name, rate in rates.items():
        print(f"  {name}: {rate / 1e9:,.0f} GFLOP/s")
    share = shape.flops_per_token * tokens / step_s / rates[best]
    print(f"{share:.1%} of the GEMM peak, {rates[best] / 1e9:,.0f} GFLOP/s at {best}")


if __name__ == "__main__":
    main()
