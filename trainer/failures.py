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
from trainer.storage.binding import DataChangedError
from trainer.storage.documents import DocumentError
from trainer.storage.object_store import NotFoundError, StoreError
from trainer.storage.repository import CorruptCheckpointError, StaleWriterError
from trainer.storage.tokenizer_files import TokenizerError

# What torch says where there is no memory for a tensor of the CPU's; it has no class of its own.
CPU_OUT_OF_MEMORY = "can't allocate memory"
# Gloo's errors have no class either; what they say begins with the place in its own sources.
GLOO = "gloo/"
# Errors by what they mean for the job, first match; an error of no listed kind is our own.
OUTCOMES: list[tuple[tuple[type[BaseException], ...], Outcome]] = [
    ((torch.OutOfMemoryError, MemoryError), Outcome.OUT_OF_MEMORY),
    ((torch.distributed.DistError,), Outcome.COLLECTIVE_FAILED),  # NCCL's, and the meeting place's
    ((StaleWriterError,), Outcome.STALE_WRITER),
    ((DataChangedError,), Outcome.DATA_CHANGED),
    ((StateMisfitError, CorruptCheckpointError), Outcome.CHECKPOINT_UNUSABLE),
    ((SpecError, DocumentError, EmptyDataError, ShardFormatError), Outcome.INVALID_JOB),
    ((TokenizerError, NotFoundError), Outcome.INVALID_JOB),
    ((StoreError,), Outcome.STORE_UNAVAILABLE),
]


def outcome_of(error: Exception) -> Outcome:
    """What an error means for the job."""
    if isinstance(error, RuntimeError) and CPU_OUT_OF_MEMORY in str(error):
        return Outcome.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and GLOO in str(error):
        return Outcome.COLLECTIVE_FAILED
    found = (outcome for kinds, outcome in OUTCOMES if isinstance(error, kinds))
    return next(found, Outcome.CODE_ERROR)
