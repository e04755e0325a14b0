"""Files that clients bring: text shards and tokenizers, spooled, checked, then stored.

Knows no gRPC. A file is received into a spool folder, since its digest is known only at the end,
and only then put into the store.

Invariant: the store holds a file whole and with the digest that was announced, or as it was before.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from service.errors import FileExistsElsewiseError, InvalidRequestError, NoSpaceError, require
from service.storage import Storage
from trainer.storage import layout

AT_ONCE = 4  # files being received; more wait
LARGEST_BYTES = 128 << 30  # what S3 takes in 10,000 parts of 16 MiB, less a margin
SPARE_BYTES = 1 << 30  # the database is on the same disk


@dataclass(frozen=True)
class Announced:
    """A file that a client wants stored. sha256 in hexadecimal."""

    folder: str
    name: str
    size_bytes: int
    sha256: str
    overwrite: bool

    def checked(self) -> Announced:
        """Itself; InvalidRequestError naming the field, its value and the bound."""
        wrong = layout.data_name_problem(self.folder, self.name)
        require(wrong is None, str(wrong))
        fits = 0 < self.size_bytes <= LARGEST_BYTES
        require(fits, f"file.size_bytes: {self.size_bytes}: 1 to {LARGEST_BYTES}")
        digest = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        require(digest, f"file.sha256: {self.sha256[:80]!r}: 64 hexadecimal digits")
        return self

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return layout.data_key(self.folder, self.name)


class Upload:
    """One file on its way. present: the store holds it already, so nothing need be sent."""

    def __init__(self, announced: Announced, uri: str, present: bool, file: BinaryIO) -> None:
        self.announced = announced
        self.uri = uri
        self.present = present
        self.received_bytes = 0
        self._file = file
        self._digest = hashlib.sha256()

    async def write(self, data: bytes) -> None:
        """Take the next bytes; InvalidRequestError past the announced size."""
        self.received_bytes += len(data)
        if self.received_bytes > self.announced.size_bytes:
            raise InvalidRequestError(
                f"data: more than the {self.announced.size_bytes} bytes that were announced"
            )
        await asyncio.to_thread(self._take, data)

    def check(self) -> None:
        """Raise InvalidRequestError unless size and digest are as announced."""
        self._file.flush()
        if self.received_bytes != self.announced.size_bytes:
            raise InvalidRequestError(
                f"data: {self.received_bytes} bytes came, not the {self.announced.size_bytes} "
                "that were announced"
            )
        if self._digest.hexdigest() != self.announced.sha256:
            raise InvalidRequestError(
                f"data: its sha256 is {self._digest.hexdigest()}, not the one announced; did the "
                "file change while it was sent?"
            )

    def _take(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


class Uploads:
    """Receives files into the store of all jobs."""

    def __init__(self, storage: Storage, spool: Path) -> None:
        """spool: a folder of its own; what a killed service left in it is deleted."""
        self._storage = storage
        self._spool = spool
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._coming: dict[Path, Upload] = {}
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)

    @asynccontextmanager
    async def receive(self, announced: Announced) -> AsyncIterator[Upload]:
        """An upload to write to; when the block ends without an error, the file is stored.

        Raises:
            InvalidRequestError: what was announced can't be stored, or isn't what came.
            FileExistsElsewiseError: the name is taken by other content.
            NoSpaceError: the spool's disk is too full.
            StorageAwayError: the store can't be reached.
        """
        announced.checked()
        uri = self._storage.data_uri(announced.folder)
        async with self._turns:
            there = await self._storage.same_content(
                announced.key, announced.size_bytes, announced.sha256
            )
            if there is False and not announced.overwrite:
                raise FileExistsElsewiseError(
                    f"{uri}/{announced.name} is there with other content. Jobs bound to it would "
                    "refuse the new one: choose another folder, or overwrite"
                )
            if not there:
                self._check_space(announced.size_bytes)
            path = self._spool / secrets.token_hex(8)
            try:
                with path.open("xb") as file:
                    upload = Upload(announced, uri, bool(there), file)
                    self._coming[path] = upload
                    yield upload
                    if not upload.present:
                        upload.check()
                        await self._storage.put_file(announced.key, path)
            finally:
                self._coming.pop(path, None)
                path.unlink(missing_ok=True)

    def _check_space(self, size_bytes: int) -> None:
        # What is still to come from those who were let in.
        promised = sum(
            each.announced.size_bytes - each.received_bytes
            for each in self._coming.values()
            if not each.present
        )
        free = shutil.disk_usage(self._spool).free - promised
        if free < size_bytes + SPARE_BYTES:
            raise NoSpaceError(
                f"file.size_bytes: {size_bytes}: the service's disk has {free} bytes free, of "
                f"which {SPARE_BYTES} stay; make room"
            )
