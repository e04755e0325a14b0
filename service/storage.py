"""Object storage as the service uses it: checkpoints looked up, data bound, documents written.

Thin: every call runs trainer.storage's synchronous code in a thread, and translates its errors to
what the caller can do. Holds no state of its own.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from service import checkpoints
from service.checkpoints import LATEST, CheckpointName
from service.errors import CheckpointNotFoundError, StorageAwayError, StoredDataError
from trainer.contract.spec import CheckpointSpec, DataSpec
from trainer.contract.violations import SpecError, Violation
from trainer.storage import layout
from trainer.storage.binding import BindingError, DataBinding, bind
from trainer.storage.deletion import delete_job
from trainer.storage.documents import DocumentError, sha256_hex
from trainer.storage.logs import LogLine, new_pieces, read_piece
from trainer.storage.manifest import CheckpointRef, JobDocument, Manifest, ManifestError
from trainer.storage.nanochat_files import (
    NanochatCheckpointError,
    NanochatSummary,
    split_name,
    summarise,
)
from trainer.storage.object_store import (
    NotFoundError,
    ObjectStore,
    StoreError,
    StoreUnavailableError,
    StoreUriError,
    open_store,
)
from trainer.storage.repository import CheckpointRepository
from trainer.storage.retention import Retention, put_in_force

P = ParamSpec("P")
T = TypeVar("T")

OPEN_STORES = 64
FILE = "file:"
BUILTIN = "builtin:"
BUILTIN_CORPUS = "python-docs"
BUILTIN_FOLDER = "builtin"
NANOCHAT = re.compile(r"(nanochat:)?[^\x00-\x1f]{1,1000}@[0-9]{1,10}")


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint. manifest: None where it can't be read, so that none can load it."""

    ref: CheckpointRef
    manifest: Manifest | None


class Storage:
    """Jobs' storage, asynchronously."""

    def __init__(self, store: ObjectStore, data_roots: Sequence[Path] = ()) -> None:
        """data_roots: folders that file: URIs of specs must lie in; none: any."""
        self._store = store
        self._data_roots = [root.resolve() for root in data_roots]
        # A client of S3 takes a quarter of a second to make, and any thread may use it.
        self._open = functools.lru_cache(maxsize=OPEN_STORES)(open_store)
        self._builtin: dict[int, tuple[str, str]] = {}  # vocabulary size -> source, tokenizer
        self._preparing = asyncio.Lock()
        self._verifying = asyncio.Lock()  # one at a time: each reads gigabytes

    @property
    def uri(self) -> str:
        """Where all jobs lie."""
        return self._store.uri

    async def save_document(self, document: JobDocument) -> None:
        """Write a job's spec.json, once."""
        await self._call(self._repository(document.job_id).save_document, document)

    async def save_retention(self, job_id: str, spec: CheckpointSpec) -> None:
        """Put another retention in force for a job; see trainer.storage.retention."""
        await self._call(put_in_force, self._repository(job_id), Retention.of(spec))

    async def delete_job(self, job_id: str, start: CheckpointRef | None) -> None:
        """Delete everything of a job; see trainer.storage.deletion."""
        await self._call(delete_job, self._store, job_id, start)

    async def hold(self, ref: CheckpointRef, by_job_id: str) -> None:
        """Keep the checkpoint that a new job starts from."""
        try:
            await self._call(self._repository(ref.job_id).hold, ref, by_job_id)
        except NotFoundError:
            reason = "was deleted a moment ago; choose another"
            raise SpecError([Violation("start.from", str(ref), reason)]) from None

    async def document(self, job_id: str) -> JobDocument:
        """A job's spec.json; NotFoundError."""
        if not layout.is_job_id(job_id):
            raise NotFoundError(f"no job {job_id!r}")
        return await self._call(self._repository(job_id).document)

    async def resolve(self, name: str) -> Manifest:
        """The manifest of the current checkpoint that JOB@STEP or JOB@latest names.

        Raises:
            SpecError: no such checkpoint; says which there are.
        """
        job_id, _, step = name.rpartition("@")
        current = await self.current(job_id)
        ref = checkpoints.choose(current, None if step == LATEST else int(step))
        if ref is None:
            there = checkpoints.shown_steps(current)
            reason = f"no such checkpoint; job {job_id} has at steps: {there}"
            raise SpecError([Violation("start.from", name, reason)])
        return await self._call(self._repository(job_id).manifest, ref)

    async def nanochat(self, name: str) -> NanochatSummary:
        """The checkpoint that nanochat:<folder or uri>@STEP names; SpecError."""
        if not NANOCHAT.fullmatch(name):
            raise SpecError([Violation("start.from", name, "must name a step of a folder")])
        uri, number = split_name(name)
        if (outside := self.outside(uri)) is not None:
            raise SpecError([Violation("start.from", name, outside)])
        try:
            store = self._open(uri)
            return await self._call(summarise, store, number)
        except (NanochatCheckpointError, NotFoundError, StoreUriError) as error:
            raise SpecError([Violation("start.from", name, str(error))]) from error

    async def current(self, job_id: str) -> list[CheckpointRef]:
        """The checkpoints of a job that count, newest first."""
        return await self._call(self._repository(job_id).current)

    async def stored(self, job_id: str) -> list[Stored]:
        """The same with what each holds; one deleted meanwhile is left out."""
        repository = self._repository(job_id)

        def read() -> list[Stored]:
            found = (_read(repository, ref) for ref in repository.current())
            return [stored for stored in found if stored is not None]

        return await self._call(read)

    async def manifests(self, job_id: str) -> list[Manifest]:
        """What the readable ones among them hold."""
        found = await self.stored(job_id)
        return [stored.manifest for stored in found if stored.manifest is not None]

    async def verify(self, name: CheckpointName) -> tuple[Stored, list[str]]:
        """Read every byte of a checkpoint back; what is wrong with it, empty: nothing.

        Raises:
            CheckpointNotFoundError: there is none, or it was deleted while it was read.
        """
        repository = self._repository(name.job_id)

        def read(look: Callable[[], None]) -> tuple[Stored, list[str]]:
            ref = checkpoints.find(repository, name.step)
            problems = [str(error) for error in repository.verify(ref, look)]
            stored = _read(repository, ref)
            if stored is None:
                raise CheckpointNotFoundError(f"{ref} was deleted a moment ago")
            return stored, problems

        async with self._verifying:
            return await self._call_long(read)

    async def require(self, name: CheckpointName) -> None:
        """Raise CheckpointNotFoundError unless there is a current checkpoint of that name."""
        await self._call(checkpoints.find, self._repository(name.job_id), name.step)

    async def delete_checkpoint(self, name: CheckpointName) -> None:
        """Delete a checkpoint that nobody needs; see checkpoints.delete."""
        await self._call(checkpoints.delete, self._repository(name.job_id), name.step)

    async def log_pieces(
        self, job_id: str, seen: Collection[layout.LogKey], attempt: int | None, rank: int | None
    ) -> list[layout.LogKey]:
        """The pieces of a job's logs that were not seen yet, in order."""
        return await self._call(new_pieces, self._store, job_id, seen, attempt, rank)

    async def log_lines(self, job_id: str, key: layout.LogKey) -> list[LogLine]:
        """The lines of a piece."""
        return await self._call(lambda: list(read_piece(self._store, job_id, key)))

    def checkpoint_uri(self, ref: CheckpointRef) -> str:
        """The folder of a checkpoint."""
        folder = layout.checkpoint_prefix(ref.job_id, ref.step, ref.attempt)
        return f"{self.uri.rstrip('/')}/{folder.rstrip('/')}"

    def data_uri(self, folder: str) -> str:
        """A folder of files that users brought, as a spec names it."""
        return f"{self.uri.rstrip('/')}/{layout.data_prefix(folder).rstrip('/')}"

    async def same_content(self, key: str, size_bytes: int, sha256: str) -> bool | None:
        """Whether the object at key has this content; None where there is no object."""

        def read(look: Callable[[], None]) -> bool | None:
            info = self._store.head(key)
            if info is None or info.size_bytes != size_bytes:
                return None if info is None else False
            digest = hashlib.sha256()
            for chunk in self._store.stream(key):
                look()
                digest.update(chunk)
            return digest.hexdigest() == sha256

        return await self._call_long(read)

    async def put_file(self, key: str, path: Path) -> None:
        """Write a file's bytes as an object, whole or not at all."""
        await self._call_long(lambda look: self._store.put_file(key, path, lambda _: look()))

    async def bind(self, data: DataSpec) -> DataBinding:
        """Bind a job to its data and tokenizer as they are now.

        Raises:
            SpecError: what a field names can't be used.
        """
        source, tokenizer = await self._addresses(data)
        try:
            return await self._call(bind, source, tokenizer, data.validation, self._open)
        except BindingError as error:
            value = getattr(data, error.field.rpartition(".")[2], error.value)
            raise SpecError([Violation(error.field, value, error.reason)]) from error

    async def _addresses(self, data: DataSpec) -> tuple[str, str]:
        """Where source and tokenizer lie; the builtin corpus is made on first use."""
        source, tokenizer = data.source, data.tokenizer
        found = []
        if source.startswith(BUILTIN) and source != BUILTIN + BUILTIN_CORPUS:
            reason = f"the builtin corpus is {BUILTIN}{BUILTIN_CORPUS}"
            found.append(Violation("data.source", source, reason))
        size = 0
        if tokenizer.startswith(BUILTIN):
            corpus, _, text = tokenizer.removeprefix(BUILTIN).rpartition("-")
            size = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
            if corpus != BUILTIN_CORPUS or not 512 <= size <= 65_536:
                reason = (
                    f"a builtin tokenizer is {BUILTIN}{BUILTIN_CORPUS}-<vocabulary size>, "
                    "the size from 512 to 65536"
                )
                found.append(Violation("data.tokenizer", tokenizer, reason))
        for field, uri in (("data.source", source), ("data.tokenizer", tokenizer)):
            if (outside := self.outside(uri)) is not None:
                found.append(Violation(field, uri, outside))
        if found:
            raise SpecError(found)
        if source.startswith(BUILTIN) or size:
            # Goes on where the caller hangs up, who will ask again: none is begun beside it.
            making = self._prepare_builtin(size or 512)
            made_source, made_tokenizer = await asyncio.shield(making)
            source = made_source if source.startswith(BUILTIN) else source
            tokenizer = made_tokenizer if size else tokenizer
        return source, tokenizer

    def outside(self, uri: str) -> str | None:
        """Why a file: URI may not be used, links followed; None: it may, or isn't one."""
        if not uri.startswith(FILE) or not self._data_roots:
            return None
        path = Path("/", uri.removeprefix(FILE).lstrip("/")).resolve()
        if any(path.is_relative_to(root) for root in self._data_roots):
            return None
        return f"must lie in {' or '.join(map(str, self._data_roots))} (EVERSTEP_DATA_ROOTS)"

    async def _prepare_builtin(self, vocab_size: int) -> tuple[str, str]:
        async with self._preparing:
            if vocab_size not in self._builtin:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "trainer.data.builtin",
                    "--out",
                    f"{self.uri.rstrip('/')}/{BUILTIN_FOLDER}",
                    "--vocab-size",
                    str(vocab_size),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
                out, err = await process.communicate()
                if process.returncode != 0:
                    last = err.decode(errors="replace").strip().splitlines()[-1:]
                    raise StorageAwayError(f"the builtin corpus can't be prepared: {last}")
                made = json.loads(out)
                self._builtin[vocab_size] = (made["source"], made["tokenizer"])
            return self._builtin[vocab_size]

    def _repository(self, job_id: str) -> CheckpointRepository:
        return CheckpointRepository(self._store, job_id)

    async def _call_long(self, work: Callable[[Callable[[], None]], T]) -> T:
        """As _call. Work is given what to call beside each piece: it raises once nobody waits.

        A thread can't be cancelled, and all calls share a few: those who leave must free theirs.
        """
        gone = threading.Event()

        def look() -> None:
            if gone.is_set():
                raise StoreUnavailableError("nobody waits for this any more")

        try:
            return await self._call(work, look)
        finally:
            gone.set()

    async def _call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except NotFoundError:
            raise
        except DocumentError as error:
            raise StoredDataError(str(error)) from error
        except StoreError as error:
            raise StorageAwayError(str(error)) from error


def _read(repository: CheckpointRepository, ref: CheckpointRef) -> Stored | None:
    """A checkpoint as it is; None where it isn't there any more."""
    try:
        return Stored(ref, repository.manifest(ref))
    except NotFoundError:
        return None
    except ManifestError:
        return Stored(ref, None)


def manifest_sha256(manifest: Manifest) -> str:
    """The digest by which a stop acknowledges its checkpoint."""
    return sha256_hex(manifest.encode())
