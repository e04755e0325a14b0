"""What a second worker brings: tokens a second of two workers against one, a thread each.

`python -m benchmarks.scaling [--depth 6] [--total-batch-size 8192]` (CPU only, gloo over loopback,
no Ray). The same step by one worker, by two that share the optimizer out, and by two that each
update everything, in alternation; medians. Communication: gradients to their owners or to all,
and updated weights back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer, clip_grad_norm
from trainer.ray_entrypoint import WORKER_ENVIRONMENT
from trainer.runtime import prepare
from trainer.sums import GradientSums

VOCAB_SIZE = 32768
WARM_STEPS = 2
ALONE, SHARED, WHOLE = "one worker", "two, optimizer shared out", "two, each updates everything"


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Two workers against one, a thread each.")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--total-batch-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", **WORKER_ENVIRONMENT}
    spec = {
        "model": {"depth": asked.depth, "head_dim": 64, "max_seq_len": 512},
        "batch": {"device_batch_size": 4, "total_batch_size": asked.total_batch_size},
        "evaluate": {"tokens": 512},
        "precision": {"compute": "fp32"},
        "compile": "on",
        "resources": {"gpus_per_worker": 0},
    }
    seconds: dict[str, list[dict[str, float]]] = {ALONE: [], SHARED: [], WHOLE: []}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        steps = {
            name: stack.enter_context(crew(name, 1 if name == ALONE else 2, spec, folder))
            for name in seconds
        }
        for step in steps.values():
            for _ in range(WARM_STEPS):
                step()
        for _ in range(asked.rounds):
            for name, step in steps.items():
                seconds[name].append(step())
    tell(asked.total_batch_size, seconds)


def tell(tokens: int, seconds: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians and their ratios."""
    whole = {
        name: statistics.median(sum(parts.values()) for parts in found)
        for name, found in seconds.items()
    }
    for name, found in seconds.items():
        parts = ", ".join(f"{p} {statistics.median(s[p] for s in found):.2f} s" for p in found[0])
        shared = statistics.median(s["communication"] / sum(s.values()) for s in found)
        print(
            f"{name}: {tokens / whole[name]:,.0f} tokens/s, x {whole[ALONE] / whole[name]:.2f}; "
            f"{whole[name]:.2f} s a step: {parts}; {shared:.1%} communication"
        )


@contextmanager
def crew(
    name: str, size: int, spec: dict[str, object], folder: str
) -> Iterator[Callable[[], dict[str, float]]]:
    """Workers that make a step when called; it gives rank 0's seconds by part."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(size)]
    processes = [
        spawn.Process(target=work, args=(name, rank, size, spec, folder, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def step() -> dict[str, float]:
        for ours, _ in pipes:
            ours.send(True)
        found: list[dict[str, float]] = [ours.recv() for ours, _ in pipes]
        return found[0]

    try:
        yield step
    finally:
        for process, (ours, _) in zip(processes, pipes, strict=True):
            ours.send(False)
            process.join()


def work(
    name: str, rank: int, size: int, asked: dict[str, object], folder: str, orders: Connection
) -> None:
    """One rank: a step for each true word."""
    world = World(rank, size, rank)
    if size > 1:
        meeting = f"file://{folder}/{name.replace(' ', '-')}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    spec = JobSpec.parse(asked)
    shape = ModelShape.of(spec.model, VOCAB_SIZE)
    runtime = prepare(spec, shape, 0, 1, world, Path(folder))
    groups = param_groups(spec, shape)
    model = GPT(shape, runtime.compute_dtype, runtime.embedding_dtype)
    model.init_weights(0)
    model.compile_loss()
    sharing = world if name == SHARED else World()
    optimizer = Optimizer(model, groups, runtime.compute_dtype, compile=True, world=sharing)
    sums = GradientSums(sharing, optimizer.owned(lambda parameter: parameter))
    model.tell_added(sums.added)
    schedule = Schedule(spec.schedule, groups)
    generator = torch.Generator().manual_seed(rank)
    batch = (spec.batch.device_batch_size, spec.model.max_seq_len + 1)
    micro_steps = spec.batch.total_batch_size // (batch[0] * spec.model.max_seq_len * size)
    while orders.recv():
        marks = [time.perf_counter()]
        for left in reversed(range(micro_steps)):
            if not left and name == SHARED:
                sums.last()
            ids_BT = torch.randint(0, VOCAB_SIZE, batch, generator=generator)
            model.learn(ids_BT[:, :-1], ids_BT[:, 1:], 1.0 / (micro_steps * size))
        marks.append(time.perf_counter())
        if name == SHARED:
            sums.finish()
        else:
            world.sum_(each.grad for each in model.parameters() if each.grad is not None)
        marks.append(time.perf_counter())
        clip_grad_norm(optimizer.own_parameters, world=sharing)
        optimizer.apply(schedule.at(0))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        if name == SHARED:
            world.spread_(optimizer.owned(lambda parameter: parameter.data))
        marks.append(time.perf_counter())
        computed, reduced, updated, spread = (b - a for a, b in pairwise(marks))
        orders.send(
            {
                "forward and backward": computed,
                "optimizer": updated,
                "communication": reduced + spread,
            }
        )
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
