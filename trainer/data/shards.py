"""Reading the bound shards by row group, in place or through a local cache.

Knows parquet and the binding; nothing of tokens. The only module that imports pyarrow for reading.
Where a store or disk is in trouble, reading waits and tries again, which is safe: it only reads.

Invariant: text comes only from a shard whose size and footer digest are those bound at submit, and
whose bytes are those first read on this box; anything else is refused by name before a row of it
is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.storage.binding import (
    DataBinding,
    DataChangedError,
    NotParquetError,
    ShardRef,
    read_footer,
)
from trainer.storage.documents import sha256_hex
from trainer.storage.object_store import (
    LocalObjectStore,
    NotFoundError,
    ObjectInfo,
    ObjectStore,
    StoreUnavailableError,
    local_errors,
    require_mounted,
    write_file,
)
from trainer.storage.retry import patiently

T = TypeVar("T")

TEXT_COLUMN = "text"
CACHE_BYTES = 32 << 30  # assumption: fits beside checkpoints on a training box's disk
# Of retries while the data can't be read. Ending the attempt would help nobody: the next one needs
# the same shard, and trains again what no checkpoint holds. An hour is an outage that somebody
# mends (assumption); past it the end of the attempt says what the job waits for.
DATA_BUDGET_S = 3600.0


class ShardFormatError(ValueError):
    """A shard is parquet, but can't be read as a column of text: mend it and bind anew."""


class ShardReader:
    """The shards of one binding. Keeps the last one open; for one thread.

    closing: once it is set, from any thread, nothing waits any longer for a store that is away.
    """

    def __init__(
        self,
        binding: DataBinding,
        store: ObjectStore,
        cache: Path,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.binding = binding
        self._store = store
        source = sha256_hex(store.uri.encode())[:16]
        self._cache = cache / source
        self._digests = cache / "digests" / source
        self._cache_bytes = cache_bytes
        self._open: tuple[ShardRef, pq.ParquetFile] | None = None
        self.closing = threading.Event()

    def row_groups(self, shard: ShardRef) -> int:
        """Number of row groups in a shard; raises what texts does."""
        return self._read(shard.name, lambda: int(self._file(shard).num_row_groups))

    def texts(self, shard: ShardRef, row_group: int) -> list[str]:
        """The documents of a row group in order; absent and empty ones left out.

        Raises:
            DataChangedError: the shard is not the one bound.
            ShardFormatError: it has no readable column of text.
            StoreUnavailableError: it could not be read for DATA_BUDGET_S, or until closing.
            StoreRefusedError: nor will it, before somebody changes rights or credentials.
        """

        def texts() -> list[str]:
            file = self._file(shard)
            table = file.read_row_group(row_group, columns=[TEXT_COLUMN], use_threads=False)
            return [text for text in table.column(TEXT_COLUMN).to_pylist() if text]

        return self._read(f"{shard.name} row group {row_group}", texts)

    def close(self) -> None:
        """Close the open shard."""
        if self._open:
            self._open[1].close()
        self._open = None

    def _read(self, what: str, read: Callable[[], T]) -> T:
        """What is read, with errors translated; patiently, from the file's opening on."""

        def afresh() -> T:
            try:
                with parquet_errors(what):
                    return read()
            except StoreUnavailableError:
                self.close()  # a stale handle stays stale
                raise

        return patiently(afresh, DATA_BUDGET_S, self.closing.wait)

    def _file(self, shard: ShardRef) -> pq.ParquetFile:
        if self._open and self._open[0] == shard:
            return self._open[1]
        self.close()
        path = self._local(shard)
        file = pq.ParquetFile(path)
        kind = {field.name: field.type for field in file.schema_arrow}.get(TEXT_COLUMN)
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            file.close()
            raise ShardFormatError(f"{shard.name} has no column {TEXT_COLUMN!r} of strings")
        self._open = (shard, file)
        return file

    def _local(self, shard: ShardRef) -> Path:
        """A verified local file with the shard's content."""
        if isinstance(self._store, LocalObjectStore):
            path = self._store.path_of(shard.name)
            if not path.is_file():
                require_mounted(self._store)
                raise DataChangedError(f"{self.binding.source}: {shard.name} has vanished")
            self._verify(shard, path)
            return path
        # The digest in the name: a changed shard never meets another's cached file.
        path = self._cache / f"{shard.footer_sha256[:16]}-{shard.name}"
        if path.is_file():
            # Gone since: another process has evicted it.
            with contextlib.suppress(DataChangedError, NotFoundError, FileNotFoundError):
                self._verify(shard, path)
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used just now
                return path
        try:
            self._store.get_file(shard.name, path)
        except NotFoundError as error:
            raise DataChangedError(f"{self.binding.source}: {shard.name} has vanished") from error
        self._verify(shard, path)
        self._evict(path)
        return path

    def _verify(self, shard: ShardRef, path: Path) -> None:
        size = path.stat().st_size
        if size != shard.size_bytes:
            raise DataChangedError(
                f"{self.binding.source}: {shard.name} has changed "
                f"({size} bytes, bound with {shard.size_bytes})"
            )
        info = ObjectInfo(path.name, size, datetime.fromtimestamp(0, UTC))
        try:
            found = read_footer(LocalObjectStore(path.parent), info)
        except NotParquetError as error:
            raise DataChangedError(f"{self.binding.source}: {shard.name} has changed") from error
        if found.footer_sha256 != shard.footer_sha256:
            raise DataChangedError(
                f"{self.binding.source}: {shard.name} has changed (its footer differs)"
            )
        self._check_content(shard, path)

    def _check_content(self, shard: ShardRef, path: Path) -> None:
        """All bytes against those that were first read: a footer says nothing of damaged pages.

        The digest is worked out once, and again only where the file was touched since.
        """
        record = self._digests / f"{shard.footer_sha256[:16]}-{shard.name}.json"
        stat = path.stat()
        seen = [str(path), stat.st_size, stat.st_mtime_ns]
        try:
            known = json.loads(record.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get("seen") == seen:
            return
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if known.get("sha256", found) != found:
            raise DataChangedError(
                f"{self.binding.source}: {shard.name} has changed (its content is not what was "
                "first read here, though its footer is the same)"
            )
        write_file(record, iter((json.dumps({"sha256": found, "seen": seen}).encode(),)))

    def _evict(self, newest: Path) -> None:
        """Drop the least recently used shards; a file that another process reads stays readable."""
        files = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                stat = path.stat()
                files.append((stat.st_atime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._cache_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


@contextlib.contextmanager
def parquet_errors(what: str) -> Iterator[None]:
    """Translate pyarrow's errors, and the operating system's, which carry a number: those pass."""
    try:
        yield
    except FileNotFoundError as error:  # evicted between two looks: the next finds it, or says so
        raise StoreUnavailableError(f"{what} is gone just now") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            with local_errors(what):
                raise
        raise ShardFormatError(f"{what} can't be read: {error}") from error
