"""Data brought into the store, over a real server: `Client.put_file` and `everstep data put`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from everstep import Client
from everstep.cli.__main__ import run
from everstep.errors import InvalidRequestError, RefusedError
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service import servicer, uploads
from tests.fakes.api import ADMIN, Api, bearer, served
from tests.fakes.control_plane import TINY, changed
from tests.fakes.corpus import CORPUS, TOKENIZER

SHARD = CORPUS / "shard_00000.parquet"


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    async with served(tmp_path / "service") as made:
        monkeypatch.setenv("EVERSTEP_ADDRESS", made.address)
        monkeypatch.setenv("EVERSTEP_TOKEN", ADMIN)
        yield made


async def call(work: Callable[[Client], Any]) -> Any:
    """Something done with a client, off the server's loop."""

    def inside() -> Any:
        with Client() as client:
            return work(client)

    return await asyncio.to_thread(inside)


async def cli(*arguments: str) -> int:
    return await asyncio.to_thread(run, arguments)


def spooled(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "service" / "uploads").iterdir()]


async def test_a_file_is_stored_whole_and_never_sent_twice(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    uri = await call(lambda client: client.put_file(SHARD, "corpus", progress=heard.append))
    assert uri == f"{api.plane.store.uri}/data/corpus"
    assert api.plane.store.get("data/corpus/shard_00000.parquet") == SHARD.read_bytes()
    assert heard[-1] == SHARD.stat().st_size
    # Nothing could be written now: so nothing was sent.
    monkeypatch.setattr(uploads.Upload, "write", None)
    assert await call(lambda client: client.put_file(SHARD, "corpus")) == uri
    assert spooled(tmp_path) == []


async def test_other_content_under_a_name_is_refused_unless_told_to_overwrite(
    api: Api, tmp_path: Path
) -> None:
    await call(lambda client: client.put_file(SHARD, "corpus"))
    other = tmp_path / SHARD.name
    for content in (b"shorter", SHARD.read_bytes()[:-1] + b"x"):
        other.write_bytes(content)
        with pytest.raises(RefusedError, match="other content") as caught:
            await call(lambda client: client.put_file(other, "corpus"))
        assert caught.value.reason == "FILE_EXISTS"
        assert api.plane.store.get(f"data/corpus/{SHARD.name}") == SHARD.read_bytes()
    await call(lambda client: client.put_file(other, "corpus", overwrite=True))
    assert api.plane.store.get(f"data/corpus/{SHARD.name}") == other.read_bytes()


def header(data: bytes, **changes: Any) -> pb.PutFileRequest:
    facts: dict[str, Any] = {
        "folder": "corpus",
        "name": "a.parquet",
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return pb.PutFileRequest(file=pb.FileHeader(**{**facts, **changes}))


async def refused(api: Api, *requests: pb.PutFileRequest) -> Any:
    """How a client that sends without waiting for answers is refused."""

    def inside() -> Any:
        with grpc.insecure_channel(api.address) as channel:
            stub = rpc.TrainingServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                [*stub.PutFile(iter(requests), metadata=bearer(ADMIN), timeout=20)]
            return caught.value

    return await asyncio.to_thread(inside)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"folder": ""}, "file.folder"),
        ({"folder": "../jobs"}, "file.folder"),
        ({"folder": ".hidden"}, "file.folder"),
        ({"folder": "x" * 65}, "file.folder"),
        ({"name": "../a.parquet"}, "file.name"),
        ({"name": "a.txt"}, "file.name"),
        ({"name": "manifest.json"}, "file.name"),
        ({"size_bytes": 0}, "file.size_bytes"),
        ({"size_bytes": 1 << 50}, "file.size_bytes"),
        ({"sha256": "0"}, "file.sha256"),
        ({"sha256": "Z" * 64}, "file.sha256"),
    ],
)
async def test_what_cannot_be_stored_is_refused_by_field(
    api: Api, changes: dict[str, Any], field: str
) -> None:
    error = await refused(api, header(b"data", **changes), pb.PutFileRequest(data=b"data"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}: ")
    assert [*api.plane.store.list("")] == []


async def test_bytes_that_are_not_those_announced_leave_nothing(api: Api, tmp_path: Path) -> None:
    data = pb.PutFileRequest(data=b"data")
    cases = {
        "must be announced": [data],
        "3 bytes came, not the 4": [header(b"data"), pb.PutFileRequest(data=b"dat")],
        "more than the 4 bytes": [header(b"data"), data, data],
        "not the one announced": [header(b"data"), pb.PutFileRequest(data=b"atad")],
    }
    for words, requests in cases.items():
        error = await refused(api, *requests)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, words
        assert words in (error.details() or "")
    assert [*api.plane.store.list("")] == []
    assert spooled(tmp_path) == []


async def test_a_full_disk_is_said_before_anything_is_sent(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SPARE_BYTES", 1 << 60)
    error = await refused(api, header(b"data"), pb.PutFileRequest(data=b"data"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "bytes free" in error.details()


async def test_room_that_was_promised_to_one_upload_is_not_promised_to_the_next(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = uploads.SPARE_BYTES + 6
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))

    async def requests() -> AsyncIterator[pb.PutFileRequest]:
        yield header(b"data")
        await asyncio.sleep(60)

    first = api.training.PutFile(requests(), metadata=bearer(ADMIN))
    assert not (await first.read()).present
    error = await refused(api, header(b"more"), pb.PutFileRequest(data=b"more"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()
    async with asyncio.timeout(10):
        while spooled(tmp_path):
            await asyncio.sleep(0.02)
    again = api.training.PutFile(requests(), metadata=bearer(ADMIN))
    assert not (await again.read()).present
    again.cancel()


async def test_uploads_that_send_nothing_more_make_room_for_others(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "UPLOAD_IDLE_S", 0.5)

    async def stalls() -> AsyncIterator[pb.PutFileRequest]:
        yield header(b"data")
        await asyncio.Event().wait()

    stalled = [
        api.training.PutFile(stalls(), metadata=bearer(ADMIN)) for _ in range(uploads.AT_ONCE)
    ]
    for each in stalled:
        assert not (await each.read()).present
    async with asyncio.timeout(10):
        await call(lambda client: client.put_file(SHARD, "corpus"))
        for each in stalled:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await each.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert spooled(tmp_path) == []


async def test_a_connection_that_breaks_leaves_nothing(api: Api, tmp_path: Path) -> None:
    async def requests() -> AsyncIterator[pb.PutFileRequest]:
        yield header(b"data")
        yield pb.PutFileRequest(data=b"da")
        await asyncio.sleep(60)

    call = api.training.PutFile(requests(), metadata=bearer(ADMIN))
    assert not (await call.read()).present
    assert len(spooled(tmp_path)) == 1
    call.cancel()
    async with asyncio.timeout(10):
        while spooled(tmp_path):
            await asyncio.sleep(0.02)
    assert [*api.plane.store.list("")] == []


async def test_a_file_that_is_none_of_ours_is_refused(api: Api, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InvalidRequestError, match=r"file\.name: 'notes\.txt'"):
        await call(lambda client: client.put_file(tmp_path / "notes.txt", "corpus"))


async def test_a_folder_becomes_data_that_a_job_can_name(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await cli("data", "put", str(CORPUS), "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    folder = f"{api.plane.store.uri}/data"
    names = {"source": f"{folder}/corpus", "tokenizer": f"{folder}/corpus-tokenizer"}
    assert {name: found[name] for name in names} == names
    plan = await call(lambda client: client.plan(changed(TINY, data=names)))
    assert plan.shape.vocab_size == 768


async def test_nanochats_base_folder_works_as_it_stands(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "nanochat"
    (base / "tokenizer").mkdir(parents=True)
    (base / "base_data_climbmix").mkdir()
    for path in sorted(CORPUS.glob("*.parquet")):
        (base / "base_data_climbmix" / path.name).symlink_to(path)
    (base / "tokenizer" / "tokenizer.pkl").symlink_to(TOKENIZER / "tokenizer.pkl")
    assert await cli("data", "put", str(base), "--name", "climbmix") == 0
    folder = f"{api.plane.store.uri}/data"
    said = capsys.readouterr().out.strip()
    assert said == f"data: {{source: {folder}/climbmix, tokenizer: {folder}/climbmix-tokenizer}}"
    assert len([*api.plane.store.list("data/climbmix/")]) == 4


async def test_a_folder_without_data_or_with_a_bad_name_is_a_usage_error(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([str(tmp_path)], "holds no *.parquet and no tokenizer"),
        ([str(CORPUS), "--tokenizer", str(tmp_path)], "holds no tokenizer"),
        ([str(CORPUS), "--name", "a/b"], "--name 'a/b'"),
    ):
        assert await cli("data", "put", *arguments) == 2
        assert words in capsys.readouterr().err
    assert [*api.plane.store.list("")] == []
