"""A store whose calls fail as scripted, before or after they took effect, or wait at a gate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.storage.object_store import (
    CHUNK_BYTES,
    ObjectInfo,
    ObjectStore,
    Progress,
    StoreUnavailableError,
)


@dataclass
class StoreFault:
    """Fails the next `times` calls whose `<method> <key>` contains a text."""

    text: str
    times: int = 1
    after: bool = False
    fired: int = 0


class FlakyStore:
    """Passes calls on to a store. away: every call fails. gate: writes wait while it is closed."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.away = False
        self.gate = threading.Event()
        self.gate.set()
        self.waits = threading.Event()  # set once a write waits at the gate
        self.calls: list[str] = []
        self._faults: list[StoreFault] = []

    @property
    def uri(self) -> str:
        return self.inner.uri

    def script(self, text: str, times: int = 1, after: bool = False) -> StoreFault:
        """Let calls that contain a text fail."""
        self._faults.append(StoreFault(text, times, after))
        return self._faults[-1]

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        self._call("put", key, data, if_none_match)

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._call("put_file", key, path, progress)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        return self._call("get", key, start, end)

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return self._call("stream", key, chunk_bytes)

    def get_file(self, key: str, path: Path) -> None:
        self._call("get_file", key, path)

    def head(self, key: str) -> ObjectInfo | None:
        return self._call("head", key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._call("list", prefix)

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def _call(self, method: str, *arguments: Any) -> Any:
        text = f"{method} {arguments[0]}"
        self.calls.append(text)
        if method.startswith("put") and not self.gate.is_set():
            self.waits.set()
            self.gate.wait()
        if self.away:
            raise StoreUnavailableError("scripted: the store is away")
        matching = (f for f in self._faults if f.fired < f.times and f.text in text)
        fault = next(matching, None)
        if fault is None:
            return getattr(self.inner, method)(*arguments)
        fault.fired += 1
        if fault.after:
            getattr(self.inner, method)(*arguments)
        raise StoreUnavailableError(f"scripted: {text}")
