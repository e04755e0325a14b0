"""Stores that get one thing wrong which checkpoints need, each as some S3 server or its keys do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fakes.memory_store import MemoryObjectStore
from trainer.storage.object_store import ObjectInfo, Progress, StoreRefusedError


class ForgetfulStore(MemoryObjectStore):
    """Ignores the condition of a put."""

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        super().put(key, data)


class UnconditionalStore(MemoryObjectStore):
    """Refuses conditions altogether."""

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        if if_none_match:
            raise StoreRefusedError("NotImplemented: If-None-Match")
        super().put(key, data)


class RangelessStore(MemoryObjectStore):
    """Answers every ranged read with everything."""

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        return super().get(key)


class StaleListStore(MemoryObjectStore):
    """Lists what was there before the last write."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from list(super().list(prefix))[:-1]


class UndeletingStore(MemoryObjectStore):
    """Its keys may write but not delete."""

    def delete(self, key: str) -> None:
        raise StoreRefusedError(f"AccessDenied: {key}")


class KeepingStore(MemoryObjectStore):
    """Says that it deleted, and did not."""

    def delete(self, key: str) -> None:
        pass


class PartlessStore(MemoryObjectStore):
    """Takes small objects only."""

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        raise StoreRefusedError("NotImplemented: CreateMultipartUpload")


class TornStore(MemoryObjectStore):
    """Loses the last part of a file."""

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self.put(key, path.read_bytes()[: -(1 << 20)])
