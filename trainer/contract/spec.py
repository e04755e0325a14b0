"""The job spec: what a user asks for, validated once, frozen, complete.

Field names are nanochat's, so that its users know them. A spec that exists is valid in itself;
what only a cluster, a data source or a checkpoint can tell is checked by those who know them.

Invariant: `JobSpec.parse` either returns a whole spec or raises `SpecError` with every violation
that can be seen at once, and `JobSpec.parse(spec.to_dict()) == spec`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.contract.contradictions import cross_check
from trainer.contract.violations import SpecError, from_pydantic

INT32_MAX = 2**31 - 1  # the wire type of every whole number in the spec


class Anchor(StrEnum):
    """What the schedule is measured from."""

    HORIZON = "horizon"
    SEGMENT = "segment"
    CONTINUE = "continue"


class Compute(StrEnum):
    """Precision of activations and matmuls; master weights are fp32 in both."""

    BF16 = "bf16"
    FP32 = "fp32"


class Embeddings(StrEnum):
    """How token and value embedding tables are stored."""

    COMPUTE = "compute"
    FP32 = "fp32"


class Compile(StrEnum):
    """Whether torch.compile is used."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Sizing(StrEnum):
    """When the number of a job's workers changes."""

    FIXED = "fixed"
    GROW = "grow"
    ELASTIC = "elastic"


class Section(BaseModel):
    """A part of the spec: frozen, strict types, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def enum_spelling(kind: type[StrEnum]) -> Callable[[object], object]:
    """Accept a value as people write it (`bf16`) and as proto JSON does (`COMPUTE_BF16`)."""

    def read(value: object) -> object:
        if isinstance(value, bool) and kind is Compile:  # YAML 1.1 reads on/off as booleans
            return Compile.ON if value else Compile.OFF
        if isinstance(value, str):
            text = value.lower().removeprefix(f"{kind.__name__.lower()}_")
            if text in kind.__members__.values():
                return kind(text)
        choices = ", ".join(kind)
        raise ValueError(f"must be one of {choices}")

    return read


class ModelSpec(Section):
    """The shape of the network."""

    depth: int = Field(12, ge=1, le=1024)
    aspect_ratio: int = Field(64, ge=1, le=4096)
    head_dim: int = Field(128, ge=2, le=1024, multiple_of=2)
    max_seq_len: int = Field(2048, ge=2, le=1 << 20)
    window_pattern: str = Field("L", min_length=1, max_length=1024, pattern="^[SL]+$")
    n_kv_head: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=2, le=1 << 24)

    @field_validator("window_pattern", mode="before")
    @classmethod
    def _upper_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def n_head(self) -> int:
        """Number of query heads: the width in units of head_dim, rounded up."""
        return -(-self.depth * self.aspect_ratio // self.head_dim)

    @property
    def n_embd(self) -> int:
        """Width of the residual stream: depth x aspect_ratio nudged up to whole heads."""
        return self.n_head * self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head if self.n_kv_head is not None else self.n_head


class DataSpec(Section):
    """Where text and tokenizer come from: file:, s3: or builtin: URIs."""

    source: str = Field("s3://corpus/climbmix", min_length=1, max_length=1024)
    tokenizer: str = Field("s3://corpus/tokenizer", min_length=1, max_length=1024)
    validation: str = Field("last", min_length=1, max_length=256)
    order_seed: int = Field(0, ge=0, le=INT32_MAX)

    @field_validator("source", "tokenizer")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        # No control characters: no store has a name with one.
        if not re.fullmatch(r"(file:/|s3://[^/]|builtin:[a-z0-9])[^\x00-\x1f]*", value):
            raise ValueError("must be file:/absolute/path, s3://bucket/prefix or builtin:name")
        return value


class BatchSpec(Section):
    """Rows a micro-step on one device, and tokens an optimizer step over all devices."""

    device_batch_size: int = Field(8, ge=1, le=1 << 20)
    total_batch_size: int = Field(65536, ge=1, le=INT32_MAX)


class OptimizerSpec(Section):
    """Base learning rates as nanochat names them, before scaling by batch and width."""

    embedding_lr: float = Field(0.018, ge=0, le=1e6)
    unembedding_lr: float = Field(0.00048, ge=0, le=1e6)
    matrix_lr: float = Field(0.0012, ge=0, le=1e6)
    scalar_lr: float = Field(0.03, ge=0, le=1e6)
    smear_lr: float = Field(0.2, ge=0, le=1e6)
    weight_decay: float = Field(0.28, ge=0, le=1e6)
    grad_clip_norm: float | None = Field(None, gt=0, le=1e9)


class ScheduleSpec(Section):
    """Horizon and shape of the learning-rate multiplier."""

    num_iterations: int = Field(300_000, ge=1, le=INT32_MAX)
    warmup_steps: int = Field(0, ge=0, le=INT32_MAX)
    warmdown_ratio: float = Field(0.0, ge=0, le=1)
    final_lr_frac: float = Field(0.05, ge=0, le=1)
    anchor: Anchor = Anchor.HORIZON

    _anchor = field_validator("anchor", mode="before")(enum_spelling(Anchor))


class StartSpec(Section):
    """What training starts from: a checkpoint, or fresh weights drawn with init_seed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False
    )

    from_: str | None = Field(None, alias="from", max_length=1024)
    init_seed: int = Field(42, ge=0, le=INT32_MAX)

    @property
    def step(self) -> int | None:
        """The step that from names; None: fresh weights, or the latest."""
        step = (self.from_ or "").rpartition("@")[2]
        return int(step) if step.isdecimal() else None

    @field_validator("from_")
    @classmethod
    def _checkpoint_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"(nanochat:.+|[0-9A-Za-z]{1,64})@([0-9]{1,10}|latest)", value
        ):
            raise ValueError("must be JOB@STEP, JOB@latest or nanochat:<folder or s3 uri>@STEP")
        return value


class GuardsSpec(Section):
    """What is refused unless allowed."""

    max_lr_jump: float = Field(2.0, ge=1, le=1e9)
    allow_lr_jump: bool = False


class EvaluateSpec(Section):
    """Validation in bits per byte: every so many steps (0: at the end only), over many tokens."""

    every: int = Field(250, ge=0, le=INT32_MAX)
    tokens: int = Field(41_943_040, ge=1, le=INT32_MAX)


class SampleSpec(Section):
    """Text sampled from the model every so many steps; 0: never."""

    every: int = Field(2000, ge=0, le=INT32_MAX)


class CheckpointSpec(Section):
    """When to checkpoint (0: not by this clock; always at the end) and what to keep."""

    every_steps: int = Field(1000, ge=0, le=INT32_MAX)
    every_s: int = Field(900, ge=0, le=INT32_MAX)
    keep_last: int = Field(3, ge=2, le=10_000)
    keep_every_steps: int = Field(10_000, ge=0, le=INT32_MAX)
    keep_best: bool = True


class WorkersSpec(Section):
    """How many workers the job may run on, and when that number changes.

    cooldown_s: at least so long between two changes that nobody was forced to.
    """

    min: int = Field(1, ge=1, le=100_000)
    max: int = Field(1, ge=1, le=100_000)
    policy: Sizing = Sizing.FIXED
    cooldown_s: int = Field(300, ge=0, le=INT32_MAX)

    _policy = field_validator("policy", mode="before")(enum_spelling(Sizing))


class ResourcesSpec(Section):
    """What one attempt needs of the cluster. cpus_per_worker is also the torch thread count."""

    workers: WorkersSpec = WorkersSpec()
    gpus_per_worker: int = Field(1, ge=0, le=1)
    cpus_per_worker: int = Field(2, ge=1, le=4096)
    wait_for_nodes: bool = False
    gpu_type: str | None = Field(None, min_length=1, max_length=64)


class PrecisionSpec(Section):
    """Numeric formats."""

    compute: Compute = Compute.BF16
    embeddings: Embeddings = Embeddings.COMPUTE

    _compute = field_validator("compute", mode="before")(enum_spelling(Compute))
    _embeddings = field_validator("embeddings", mode="before")(enum_spelling(Embeddings))


class JobSpec(Section):
    """Everything a user can ask of one training job."""

    name: str = Field("d12", pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    batch: BatchSpec = BatchSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    start: StartSpec = StartSpec()
    guards: GuardsSpec = GuardsSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    sample: SampleSpec = SampleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    resources: ResourcesSpec = ResourcesSpec()
    precision: PrecisionSpec = PrecisionSpec()
    compile: Compile = Compile.AUTO
    deterministic: bool = True
    priority: int = Field(0, ge=-1000, le=1000)
    preemptible: bool = False

    _compile = field_validator("compile", mode="before")(enum_spelling(Compile))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Validate a plain mapping (from YAML, JSON or a proto message).

        Raises:
            SpecError: with every violation: unknown fields, wrong types, values out of bounds, and
                contradictions between those sections that are valid in themselves.
        """
        try:
            spec = cls.model_validate(dict(data))
        except ValidationError as error:
            violations = from_pydantic(error)
            broken = {violation.field.split(".")[0] for violation in violations}
            rest = {key: value for key, value in data.items() if key not in broken}
            try:
                partial = cls.model_validate(rest)
            except ValidationError:
                raise SpecError(violations) from error
            raise SpecError(violations + cross_check(partial, broken)) from error
        if violations := cross_check(spec, frozenset()):
            raise SpecError(violations)
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The whole spec as plain JSON values: defaults written out, absent options left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens that one worker takes through one forward and backward pass."""
        return self.batch.device_batch_size * self.model.max_seq_len

    @property
    def possible_workers(self) -> tuple[int, ...]:
        """The numbers of workers within the range that divide a step's micro-batches."""
        micro, rest = divmod(self.batch.total_batch_size, self.tokens_per_micro_step)
        workers = self.resources.workers
        return _divisors(micro, workers.min, 0 if rest else min(workers.max, micro))

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps of each worker in an optimizer step; world_size must divide."""
        accum, rest = divmod(self.batch.total_batch_size, self.tokens_per_micro_step * world_size)
        assert rest == 0, "validated by cross_check and by the choice of world_size"
        return accum

    @property
    def evaluate_rows(self) -> int:
        """Rows of max_seq_len tokens in a validation pass, whatever the batch or world size."""
        return self.evaluate.tokens // self.model.max_seq_len


@lru_cache(1024)  # asked of every queued job at every decision
def _divisors(number: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(n for n in range(low, high + 1) if number % n == 0)
