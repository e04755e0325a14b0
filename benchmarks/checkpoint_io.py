"""What a checkpoint costs: the pause, the steps after it, memory, upload and restore against boto3.

`python -m benchmarks.checkpoint_io` (two cores, a SeaweedFS of its own; --depth, --rounds). What
rivals is measured in alternation in one run; medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import boto3
import psutil
import torch
from boto3.s3.transfer import TransferConfig

from tests.fakes.reporter import RecordingReporter
from tests.servers import S3Server, seaweedfs
from trainer.checkpoint.snapshot import Snapshots
from trainer.checkpoint.spool import Spool, push
from trainer.checkpoint.train_state import TrainState, restore
from trainer.checkpoint.writer import CheckpointWriter, Provenance, Waits
from trainer.contract.scaling import param_groups
from trainer.contract.schedule import Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.distributed import World
from trainer.gpt import GPT
from trainer.optim import Optimizer
from trainer.start import download
from trainer.storage.manifest import Share
from trainer.storage.object_store import open_store
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention

VOCAB = 32768
T = 512
TOKENS = 4096  # a step
AFTER = 10  # steps whose slowdown is told
MINUTE_S = 60.0


class Bench:
    """One model with its optimizer, and a writer to a store."""

    def __init__(self, depth: int, folder: Path, uri: str) -> None:
        self.spec = JobSpec.parse(
            {"model": {"depth": depth, "max_seq_len": T}, "batch": {"device_batch_size": 4}}
        )
        shape = ModelShape.of(self.spec.model, VOCAB)
        groups = param_groups(self.spec, shape)
        # fp32 on the CPU, whose bf16 matmuls are slow; tables as the trainer has them.
        self.model = GPT(shape, torch.float32, torch.bfloat16)
        self.model.init_weights(0)
        self.optimizer = Optimizer(self.model, groups, torch.float32)
        self.schedule = Schedule(self.spec.schedule, groups)
        self.snapshots = Snapshots(self.model, self.optimizer, World())
        self.size = sum(len(p.header) + p.end - p.start for p in self.snapshots.parts)
        self.folder, self.uri = folder, uri
        self.repository = CheckpointRepository(open_store(uri), "BENCH")
        self.step = 0

    def train(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.step)
        for _ in range(TOKENS // (4 * T)):
            ids_BT = torch.randint(0, VOCAB, (4, T + 1), generator=generator)
            self.model.learn(ids_BT[:, :-1], ids_BT[:, 1:])
        self.optimizer.apply(self.schedule.at(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return time.perf_counter() - began

    @contextlib.contextmanager
    def writer(self) -> Iterator[tuple[CheckpointWriter, RecordingReporter]]:
        attempt = self.repository.claim(None, "bench").attempt
        reporter = RecordingReporter()
        writer = CheckpointWriter(
            self.repository,
            Provenance(attempt, "0" * 64, None, {}, {}),
            Retention(2, 0, False),
            self.snapshots,
            Spool(self.folder / "spool", "BENCH"),
            reporter,
            World(),
        )
        yield writer, reporter
        assert writer.drain(600)
        writer.close()

    def save(self, writer: CheckpointWriter) -> float:
        """Seconds that training stops."""
        writer.wait_for_room()
        self.step += 1  # a step of its own, though nothing was trained
        began = time.perf_counter()
        taken = self.snapshots.take(TrainState(step=self.step))
        writer.save(taken, Waits(0.0), writer.upcoming(writer.well))
        return time.perf_counter() - began


def pause(bench: Bench, rounds: int) -> None:
    """The pause, and how much the steps after it slow down."""
    bench.train()
    pauses, plain, after = [], [], []
    with bench.writer() as (writer, _):
        for _ in range(rounds):
            plain += [bench.train() for _ in range(AFTER)]
            pauses.append(bench.save(writer))
            after += [bench.train() for _ in range(AFTER)]
            assert writer.drain(600)
    step_s, pause_s = statistics.median(plain), statistics.median(pauses)
    lost_s = pause_s + AFTER * (statistics.mean(after) - statistics.mean(plain))
    print(f"step {step_s:.3f} s ({TOKENS} tokens); pause {1000 * pause_s:.1f} ms, the longest")
    print(f"  {1000 * max(pauses):.1f} ms: {pause_s / step_s:.1%} of a step")
    print(f"  the next {AFTER} steps: x {statistics.mean(after) / statistics.mean(plain):.3f}")
    print(f"  at one a minute {max(lost_s, pause_s) / MINUTE_S:.2%} of run time, slowdown included")


def memory(bench: Bench) -> None:
    """Resident memory above that before, for one save and for two alive, in sizes of the state."""
    process = psutil.Process()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    # The first snapshot's buffer is there from the start.
    before = process.memory_info().rss - bench.size
    watcher = threading.Thread(target=watch)
    watcher.start()
    for count in (1, 2):
        peak = 0
        with bench.writer() as (writer, _):
            for _ in range(count):
                bench.save(writer)
        print(f"memory, {count} alive: {(peak - before) / bench.size:.2f} x the state")
    done.set()
    watcher.join()


def transfers(bench: Bench, server: S3Server, rounds: int) -> None:
    """Upload and restore of one checkpoint against boto3's own transfer of the same bytes."""
    client = boto3.client("s3")
    plain = TransferConfig()  # boto3's own defaults
    raw = bench.folder / "raw"
    raw.mkdir()
    spool = Spool(bench.folder / "again", "BENCH")
    current = bench.repository.current()[0]
    manifest = bench.repository.manifest(current)
    download(bench.repository, current, manifest, spool.folder(current))
    names = [part.name for part in manifest.parts]
    files = [spool.folder(current) / name for name in names]
    times: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        times.setdefault(what, []).append(time.perf_counter() - began)

    for number in range(rounds):
        target = current.model_copy(update={"step": 10**6 + number})
        share = Share(rank=0, ranks=1, parts=manifest.parts, draft=manifest)

        def theirs(number: int = number) -> None:
            for path in files:
                key = f"raw/{number}/{path.name}"
                client.upload_file(str(path), server.bucket, key, Config=plain)

        def theirs_back(number: int = number) -> None:
            for name in names:
                key = f"raw/{number}/{name}"
                client.download_file(server.bucket, key, str(raw / name), Config=plain)

        timed("boto3 upload", theirs)
        timed("upload", partial(push, bench.repository, target, share, spool.folder(current)))
        timed("boto3 download", theirs_back)

        def back(number: int = number) -> None:
            found = download(bench.repository, current, manifest, bench.folder / f"copy{number}")
            counters = bench.optimizer.counters()
            restore(found, TrainState(counters=counters), bench.model, bench.optimizer)
            for path in found:
                path.unlink()

        timed("restore", back)
        for path in raw.iterdir():
            path.unlink()
    medians = {what: statistics.median(each) for what, each in times.items()}
    for ours, other in (("upload", "boto3 upload"), ("restore", "boto3 download")):
        ratio = medians[ours] / medians[other]
        print(f"{ours} {medians[ours]:.2f} s, {other} {medians[other]:.2f} s: x {ratio:.2f}")


def main() -> None:
    """All measurements; each prints as it is done."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_io", description=__doc__)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name, seaweedfs(Path(name) / "seaweedfs") as server:
        os.environ.update(server.environment)
        uri = f"s3://{server.bucket}/bench"
        bench = Bench(options.depth, Path(name), uri)
        print(f"depth {options.depth}, state {bench.size / 1e6:.0f} MB, torch {torch.__version__},")
        print(f"  {os.cpu_count()} CPU cores, {len(bench.snapshots.parts)} parts")
        memory(bench)
        transfers(bench, server, options.rounds)
        pause(bench, options.rounds)


if __name__ == "__main__":
    main()
