"""Builds the parts of a loop from a job's document: model, optimizer, data, evaluation, sampling.

Pure construction: opens what it needs for reading, starts nothing, writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trainer.checkpoint.writer import Provenance
from trainer.contract.devices import Device
from trainer.contract.scaling import ParamGroup, param_groups
from trainer.contract.schedule import InForce, Schedule
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.speed import mfu_ratio
from trainer.data.loader import Loader, Position
from trainer.data.shards import ShardReader
from trainer.data.tokenizer import Tokenizer
from trainer.data.validation import ValidationSet, validation_set
from trainer.distributed import World
from trainer.evaluate import EvaluationSums, evaluate
from trainer.gpt import GPT
from trainer.optim import Optimizer
from trainer.runtime import Runtime
from trainer.sample import generate
from trainer.storage.binding import DataBinding, read_bound_tokenizer
from trainer.storage.documents import sha256_hex
from trainer.storage.manifest import JobDocument
from trainer.storage.object_store import open_store
from trainer.storage.retention import Retention
from trainer.sums import GradientSums
from trainer.versions import running_versions

SAMPLE_PROMPT = "The "
SAMPLE_TOKENS = 32


@dataclass(frozen=True)
class Blueprint:
    """A job as its document describes it, looked up and worked out."""

    document: JobDocument
    spec: JobSpec
    binding: DataBinding
    tokenizer: Tokenizer
    shape: ModelShape
    groups: tuple[ParamGroup, ...]

    @classmethod
    def read(cls, document: JobDocument, threads: int) -> Blueprint:
        """Raises DataChangedError where the tokenizer is not the one bound."""
        spec = JobSpec.parse(document.spec)
        assert document.binding is not None, "the service binds data before it queues a job"
        tokenizer = Tokenizer(read_bound_tokenizer(document.binding.tokenizer), threads)
        shape = ModelShape.of(spec.model, tokenizer.vocab_size)
        groups = param_groups(spec, shape)
        return cls(document, spec, document.binding, tokenizer, shape, groups)

    @property
    def start_step(self) -> int:
        """The job's own start, whatever the attempt's."""
        start = self.document.start or self.document.nanochat
        return start.step if start else 0

    def schedule(self) -> Schedule:
        """The job's schedule, the same for every attempt."""
        told = self.document.in_force
        in_force = InForce.from_dict(told) if told is not None else None
        return Schedule(self.spec.schedule, self.groups, self.start_step, in_force)

    def model(self, runtime: Runtime, world: World) -> tuple[GPT, Optimizer, GradientSums]:
        """Fresh weights and this rank's share of their optimizer, on the device; what adds up their
        gradients.
        """
        model = GPT(self.shape, runtime.compute_dtype, runtime.embedding_dtype)
        model.init_weights(self.spec.start.init_seed)
        model.to(runtime.device)
        if runtime.compile:
            model.compile_loss()
        compute = runtime.compute_dtype
        optimizer = Optimizer(model, self.groups, compute, runtime.compile, world)
        sums = GradientSums(world, optimizer.owned(lambda parameter: parameter))
        model.tell_added(sums.added)
        return model, optimizer, sums

    def shard_reader(self, cache: Path) -> ShardReader:
        """The job's shards; for one thread."""
        return ShardReader(self.binding, open_store(self.binding.source), cache / "shards")

    def loader(self, reader: ShardReader, position: Position, world: World) -> Loader:
        """This rank's batches from a position on."""
        return Loader(
            reader,
            self.tokenizer,
            T=self.spec.model.max_seq_len,
            rows_per_step=self.spec.batch.total_batch_size // self.spec.model.max_seq_len,
            device_batch_size=self.spec.batch.device_batch_size,
            order_seed=self.spec.data.order_seed,
            rank=world.rank,
            world_size=world.size,
            position=position,
            passed=self.document.nanochat,
        )

    def validation(self, cache: Path) -> ValidationSet:
        """The rows that the job is validated on."""
        reader = self.shard_reader(cache)
        try:
            return validation_set(
                reader,
                self.tokenizer,
                rows=self.spec.evaluate_rows,
                T=self.spec.model.max_seq_len,
            )
        finally:
            reader.close()

    def evaluation(
        self, model: GPT, runtime: Runtime, world: World, validation: ValidationSet
    ) -> Callable[[], tuple[float, str]]:
        """Measures bits per byte over all ranks, with the identity of what it measured on."""
        token_bytes_V = torch.from_numpy(self.tokenizer.token_bytes()).to(runtime.device)
        rows = self.spec.batch.device_batch_size

        def measure() -> tuple[float, str]:
            batches = (
                (
                    torch.from_numpy(x).to(runtime.device, torch.int64),
                    torch.from_numpy(y).to(runtime.device),
                )
                for x, y in validation.batches(rows, world.rank, world.size)
            )
            own = evaluate(model.token_losses, batches, token_bytes_V)
            sums = torch.tensor([own.nats, float(own.bytes)], dtype=torch.float64)
            sums = sums.to(runtime.device)
            world.sum_([sums])
            nats, count = sums.tolist()
            return EvaluationSums(nats, int(count)).bits_per_byte, validation.identity

        return measure

    def sampler(self, model: GPT, runtime: Runtime) -> Callable[[], str]:
        """Draws a line of text from the model as it is."""

        def draw() -> str:
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(SAMPLE_PROMPT)]
            new = generate(
                model.logits,
                prompt,
                SAMPLE_TOKENS,
                context_tokens=self.shape.sequence_len,
                stop_tokens=frozenset({self.tokenizer.bos_id}),  # the next document begins
                device=runtime.device,
            )
            return SAMPLE_PROMPT + self.tokenizer.decode(new)

        return draw

    def mfu(self, hardware: Device, world: World) -> Callable[[float], float | None]:
        """The share of the peak of a step's seconds, where all ranks compute on one kind."""
        alike = len(set(world.gather(hardware.name))) == 1
        known = hardware if alike else None
        return partial(mfu_ratio, self.spec, self.shape, known, world.size)

    def retention(self) -> Retention:
        """Which checkpoints to keep."""
        return Retention.of(self.spec.checkpoint)

    def provenance(self, attempt: int, validation: ValidationSet) -> Provenance:
        """What every checkpoint of an attempt says of where it comes from."""
        return Provenance(
            attempt=attempt,
            spec_sha256=sha256_hex(self.document.encode()),
            parent=self.document.start,
            identity={
                "data": self.binding.data_sha256,
                "tokenizer": self.binding.tokenizer.sha256,
                "evaluation_set": validation.identity,
            },
            versions=running_versions(),
        )
