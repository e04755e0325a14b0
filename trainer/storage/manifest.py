"""What a bucket's documents say: manifest, claim, and the job's own document.

Knows no store: `repository.py` reads and writes these. `state` is the trainer's and opaque here.

Invariant: a document that exists is whole and valid in itself; a manifest names every part of its
checkpoint with size and digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AwareDatetime, Field, JsonValue, field_validator

from trainer.storage.binding import DataBinding
from trainer.storage.documents import Document, DocumentError, Record
from trainer.storage.layout import MAX_STEP, is_part_name
from trainer.storage.nanochat_files import NanochatStart

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
JobId = Annotated[str, Field(pattern="^[0-9A-Za-z]{1,64}$")]
Step = Annotated[int, Field(ge=0, le=MAX_STEP)]
Attempt = Annotated[int, Field(ge=1)]

READ_BYTES = 1 << 20


class ManifestError(DocumentError):
    """A manifest can't be used: its checkpoint must be passed over."""


class CheckpointRef(Record):
    """Names one checkpoint for good; people say JOB@STEP."""

    job_id: JobId
    step: Step
    attempt: Attempt

    def __str__(self) -> str:
        return f"{self.job_id}@{self.step}"


class Part(Record):
    """One file of a checkpoint. tensors: the names inside, so a reader can pick what it needs."""

    name: str
    size_bytes: int = Field(ge=0)
    sha256: Digest
    tensors: tuple[str, ...] | None = None

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not is_part_name(value):
            raise ValueError("must look like part-00000-00000.safetensors")
        return value

    @classmethod
    def of_file(cls, path: Path, name: str, tensors: Sequence[str] | None = None) -> Self:
        """Describe a local file by reading it once."""
        digest = hashlib.sha256()
        size = 0
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
        names = None if tensors is None else tuple(tensors)
        return cls(name=name, size_bytes=size, sha256=digest.hexdigest(), tensors=names)


class Manifest(Document):
    """A committed checkpoint: where its state lies and what it depends on."""

    error: ClassVar[type[DocumentError]] = ManifestError

    job_id: JobId
    step: Step
    attempt: Attempt
    parts: tuple[Part, ...] = Field(min_length=1)
    state: dict[str, JsonValue]  # data position, rates in force, RNG, smoothed loss
    spec_sha256: Digest
    parent: CheckpointRef | None = None  # what the job as a whole started from
    identity: dict[str, str]  # data, tokenizer, evaluation set
    versions: dict[str, str]
    validation_bpb: float | None = None
    created_at: AwareDatetime

    @field_validator("parts")
    @classmethod
    def _distinct_names(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if len({part.name for part in value}) != len(value):
            raise ValueError("two parts have one name")
        return value

    @property
    def ref(self) -> CheckpointRef:
        """The checkpoint that this manifest commits."""
        return CheckpointRef(job_id=self.job_id, step=self.step, attempt=self.attempt)

    @property
    def size_bytes(self) -> int:
        """All parts together."""
        return sum(part.size_bytes for part in self.parts)


class Share(Document):
    """What one of an attempt's ranks wrote of a checkpoint, before it is committed.

    draft: rank 0's only, who commits: the manifest with the parts of its own.
    """

    rank: int = Field(ge=0)
    ranks: int = Field(ge=1)
    parts: tuple[Part, ...]
    draft: Manifest | None = None


class RetentionDocument(Document):
    """Which checkpoints a job keeps from now on, in place of what its spec says."""

    keep_last: int = Field(ge=2)
    keep_every_steps: int = Field(ge=0)
    keep_best: bool


class Claim(Document):
    """An attempt's right to write, and the checkpoint it goes on from (another job's, or None).

    nonce tells a claimant whose put was answered twice that it was itself who won.
    """

    attempt: Attempt
    start: CheckpointRef | None = None
    host: str
    nonce: str
    created_at: AwareDatetime


class JobDocument(Document):
    """What spec.json holds: what was asked for, on which data, from which checkpoint.

    in_force: the parent's values at the start, kept here since the schedule of a continuation
    depends on them longer than the parent's checkpoint may live. nanochat: without start, the
    checkpoint of nanochat's that the job starts from; with it, the one that its text goes on from.
    """

    job_id: JobId
    spec: dict[str, JsonValue]
    binding: DataBinding | None = None
    start: CheckpointRef | None = None
    nanochat: NanochatStart | None = None
    in_force: dict[str, JsonValue] | None = None
    created_at: datetime | None = None
