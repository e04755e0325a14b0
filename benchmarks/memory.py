"""Predicted against measured memory: `python -m benchmarks.memory`, the whole grid.

Each size trains two steps in a process of its own with glibc told to give freed memory back, so
that resident memory is what tensors take. Then the two cards that others measured, which nothing
was fitted to. Prints a line a size; writes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from trainer.contract.memory import CPU_PROCESS_BYTES, estimate_memory
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm
from trainer.runtime import Runtime, prepare

# depth, aspect ratio, rows, tokens a row, vocabulary
SIZES = [(4, 64, 4, 512, 2048), (8, 32, 8, 128, 512), (6, 64, 4, 512, 8192), (4, 64, 4, 512, 32768)]

CARDS = {"RTX 4070": 9448.0, "RTX 5060 Ti": 9.4 * 1024}  # MiB, by their owners
CARDS_VOCABULARY = 32_768


def main() -> None:
    """Run the grid."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        measure(json.loads(sys.argv[1]))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for compiled, compute in product(("off", "on"), ("fp32", "bf16")):
        for depth, aspect, rows, tokens, vocabulary in SIZES:
            spec = {
                "model": {
                    "depth": depth,
                    "aspect_ratio": aspect,
                    "head_dim": aspect,
                    "max_seq_len": tokens,
                    "vocab_size": vocabulary,
                },
                "batch": {"device_batch_size": rows, "total_batch_size": rows * tokens},
                "evaluate": {"tokens": tokens},
                "precision": {"compute": compute},
                "compile": compiled,
                "resources": {"gpus_per_worker": 0},
            }
            command = [sys.executable, "-m", "benchmarks.memory", json.dumps(spec)]
            subprocess.run(command, env=environment, check=True)
    spec = JobSpec()  # what both cards' owners trained
    estimate = estimate_memory(spec, ModelShape.of(spec.model, CARDS_VOCABULARY))
    predicted = estimate.peak_bytes - estimate.parts["process"]  # torch counts no CUDA context
    for card, measured in CARDS.items():
        print(
            f"{card}, nanochat's own trainer at the default spec: predicted for ours "
            f"{predicted / 2**20:,.0f} MiB, measured {measured:,.0f} MiB "
            f"({predicted / 2**20 / measured - 1:+.1%}, not fitted)"
        )


def measure(data: dict[str, Any]) -> None:
    """Train two steps; the second counts."""
    spec = JobSpec.parse(data)
    vocabulary = spec.model.vocab_size
    assert vocabulary is not None
    shape = ModelShape.of(spec.model, vocabulary)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    with tempfile.TemporaryDirectory() as cache:
        step_peak(spec, shape, prepare(spec, shape, 0, threads, World(), Path(cache)))


def step_peak(spec: JobSpec, shape: ModelShape, runtime: Runtime) -> None:
    """Train and print."""
    vocabulary = shape.vocab_size
    model = GPT(shape, runtime.compute_dtype, runtime.embedding_dtype)
    model.init_weights(1)
    groups = param_groups(spec, shape)
    optimizer = Optimizer(model, groups, runtime.compute_dtype, compile=runtime.compile)
    schedule = Schedule(spec.schedule, groups)
    if runtime.compile:
        model.compile_loss()
    size = (spec.batch.device_batch_size, spec.model.max_seq_len)
    x, y = torch.randint(0, vocabulary, size), torch.randint(0, vocabulary, size)
    for step in range(2):
        idle = _reset()
        optimizer.apply(schedule.at(step))
        for _ in range(2):
            model.learn(x, y, 0.5)
        clip_grad_norm(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        peak = _status("VmHWM")
    predicted = estimate_memory(spec, shape).peak_bytes
    state = sum(each.nbytes for each in optimizer.state_tensors().values())
    held = (
        *model.parameters(),
        *(each.grad for each in model.parameters() if each.grad is not None),
    )
    state += sum(each.nbytes for each in held)  # gradients stay, zeroed
    measured = peak - idle + state + CPU_PROCESS_BYTES
    print(
        f"depth {shape.n_layer} width {shape.n_embd} rows {size[0]}x{size[1]} vocabulary "
        f"{vocabulary} {spec.precision.compute.value} compile {spec.compile.value}: predicted "
        f"{predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB "
        f"({predicted / measured - 1:+.1%})",
        flush=True,
    )


def _reset() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
