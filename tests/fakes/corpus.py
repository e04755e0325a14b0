"""The corpus of tests/data, and small ones written for a test."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.shards import ShardReader
from trainer.data.tokenizer import Tokenizer
from trainer.storage.binding import DataBinding, bind, read_bound_tokenizer
from trainer.storage.object_store import open_store
from trainer.storage.tokenizer_files import write_tokenizer_files

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
TOKENIZER = CORPUS / "tokenizer"


def vectors() -> dict[str, Any]:
    """What nanochat's own tokenizer gave."""
    return json.loads((TOKENIZER / "vectors.json").read_text())


def parquet(groups: Sequence[Sequence[str | None]], column: str = "text") -> bytes:
    """A parquet file with these row groups."""
    buffer = io.BytesIO()
    schema = pa.schema([pa.field(column, pa.string())])
    with pq.ParquetWriter(buffer, schema) as writer:
        for group in groups:
            writer.write_table(pa.table({column: list(group)}, schema=schema))
    return buffer.getvalue()


def write_corpus(folder: Path, shards: Sequence[Sequence[Sequence[str | None]]]) -> DataBinding:
    """Write shards of row groups of documents; the last shard validates."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, groups in enumerate(shards):
        (folder / f"shard_{index}.parquet").write_bytes(parquet(groups))
    return bind(f"file:{folder}", f"file:{TOKENIZER}", "last")


def tokenizer_of(binding: DataBinding) -> Tokenizer:
    """The binding's tokenizer."""
    return Tokenizer(read_bound_tokenizer(binding.tokenizer))


def reader_of(binding: DataBinding, cache: Path) -> ShardReader:
    """A reader over the binding's source."""
    return ShardReader(binding, open_store(binding.source), cache)


def write_everstep_tokenizer(folder: Path) -> None:
    """The test tokenizer in our own format."""
    binding = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")
    write_tokenizer_files(read_bound_tokenizer(binding.tokenizer), open_store(f"file:{folder}"))
