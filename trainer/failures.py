"""What an error of a rank means for its job: the one table from exceptions to outcomes.

Invariant: every exception has an outcome; one that nobody listed is our own error.
"""

from __future__ import annotations

import torch

from trainer.checkpoint.train_state import StateMisfitError
from trainer.contract.outcome import Outcome
from trainer.contract.violations import SpecError
from trainer.data.loader import EmptyDataError
from trainer.data.shards import ShardFormatError
from trainer.runtime import NoCardError
from trainer.storage.binding import DataChangedError
from trainer.storage.documents import DocumentError
from trainer.storage.object_store import NotFoundError, StoreError
from trainer.storage.repository import CorruptCheckpointError, StaleWriterError
from trainer.storage.tokenizer_files import TokenizerError

# RuntimeErrors by what they say, first match: these have no class that tells them apart.
WORDS: list[tuple[str, Outcome]] = [
    ("can't allocate memory", Outcome.OUT_OF_MEMORY),  # of the CPU's
    ("out of memory", Outcome.OUT_OF_MEMORY),  # pinned memory too, a CUDA error like any other
    ("CUBLAS_STATUS_ALLOC_FAILED", Outcome.OUT_OF_MEMORY),  # of a library's own work space
    ("gloo/", Outcome.COLLECTIVE_FAILED),  # the place in gloo's own sources
    # An index out of bounds, say: the next attempt would meet it again.
    ("device-side assert", Outcome.CODE_ERROR),
    ("CUDA error", Outcome.WORKER_LOST),  # a failed launch, an ECC error, a GPU off the bus
]
# Errors by what they mean for the job, first match; an error of no listed kind is our own.
OUTCOMES: list[tuple[tuple[type[BaseException], ...], Outcome]] = [
    ((torch.OutOfMemoryError, MemoryError), Outcome.OUT_OF_MEMORY),
    (
        (torch.AcceleratorError, NoCardError),
        Outcome.WORKER_LOST,
    ),  # the device's, whatever its maker
    ((torch.distributed.DistError,), Outcome.COLLECTIVE_FAILED),  # NCCL's, and the meeting place's
    ((StaleWriterError,), Outcome.STALE_WRITER),
    ((DataChangedError,), Outcome.DATA_CHANGED),
    ((StateMisfitError, CorruptCheckpointError), Outcome.CHECKPOINT_UNUSABLE),
    ((SpecError, DocumentError, EmptyDataError, ShardFormatError), Outcome.INVALID_JOB),
    ((TokenizerError, NotFoundError), Outcome.INVALID_JOB),
    ((StoreError, OSError), Outcome.STORE_UNAVAILABLE),  # of the box's own disk: it may be full
]


def outcome_of(error: Exception) -> Outcome:
    """What an error means for the job."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    named = [outcome for words, outcome in WORDS if words in said]
    named += [outcome for kinds, outcome in OUTCOMES if isinstance(error, kinds)]
    return next(iter(named), Outcome.CODE_ERROR)
