"""The rows that a job is validated on: the pinned shard's first rows, in natural order.

Knows nothing of the order of training, so no seed and no world size changes the figure.

Invariant: equal identities mean equal rows in equal order; figures of different identities are
not comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.loader import EmptyDataError, Inputs, Targets, split_targets
from trainer.data.packing import Rows, pack
from trainer.data.shards import ShardReader
from trainer.data.tokenizer import Tokenizer

RULE = "validation rows 1"  # changes when the same shard would give other rows


@dataclass(frozen=True)
class ValidationSet:
    """Packed rows [R, T + 1], held in the narrowest type that the vocabulary allows."""

    rows: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    identity: str  # SHA-256 of shard, tokenizer, T and number of rows

    def batches(
        self, device_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Inputs, Targets]]:
        """(x_BT, y_BT) of this rank: every world_size-th batch. The last batch may be short."""
        starts = range(0, len(self.rows), device_batch_size)
        for start in starts[rank::world_size]:
            yield split_targets(self.rows[start : start + device_batch_size].astype(np.int32))


def validation_set(
    reader: ShardReader, tokenizer: Tokenizer, *, rows: int, T: int
) -> ValidationSet:
    """Pack the first `rows` rows of the validation shard, or all if there are fewer.

    Raises:
        EmptyDataError: there is not one.
    """
    shard = reader.binding.validation
    narrow = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    found: list[Rows] = []
    missing = rows
    for group in range(reader.row_groups(shard)):
        if missing <= 0:
            break
        where = f"{shard.name} row group {group}"
        packed, _ = pack(tokenizer.encode_documents(reader.texts(shard, group), where), T)
        found.append(packed[:missing].astype(narrow))
        missing -= len(found[-1])
    used = sum(len(part) for part in found)
    if not used:
        raise EmptyDataError(
            f"validation shard {shard.name} has no row of {T + 1} tokens in any row group"
        )
    digest = hashlib.sha256()
    for part in (RULE, shard.model_dump_json(), tokenizer.sha256, T, used):
        digest.update(f"{part}\n".encode())
    return ValidationSet(np.concatenate(found), digest.hexdigest())
