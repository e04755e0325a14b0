"""Objects by key: the protocol, its errors, the local folder, and the start-up probe.

The S3 side lives in `s3.py`, the only module that knows boto3; it is imported when a bucket is
first opened. Nothing here knows what the objects mean.

Invariant: an object is seen whole or not at all, a conditional put has one winner, and no key
reaches outside its root. Every failure leaves as a `StoreError` that says what the caller can do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

CHUNK_BYTES = 1 << 20
MAX_KEY_BYTES = 1024  # S3's own bound
INCOMING = ".incoming"  # unfinished local writes; no key may start with it

Progress = Callable[[int], None]  # called with the bytes moved since the last call, from any thread


class StoreError(Exception):
    """Base of everything that can go wrong with a store."""


class StoreUriError(StoreError):
    """The store's address or a key can't be used as written: correct it."""


class NotFoundError(StoreError):
    """There is no such object."""


class AlreadyExistsError(StoreError):
    """A conditional put lost: the object is there. Read it to learn who won."""


class StoreUnavailableError(StoreError):
    """The store can't be reached, is overloaded or full: the same call may work later."""


class StoreRefusedError(StoreError):
    """The store said no (credentials, bucket, rights): somebody must change something first."""


class StoreKeyError(StoreRefusedError):
    """The store knows the access key and has another secret for it: waiting changes nothing."""


class StoreUnsuitableError(StoreError):
    """The store answers, but lacks something that checkpoints need: use another."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says about an object."""

    key: str
    size_bytes: int
    modified: datetime  # in UTC, by the store's clock


class ObjectStore(Protocol):
    """Flat keys below one root. Safe to use from several threads.

    Every method may raise StoreUnavailableError (retriable) or StoreRefusedError (not).
    Everything but a conditional put is safe to repeat as it is; after a conditional put that
    ended in StoreUnavailableError, read the key to learn whether it was written.
    """

    @property
    def uri(self) -> str:
        """Where this is, without credentials."""

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        """Write an object whole; with if_none_match only if absent, else AlreadyExistsError."""

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Write a file's bytes as an object; a big one in parallel parts where the store can."""

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) as Python slices them, or all; NotFoundError."""

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All bytes in order, in pieces of at most chunk_bytes; NotFoundError at the first."""

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all; NotFoundError."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with prefix, in no promised order."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""


def open_store(uri: str) -> ObjectStore:
    """The store at `file:/absolute/path` or `s3://bucket/prefix`.

    Nothing is contacted yet. S3 endpoint, region and keys come from the standard AWS_* variables.
    """
    if match := re.fullmatch(r"file:(?://)?(/[^\x00-\x1f]*)", uri):
        return LocalObjectStore(Path(match[1]))
    if match := re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,62})(?:/(.*))?", uri):
        from trainer.storage.s3 import S3ObjectStore

        return S3ObjectStore(match[1], (match[2] or "").strip("/"))
    raise StoreUriError(f"{uri!r}: must be file:/absolute/path or s3://bucket/prefix")


def check_key(key: str) -> str:
    """The key itself if every store can hold it, else StoreUriError."""
    segments = key.split("/")
    if (
        not key
        or any(segment in {"", ".", ".."} for segment in segments)
        or segments[0] == INCOMING
        or any(ord(char) < 32 or char == "\\" for char in key)
        or len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES
    ):
        raise StoreUriError(f"{key!r} can't be a key: relative path, no '.', '..' or empty parts")
    return key


def slice_bounds(start: int | None, end: int | None) -> tuple[int, int | None]:
    """A byte range as non-negative bounds; a store has no negative offsets."""
    begin = 0 if start is None else start
    if begin < 0 or (end is not None and end < 0):
        raise StoreUriError(f"byte range [{start}, {end}) has a negative bound")
    return begin, end


class LocalObjectStore:
    """A folder. Writes are atomic and durable: temporary file, fsync, then link or rename.

    Symbolic links that the folder's owner made are followed: only keys are kept inside.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        return f"file:{self.root}"

    def path_of(self, key: str) -> Path:
        """The file that holds an object, for those who can read it in place."""
        return self.root / check_key(key)

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        self._write(key, lambda file: file.write(data), replace=not if_none_match)

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        def copy(file: BinaryIO) -> None:
            with path.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
                    if progress:
                        progress(len(chunk))

        self._write(key, copy, replace=True)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        begin, stop = slice_bounds(start, end)
        with local_errors(key), self.path_of(key).open("rb") as file:
            file.seek(begin)
            return file.read() if stop is None else file.read(max(0, stop - begin))

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        with local_errors(key), self.path_of(key).open("rb") as file:
            while chunk := file.read(chunk_bytes):
                yield chunk

    def get_file(self, key: str, path: Path) -> None:
        write_file(path, self.stream(key))

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with local_errors(key):
                path = self.path_of(key)
                return self._info(key, path.stat()) if path.is_file() else None
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        with local_errors(prefix):
            yield from self._walk(folder, prefix)

    def delete(self, key: str) -> None:
        path = self.path_of(key)
        with contextlib.suppress(NotFoundError), local_errors(key):
            path.unlink()
        # Empty folders are not objects; a folder that fills up meanwhile stays.
        for parent in path.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                below = key + "/"
                if key != INCOMING and (below.startswith(prefix) or prefix.startswith(below)):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):  # deleted since the scan
                    yield self._info(key, entry.stat())

    def _info(self, key: str, stat: os.stat_result) -> ObjectInfo:
        return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def _write(self, key: str, fill: Callable[[BinaryIO], object], replace: bool) -> None:
        target = self.path_of(key)
        temporary = self.root / INCOMING / secrets.token_hex(12)
        with local_errors(key):
            make_folder(temporary.parent)
            try:
                with temporary.open("xb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                self._publish(temporary, target, replace)
            finally:
                temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, target: Path, replace: bool) -> None:
        for last_try in (False, False, True):
            make_folder(target.parent)
            try:
                if replace:
                    temporary.replace(target)
                else:
                    os.link(temporary, target)
            except FileNotFoundError:  # a delete took the empty folder away just now
                if last_try:
                    raise
            else:
                sync_folder(target.parent)
                return


def require_mounted(store: ObjectStore) -> None:
    """Raise StoreUnavailableError where a folder is missing or empty: its disk is not there yet."""
    if isinstance(store, LocalObjectStore) and next(iter(store.list("")), None) is None:
        raise StoreUnavailableError(f"{store.uri} is missing or empty; is its disk mounted?")


def write_file(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a local file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with local_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def local_errors(key: str) -> Iterator[None]:
    """Translate the operating system's errors, here and nowhere else."""
    try:
        yield
    except FileExistsError as error:
        raise AlreadyExistsError(f"{key} exists") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"{key} does not exist") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "failed"
        if error.errno == errno.ENOTDIR:
            raise NotFoundError(f"{key} does not exist: a part of its path is a file") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}:
            raise StoreRefusedError(f"{key}: {reason}; check the folder's rights") from error
        raise StoreUnavailableError(f"{key}: {reason}") from error


def probe(store: ObjectStore) -> None:
    """Check at start-up that a store can hold checkpoints; leaves nothing behind.

    Raises:
        StoreUnsuitableError: naming what the store got wrong.
        StoreUnavailableError, StoreRefusedError: it can't be used at all at present.
    """
    key = f"everstep-probe-{secrets.token_hex(8)}"
    content = b"everstep probe"
    store.put(key, content)
    try:
        for what, check in _PROBES:
            try:
                passed = check(store, key, content)
            except StoreUnavailableError:
                raise
            except StoreError as error:
                raise StoreUnsuitableError(f"{store.uri}: {what} failed: {error}") from error
            if not passed:
                raise StoreUnsuitableError(f"{store.uri}: {what} does not work as it must")
    except StoreError:
        with contextlib.suppress(StoreError):  # what went wrong first is what is told
            store.delete(key)
        raise


def _refuses_overwrite(store: ObjectStore, key: str, content: bytes) -> bool:
    try:
        store.put(key, b"overwritten", if_none_match=True)
    except AlreadyExistsError:
        return store.get(key) == content
    return False


def _deletes(store: ObjectStore, key: str, _content: bytes) -> bool:
    store.delete(key)
    return store.head(key) is None


_PROBES: tuple[tuple[str, Callable[[ObjectStore, str, bytes], bool]], ...] = (
    ("a ranged read", lambda store, key, content: store.get(key, 3, 8) == content[3:8]),
    ("a conditional write (PUT if-none-match)", _refuses_overwrite),
    (
        "a listing right after the write",
        lambda store, key, content: [info.key for info in store.list(key)] == [key],
    ),
    ("a deletion", _deletes),  # the last: nothing is left
)
