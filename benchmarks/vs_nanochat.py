"""Our trainer against nanochat's own model and optimizer, in alternation in one run.

`python -m benchmarks.vs_nanochat --nanochat CHECKOUT [--depth 4] [--dtype fp32]`, where CHECKOUT
is a clone of nanochat. Both sides get the same weights, tokens, rates, dtype and threads, are
compiled, and train a few steps in turn, each in a process of its own: nanochat's with the
environment as it is, ours with what our workers get, through the trainer's real loop. Losses of
both are printed, so that what is compared is seen to be the same.

Memory is the peak beyond imports, weights, gradients and optimizer state: resident memory on a
CPU (high-water mark since the last warm-up step), torch's own allocations on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from multiprocessing import get_context
from pathlib import Path

from benchmarks.nanochat_sides import Case, Turn, nanochat_side, our_side
from trainer.ray_entrypoint import WORKER_ENVIRONMENT


def compare(case: Case, warm: int, steps: int, rounds: int) -> None:
    """Run both sides in turn and print what they took."""
    spawn = get_context("spawn")
    pipes, processes = {}, []
    sides = (("nanochat", nanochat_side, {}), ("everstep", our_side, WORKER_ENVIRONMENT))
    for name, side, environment in sides:
        ours, theirs = spawn.Pipe()
        os.environ |= environment  # the first side's process has begun without it
        process = spawn.Process(target=side, args=(case, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.recv() == "ready"
        pipes[name] = ours
        processes.append(process)
    turns: dict[str, list[Turn]] = {name: [] for name in pipes}
    for count in [warm] + [steps] * rounds:
        for name, pipe in pipes.items():
            pipe.send(count)
            turns[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()
    report(case, turns, steps)


def report(case: Case, turns: dict[str, list[Turn]], steps: int) -> None:
    """Print figures of both sides and their ratios; the first turn warmed up."""
    for key, value in vars(case).items():
        if key not in ("checkout", "folder"):
            print(f"{key}={value}", end=" ")
    print()
    theirs, ours = (turns[name] for name in ("nanochat", "everstep"))
    apart = max(
        abs(a / b - 1.0)
        for one, two in zip(theirs, ours, strict=True)
        for a, b in zip(one.losses, two.losses, strict=True)
    )
    print(f"losses {theirs[0].losses[0]:.5f} to {theirs[-1].losses[-1]:.5f} (nanochat),", end=" ")
    print(f"{ours[0].losses[0]:.5f} to {ours[-1].losses[-1]:.5f}; at most {apart:.1e} apart")
    for name, all_turns in turns.items():
        measured = all_turns[1:]
        step_s = statistics.median(turn.wall_s for turn in measured) / steps
        peak = statistics.median(turn.peak_bytes for turn in measured)
        told = ", ".join(
            f"{part} {1000 * statistics.median(t.parts[part] for t in measured) / steps:.1f}"
            for part in measured[0].parts
        )
        print(
            f"{name}: {case.tokens / step_s:,.0f} tokens/s; ms a step {1000 * step_s:.1f}:", end=""
        )
        print(f" {told}; peak beyond weights, gradients, state {peak / 1e6:,.0f} MB")
    pairs = list(zip(theirs[1:], ours[1:], strict=True))
    speed = [one.wall_s / two.wall_s for one, two in pairs]
    print(
        f"tokens/s x {statistics.median(speed):.3f} ({min(speed):.3f} to {max(speed):.3f});",
        end=" ",
    )
    if case.device == "cpu":  # what other work on the machine disturbs least
        cpu = statistics.median(one.cpu_s / two.cpu_s for one, two in pairs)
        print(f"tokens per CPU second x {cpu:.3f};", end=" ")
    for part in theirs[1].parts:
        ratio = statistics.median(two.parts[part] / one.parts[part] for one, two in pairs)
        print(f"{part} time x {ratio:.3f};", end=" ")
    memory = statistics.median(two.peak_bytes / one.peak_bytes for one, two in pairs)
    print(f"memory x {memory:.3f}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nanochat", required=True, help="a clone of nanochat")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--aspect-ratio", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--device-batch-size", type=int, default=4)
    parser.add_argument("--total-batch-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--window-pattern", default="L")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    os.environ["NANOCHAT_DTYPE"] = {"fp32": "float32", "bf16": "bfloat16"}[asked.dtype]
    with tempfile.TemporaryDirectory() as folder:
        case = Case(
            checkout=str(Path(asked.nanochat).resolve()),
            folder=folder,
            depth=asked.depth,
            aspect_ratio=asked.aspect_ratio,
            head_dim=asked.head_dim,
            tokens_per_row=asked.max_seq_len,
            rows=asked.device_batch_size,
            tokens=asked.total_batch_size,
            vocabulary=asked.vocab_size,
            window_pattern=asked.window_pattern,
            dtype=asked.dtype,
            threads=asked.threads,
            device=asked.device,
        )
        compare(case, asked.warm, asked.steps, asked.rounds)


if __name__ == "__main__":
    main()
