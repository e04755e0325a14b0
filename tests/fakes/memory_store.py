"""An object store in memory, and a wrapper that crashes at a chosen call.

Passes the same contract suite as the real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.storage.object_store import (
    CHUNK_BYTES,
    AlreadyExistsError,
    NotFoundError,
    ObjectInfo,
    ObjectStore,
    Progress,
    check_key,
    slice_bounds,
    write_file,
)


class MemoryObjectStore:
    """A dict with a lock."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory:"

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        check_key(key)
        with self._lock:
            if if_none_match and key in self.objects:
                raise AlreadyExistsError(f"{key} exists")
            self.objects[key] = (bytes(data), datetime.now(UTC))

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        data = path.read_bytes()
        self.put(key, data)
        if progress:
            progress(len(data))

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        begin, stop = slice_bounds(start, end)
        return self._data(key)[begin:stop]

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        data = self._data(key)
        for start in range(0, len(data), chunk_bytes):
            yield data[start : start + chunk_bytes]

    def get_file(self, key: str, path: Path) -> None:
        write_file(path, self.stream(key))

    def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        found = self.objects.get(key)
        return ObjectInfo(key, len(found[0]), found[1]) if found else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            keys = sorted(key for key in self.objects if key.startswith(prefix))
            found = [
                ObjectInfo(key, len(self.objects[key][0]), self.objects[key][1]) for key in keys
            ]
        yield from found

    def delete(self, key: str) -> None:
        check_key(key)
        self.objects.pop(key, None)

    def snapshot(self) -> dict[str, bytes]:
        """All content, to compare."""
        return {key: data for key, (data, _) in self.objects.items()}

    def _data(self, key: str) -> bytes:
        check_key(key)
        try:
            return self.objects[key][0]
        except KeyError:
            raise NotFoundError(f"{key} does not exist") from None


class CrashError(BaseException):
    """The process dies here; nothing may catch it."""


class CrashingStore:
    """Counts the calls to a store and dies before or after the crash_at-th (from 0)."""

    def __init__(
        self, inner: ObjectStore, crash_at: int | None = None, after: bool = False
    ) -> None:
        self.inner = inner
        self.calls: list[str] = []
        self.fired = False
        self._crash_at = crash_at
        self._after = after

    @property
    def uri(self) -> str:
        return self.inner.uri

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        self._call("put", key, data, if_none_match)

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._call("put_file", key, path, progress)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        return self._call("get", key, start, end)

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return iter(list(self._call("stream", key, chunk_bytes)))

    def get_file(self, key: str, path: Path) -> None:
        self._call("get_file", key, path)

    def head(self, key: str) -> ObjectInfo | None:
        return self._call("head", key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(tuple(self._call("list", prefix)))

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def _call(self, name: str, *arguments: Any) -> Any:
        number = len(self.calls)
        self.calls.append(f"{name} {arguments[0]}")
        if number == self._crash_at and not self._after:
            self.fired = True
            raise CrashError
        result = getattr(self.inner, name)(*arguments)
        if number == self._crash_at:
            self.fired = True
            raise CrashError
        return result
