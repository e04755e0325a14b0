"""What a caller who hangs up leaves behind: nothing that works on."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.api import ADMIN, Api, bearer, served
from tests.fakes.checkpoints import JOB, save
from tests.fakes.control_plane import TINY, changed, new_job
from trainer.storage.object_store import CHUNK_BYTES, LocalObjectStore, Progress
from trainer.storage.repository import CheckpointRepository

LATE_S = 10.0
SHA256 = hashlib.sha256(b"x").hexdigest()
HEADER = pb.FileHeader(folder="d", name="a.parquet", size_bytes=1, sha256=SHA256)


class Endless:
    """A read or write of a store that goes on until its caller ends it, or for long."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def pieces(self) -> Iterator[bytes]:
        self.begun.set()
        try:
            for _ in range(int(2 * LATE_S / 0.01)):
                yield b""
                time.sleep(0.01)
        finally:
            self.over.set()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        await made.plane.add(new_job(1, id=JOB, request_id="JOB"))
        repository = CheckpointRepository(made.plane.store, JOB)
        repository.claim(None, "host")
        save(repository, tmp_path, 4)
        yield made


async def test_a_corpus_that_somebody_asked_for_is_made_once_and_to_its_end(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    through = asyncio.create_subprocess_exec

    async def counted(*command: Any, **options: Any) -> Any:
        process = await through(*command, **options)
        begun.append(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", counted)
    data = {"source": "builtin:python-docs", "tokenizer": "builtin:python-docs-512"}
    request = pb.PlanJobRequest(spec=dict_to_proto(changed(TINY, data=data)))
    leaving = api.training.PlanJob(request, metadata=bearer(ADMIN))
    async with asyncio.timeout(LATE_S):
        while not begun:
            await asyncio.sleep(0.01)
    leaving.cancel()
    async with asyncio.timeout(60):
        await api.training.PlanJob(request, metadata=bearer(ADMIN))
    assert [process.returncode for process in begun] == [0]


async def upload() -> AsyncIterator[pb.PutFileRequest]:
    yield pb.PutFileRequest(file=HEADER)
    yield pb.PutFileRequest(data=b"x")


@pytest.mark.parametrize("call", ["verify", "compare", "store"])
async def test_who_leaves_frees_the_thread_that_reads_or_writes_for_it(
    api: Api, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    endless = Endless()

    def stream(_store: Any, _key: str, _chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return endless.pieces()

    def put_file(_store: Any, _key: str, _path: Path, progress: Progress | None = None) -> None:
        for piece in endless.pieces():
            assert progress is not None
            progress(len(piece))

    if call == "store":
        monkeypatch.setattr(LocalObjectStore, "put_file", put_file)
    else:
        api.plane.store.put("data/d/a.parquet", b"x")
        monkeypatch.setattr(LocalObjectStore, "stream", stream)
    if call == "verify":
        request = pb.VerifyCheckpointRequest(checkpoint=f"{JOB}@4")
        calling: Any = api.training.VerifyCheckpoint(request, metadata=bearer(ADMIN))
    else:
        calling = api.training.PutFile(upload(), metadata=bearer(ADMIN))
    assert await asyncio.to_thread(endless.begun.wait, LATE_S)
    calling.cancel()
    assert await asyncio.to_thread(endless.over.wait, LATE_S), "it works on for nobody"
