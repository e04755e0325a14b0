"""The two sides of benchmarks/vs_nanochat.py, each for a process of its own.

torch and what each side runs are imported in its function: a process holds its own side alone, and
memory is counted from its imports on.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SEED = 1


@dataclass(frozen=True)
class Case:
    """What both sides train."""

    checkout: str
    folder: str
    depth: int
    aspect_ratio: int
    head_dim: int
    tokens_per_row: int
    rows: int
    tokens: int
    vocabulary: int
    window_pattern: str
    dtype: str
    threads: int
    device: str

    def spec(self) -> Any:
        """As a job spec."""
        from trainer.contract.spec import JobSpec

        return JobSpec.parse(
            {
                "model": {
                    "depth": self.depth,
                    "aspect_ratio": self.aspect_ratio,
                    "head_dim": self.head_dim,
                    "max_seq_len": self.tokens_per_row,
                    "window_pattern": self.window_pattern,
                    "vocab_size": self.vocabulary,
                },
                "batch": {"device_batch_size": self.rows, "total_batch_size": self.tokens},
                "evaluate": {"tokens": self.tokens_per_row},
                "precision": {"compute": self.dtype},
                "compile": "on",
                "resources": {"gpus_per_worker": int(self.device == "cuda")},
            }
        )

    @property
    def weights(self) -> Path:
        """Where nanochat's side leaves the weights that both begin with."""
        return Path(self.folder) / "weights.pt"

    def micro_batches(self, step: int) -> list[tuple[Any, Any]]:
        """The step's inputs and targets as numpy [B, T]: ids by Zipf's law, as words come."""
        import numpy as np

        drawn = np.random.default_rng((SEED, step)).zipf(
            1.2, (self.tokens // self.tokens_per_row, self.tokens_per_row + 1)
        )
        ids = (drawn % self.vocabulary).astype(np.int64)
        rows = [ids[at : at + self.rows] for at in range(0, len(ids), self.rows)]
        return [(np.ascontiguousarray(r[:, :-1]).astype(np.int32), r[:, 1:].copy()) for r in rows]


@dataclass
class Turn:
    """What one side did in its turn."""

    losses: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def add(self, part: str, seconds: float) -> None:
        """Count time towards a part."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds


class Memory:
    """Peak memory beyond a baseline of imports and what the model and optimizer hold."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.baseline = 0 if self._cuda else _status_bytes("VmRSS")

    def begin(self) -> None:
        """Forget the peak so far."""
        import torch

        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self, held: int) -> int:
        """Bytes at the peak beyond the baseline and `held`."""
        import torch

        top = torch.cuda.max_memory_allocated() if self._cuda else _status_bytes("VmHWM")
        return int(top) - self.baseline - held


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{name} is not in /proc/self/status")


def _settle(case: Case) -> Memory:
    """Import what both sides import, set threads, and take the baseline."""
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx  # counted as an import, not as training

    torch.set_num_threads(case.threads)
    torch._inductor.config.compile_threads = 1
    return Memory(case.device)


def _wait(case: Case) -> None:
    if case.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _held(tensors: Iterator[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _serve(pipe: Connection, memory: Memory, held: Callable[[], int], run: Any) -> None:
    """Answer each number of steps with a Turn, until told 0."""
    while steps := pipe.recv():
        memory.begin()
        began = time.process_time()
        turn = run(steps)
        turn.cpu_s = time.process_time() - began
        turn.peak_bytes = memory.peak(held())
        pipe.send(turn)


def nanochat_side(case: Case, pipe: Connection) -> None:
    """nanochat's GPT and MuonAdamW, driven as its scripts/base_train.py does."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{case.folder}/nanochat"  # as new as ours
    memory = _settle(case)
    sys.path.insert(0, case.checkout)
    import torch
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    from trainer.contract.scaling import param_groups
    from trainer.contract.schedule import Schedule
    from trainer.contract.shape import ModelShape

    spec = case.spec()
    shape = ModelShape.of(spec.model, case.vocabulary)
    schedule = Schedule(spec.schedule, param_groups(spec, shape))
    config = GPTConfig(
        sequence_len=case.tokens_per_row,
        vocab_size=case.vocabulary,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_kv_head,
        n_embd=shape.n_embd,
        window_pattern=case.window_pattern,
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=case.device)
    torch.manual_seed(SEED)
    model.init_weights()
    torch.save(model.state_dict(), case.weights)
    optimizer = model.setup_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {name: g.name for g in param_groups(spec, shape) for name in g.parameters}
    compiled = torch.compile(model, dynamic=False)
    step = 0

    def run(steps: int) -> Turn:
        nonlocal step
        turn = Turn()
        for _ in range(steps):
            numpy_batches = case.micro_batches(step)
            began = time.perf_counter()
            batches = [
                (
                    torch.from_numpy(x).to(case.device, torch.int64),
                    torch.from_numpy(y).to(case.device),
                )
                for x, y in numpy_batches
            ]
            fed = time.perf_counter()
            total = torch.zeros((), device=case.device)
            for x_BT, y_BT in batches:
                loss = compiled(x_BT, y_BT)
                total += loss.detach() / len(batches)
                (loss / len(batches)).backward()
            _wait(case)
            passed = time.perf_counter()
            values = schedule.at(step).groups
            for group in optimizer.param_groups:
                value = values[ours[names[id(group["params"][0])]]]
                group["lr"], group["weight_decay"] = value.lr, value.weight_decay
                if group["kind"] == "muon":
                    group["momentum"] = value.momentum
            optimizer.step()
            model.zero_grad(set_to_none=True)
            turn.losses.append(total.item())
            _wait(case)
            done = time.perf_counter()
            turn.add("data", fed - began)
            turn.add("forward and backward", passed - fed)
            turn.add("optimizer", done - passed)
            turn.wall_s += done - began
            step += 1
            if step == 1:  # as its script does
                gc.collect()
                gc.freeze()
                gc.disable()
        return turn

    def held() -> int:
        parameters = list(model.parameters())
        state = (t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        return 2 * _held(iter(parameters)) + _held(state)

    pipe.send("ready")
    _serve(pipe, memory, held, run)


class _EndError(Exception):
    """No more turns."""


def our_side(case: Case, pipe: Connection) -> None:
    """The trainer's loop over its own model and optimizer."""
    memory = _settle(case)
    import torch

    from tests.fakes.reporter import RecordingReporter
    from trainer.checkpoint.train_state import TrainState
    from trainer.contract.scaling import param_groups
    from trainer.contract.schedule import Schedule
    from trainer.contract.shape import ModelShape
    from trainer.data.loader import START, StepBatch
    from trainer.distributed import World
    from trainer.gpt import GPT
    from trainer.loop import Loop, Parts
    from trainer.optim import Optimizer
    from trainer.runtime import prepare, settle
    from trainer.sums import GradientSums

    spec = case.spec()
    shape = ModelShape.of(spec.model, case.vocabulary)
    groups = param_groups(spec, shape)
    runtime = prepare(spec, shape, 0, case.threads, World(), Path(case.folder))
    model = GPT(shape, runtime.compute_dtype, runtime.embedding_dtype)
    model.load_state_dict(torch.load(case.weights, weights_only=True))
    model.to(runtime.device)

    class TimedOptimizer(Optimizer):
        """Tells when its steps begin and how long they take."""

        began = spent = 0.0

        def step(self) -> None:
            self.began = time.perf_counter()
            super().step()
            _wait(case)
            self.spent += time.perf_counter() - self.began

    optimizer = TimedOptimizer(model, groups, runtime.compute_dtype, compile=True)
    model.compile_loss()
    passes = [0.0]
    reporter = RecordingReporter()

    def learn(x_BT: Any, y_BT: Any, share: float) -> Any:
        if not passes[0]:
            passes[0] = time.perf_counter()
        return model.learn(x_BT, y_BT, share)

    def held() -> int:
        parameters = list(model.parameters())
        return 2 * _held(iter(parameters)) + _held(iter(optimizer.state_tensors().values()))

    class Turns:
        """Gives out steps' tokens while it is our turn, and tells how the turn went at its end."""

        left = 0
        step = 0
        began = 0.0
        cpu_began = 0.0
        turn: Turn | None = None

        def next_step(self) -> StepBatch:
            if self.turn is not None:
                self._count(self.turn)
            if not self.left:
                self._next_turn()
            batch = case.micro_batches(self.step)
            self.step, self.left = self.step + 1, self.left - 1
            self.began, passes[0] = time.perf_counter(), 0.0
            return StepBatch(batch, START, case.tokens)

        def _count(self, turn: Turn) -> None:
            now = time.perf_counter()
            turn.losses.append(reporter.points[-1].loss)
            turn.add("data", passes[0] - self.began)
            turn.add("forward and backward", optimizer.began - passes[0])
            turn.add("optimizer", optimizer.spent)
            turn.add("the rest", now - optimizer.began - optimizer.spent)
            optimizer.spent = 0.0
            turn.wall_s += now - self.began

        def _next_turn(self) -> None:
            if self.turn is not None:
                self.turn.cpu_s = time.process_time() - self.cpu_began
                self.turn.peak_bytes = memory.peak(held())
                pipe.send(self.turn)
            self.left = pipe.recv()
            if not self.left:
                raise _EndError
            memory.begin()
            self.turn, self.cpu_began = Turn(), time.process_time()

    class NoWriter:
        """Nothing is saved."""

        stale = False

    parts = Parts(
        spec=spec,
        world=World(),
        device=runtime.device,
        model=model,
        learn=learn,
        settle=settle,
        optimizer=optimizer,
        sums=GradientSums(World(), ()),
        schedule=Schedule(spec.schedule, groups),
        batches=Turns(),
        reporter=reporter,
        writer=NoWriter(),  # type: ignore[arg-type] # the loop asks it for nothing else here
        evaluate=lambda: (0.0, ""),
        sample=None,
    )
    pipe.send("ready")
    try:
        Loop(parts, TrainState()).run()
    except _EndError:
        return
