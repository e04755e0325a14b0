"""The data of a job, bound at submit: which shards and tokenizer, and how to know them again.

Knows parquet only by its tail (footer length and magic), so the service needs no pyarrow.

Invariant: a bound job trains on exactly these shards in this order, with this validation shard;
added shards are ignored, and a changed or vanished one is refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import Field

from trainer.storage.documents import Record, sha256_hex
from trainer.storage.object_store import (
    NotFoundError,
    ObjectInfo,
    ObjectStore,
    StoreRefusedError,
    StoreUriError,
    open_store,
    require_mounted,
)
from trainer.storage.tokenizer_files import (
    TokenizerError,
    TokenizerFiles,
    parse,
    read_content,
    read_tokenizer_files,
)

MAGIC = b"PAR1"
TAIL_BYTES = 8  # footer length (4 bytes, little endian), then the magic
GUESS_BYTES = 64 << 10  # one read takes most footers whole
MOST_FOOTER_BYTES = 64 << 20  # of a real shard some 100 KB; as many as threads are held at once
READ_THREADS = 16
QUICK_S = 1e-3  # a read that takes no longer needs no thread beside it
REMEMBERED = 1000  # tokenizers

# By format and digests of its files' bytes: size of the vocabulary, and digest of the content.
_tokenizers: dict[tuple[str, ...], tuple[int, str]] = {}

OpenStore = Callable[[str], ObjectStore]


class BindingError(ValueError):
    """The data asked for can't be used as the spec names it."""

    def __init__(self, field: str, value: str, reason: str) -> None:
        super().__init__(f"{field}: {value!r}: {reason}")
        self.field, self.value, self.reason = field, value, reason


class DataChangedError(ValueError):
    """Data that a job was bound to is not what it was: put it back, or submit a new job."""


class NotParquetError(ValueError):
    """A shard's tail is not that of a whole parquet file."""


class ShardRef(Record):
    """One shard, and enough to notice that it changed."""

    name: str
    size_bytes: int
    footer_sha256: str


class TokenizerRef(Record):
    """The tokenizer; sha256 is of its content, whatever the format."""

    uri: str
    format: Literal["everstep", "nanochat"]
    vocab_size: int
    sha256: str


class DataBinding(Record):
    """What a job trains and is validated on."""

    source: str
    shards: tuple[ShardRef, ...] = Field(min_length=1)  # training, sorted by name
    validation: ShardRef
    tokenizer: TokenizerRef

    @property
    def data_sha256(self) -> str:
        """Identity of the training shards."""
        return sha256_hex("".join(shard.model_dump_json() for shard in self.shards).encode())


def bind(
    source_uri: str, tokenizer_uri: str, validation: str, opener: OpenStore = open_store
) -> DataBinding:
    """Bind a job to what lies at these addresses now.

    validation is a shard's name, or 'last' by name. Safe to repeat; writes nothing.

    Raises:
        BindingError: naming the field, its value, and why it can't be used.
        StoreError: the store itself can't be used.
    """
    store = open_for("data.source", source_uri, opener)
    try:
        found = list_shards(store)
    except StoreRefusedError as error:
        raise BindingError("data.source", source_uri, str(error)) from error
    if not found:
        anything = next(iter(store.list("")), None) is not None
        reason = "holds no .parquet file" if anything else "there is no such folder, or it is empty"
        raise BindingError("data.source", source_uri, reason)
    if len(found) < 2:
        raise BindingError(
            "data.source",
            source_uri,
            f"holds one shard ({found[0].key}); two are needed, one to train and one to validate",
        )
    names = [info.key for info in found]
    pinned = names[-1] if validation == "last" else validation
    if pinned not in names:
        raise BindingError(
            "data.validation", validation, f"is not one of the {len(names)} shards in {source_uri}"
        )
    tokenizer = bind_tokenizer(tokenizer_uri, opener)
    try:
        shards = {shard.name: shard for shard in read_footers(store, found)}
    except NotParquetError as error:
        raise BindingError("data.source", source_uri, str(error)) from error
    training = tuple(shards[name] for name in names if name != pinned)
    return DataBinding(
        source=source_uri, shards=training, validation=shards[pinned], tokenizer=tokenizer
    )


def bind_tokenizer(uri: str, opener: OpenStore = open_store) -> TokenizerRef:
    """Bind to the tokenizer in a folder; BindingError as in `bind`."""
    store = open_for("data.tokenizer", uri, opener)
    try:
        form, content = read_content(store)
        key = (form, *map(sha256_hex, content))
        if (known := _tokenizers.get(key)) is None:
            files = parse(form, content)
            known = files.vocab_size, files.sha256
            if len(_tokenizers) < REMEMBERED:
                _tokenizers[key] = known
    except (NotFoundError, StoreRefusedError, TokenizerError) as error:
        raise BindingError("data.tokenizer", uri, str(error)) from error
    return TokenizerRef.model_validate(
        {"uri": uri, "format": form, "vocab_size": known[0], "sha256": known[1]}
    )


def read_bound_tokenizer(ref: TokenizerRef, opener: OpenStore = open_store) -> TokenizerFiles:
    """The bound tokenizer's content; DataChangedError if it is not the one that was bound."""
    store = opener(ref.uri)
    try:
        _, files = read_tokenizer_files(store)
    except (NotFoundError, TokenizerError) as error:
        require_mounted(store)
        raise DataChangedError(f"tokenizer {ref.uri}: {error}") from error
    if files.sha256 != ref.sha256:
        raise DataChangedError(
            f"tokenizer {ref.uri} has changed: digest {files.sha256[:12]}, bound {ref.sha256[:12]}"
        )
    return files


def list_shards(store: ObjectStore) -> list[ObjectInfo]:
    """The parquet files right in the store's root, sorted by name."""
    found = (info for info in store.list("") if "/" not in info.key)
    shards = [info for info in found if info.key.endswith(".parquet") and info.key[0] not in "._"]
    return sorted(shards, key=lambda info: info.key)


def read_footers(store: ObjectStore, found: Sequence[ObjectInfo]) -> list[ShardRef]:
    """The footer of each, by small ranged reads: many at once where the first is slow."""
    began = time.monotonic()
    first = [read_footer(store, info) for info in found[:1]]
    if time.monotonic() - began < QUICK_S:
        return first + [read_footer(store, info) for info in found[1:]]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return first + list(pool.map(lambda info: read_footer(store, info), found[1:]))


def read_footer(store: ObjectStore, info: ObjectInfo) -> ShardRef:
    """Digest a parquet file's footer by ranged reads; NotParquetError naming the shard."""

    def tail(count: int) -> bytes:
        return store.get(info.key, max(0, info.size_bytes - count), info.size_bytes)

    end = tail(GUESS_BYTES)
    if len(end) < TAIL_BYTES + len(MAGIC) or end[-4:] != MAGIC:
        raise NotParquetError(f"{info.key} is not a parquet file, or is torn")
    footer_bytes = int.from_bytes(end[-TAIL_BYTES:-4], "little")
    whole = footer_bytes + TAIL_BYTES
    if footer_bytes > MOST_FOOTER_BYTES or whole + len(MAGIC) > info.size_bytes:
        raise NotParquetError(f"{info.key} is not a parquet file: its footer is longer than any")
    if whole > len(end):
        end = tail(whole)
    return ShardRef(
        name=info.key, size_bytes=info.size_bytes, footer_sha256=sha256_hex(end[-whole:])
    )


def open_for(field: str, uri: str, opener: OpenStore) -> ObjectStore:
    """Open the store that a field of the spec names."""
    try:
        return opener(uri)
    except StoreUriError as error:
        raise BindingError(field, uri, "must be file:/absolute/path or s3://bucket/path") from error
