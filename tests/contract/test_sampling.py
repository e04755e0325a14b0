"""Text from a checkpoint, over a real server and its child process, and by the command."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from everstep.cli.__main__ import run
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.api import ADMIN, Api, bearer, reason, served
from tests.fakes.attempts import Bucket
from tests.fakes.control_plane import new_job
from trainer.completion import Request, complete, whole_characters
from trainer.data.tokenizer import Tokenizer
from trainer.storage.manifest import CheckpointRef
from trainer.storage.repository import CheckpointRepository
from trainer.storage.tokenizer_files import BOS, TokenizerFiles

JOB = "JOB"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose bucket holds a checkpoint of a trained job."""
    folder = tmp_path_factory.mktemp("trained")
    bucket = Bucket(folder)
    bucket.add(JOB)
    bucket.run(JOB)
    return folder


def drawn(trained: Path, **changes: Any) -> str:
    """What the same request gives in this process."""
    wish: dict[str, Any] = {"prompt": "The ", "max_tokens": 8, "temperature": 0.0, "top_k": 0}
    wish |= {"seed": 0, **changes}
    request = Request(storage_uri=Bucket(trained).uri, job_id=JOB, step=None, **wish)
    return "".join(complete(request))


async def test_the_command_writes_what_the_weights_say(
    api: Api, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", f"{JOB}@latest", "The ", "--tokens", "8", "-o", "json"]
    assert await asyncio.to_thread(run, words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompt"] == "The "
    assert said["text"] == drawn(trained) != ""


async def test_the_seed_decides_what_is_drawn(trained: Path) -> None:
    texts = [drawn(trained, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert drawn(trained, temperature=2.0, top_k=1) == drawn(trained)


async def test_values_out_of_bounds_and_unknown_checkpoints_are_refused(api: Api) -> None:
    latest = f"{JOB}@latest"
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"checkpoint": JOB}, "INVALID_ARGUMENT", "checkpoint: "),
        ({"checkpoint": f"{JOB}@5"}, "NOT_FOUND", "no checkpoint"),
        ({"checkpoint": "NOBODY@5"}, "NOT_FOUND", "no job"),
        ({"checkpoint": latest, "max_tokens": 5000}, "INVALID_ARGUMENT", "max_tokens: 5000"),
        ({"checkpoint": latest, "max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens: -1"),
        ({"checkpoint": latest, "temperature": -1}, "INVALID_ARGUMENT", "temperature: -1"),
        ({"checkpoint": latest, "temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
        ({"checkpoint": latest, "top_k": -1}, "INVALID_ARGUMENT", "top_k: -1"),
        ({"checkpoint": latest, "seed": -1}, "INVALID_ARGUMENT", "seed: -1"),
        ({"checkpoint": latest, "prompt": "x" * 100_001}, "INVALID_ARGUMENT", "prompt: "),
    ]
    for fields, code, words in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read(api, pb.SampleCheckpointRequest(**fields))
        assert caught.value.code().name == code, fields
        assert words in (caught.value.details() or "")


async def test_one_at_a_time_and_the_child_ends_with_its_request(api: Api) -> None:
    request = pb.SampleCheckpointRequest(checkpoint=f"{JOB}@latest", max_tokens=4096)
    # What a barely trained model draws at this temperature ends a document after a while.
    request.temperature = 5.0
    first = api.training.SampleCheckpoint(request, metadata=bearer(ADMIN))
    await first.read()
    children = [child for child in psutil.Process().children() if "completion" in _words(child)]
    assert len(children) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _read(api, request)
    assert reason(caught.value) == "BUSY"
    first.cancel()
    async with asyncio.timeout(20):
        while children[0].is_running():
            await asyncio.sleep(0.05)
    assert await _read(api, pb.SampleCheckpointRequest(checkpoint=f"{JOB}@latest", max_tokens=1))


async def test_a_checkpoint_with_a_flipped_bit_is_refused(trained: Path, tmp_path: Path) -> None:
    bucket = Bucket(tmp_path)
    bucket.add(JOB)
    bucket.run(JOB)
    (ref, *_) = bucket.repository(JOB).current()
    file = bucket.part_file(JOB, ref)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    async with served(tmp_path) as api:
        await api.plane.add(new_job(1, id=JOB, request_id=JOB))
        with pytest.raises(grpc.aio.AioRpcError, match="expected sha256") as caught:
            await _read(api, pb.SampleCheckpointRequest(checkpoint=f"{JOB}@{ref.step}"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_newest_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_the_next(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_part, doomed = CheckpointRepository.read_part, []

    def pruned_just_now(self: CheckpointRepository, ref: CheckpointRef, *rest: Any) -> None:
        if not doomed:
            doomed.append(ref)
            folder = Bucket(trained).part_file(JOB, ref).parent
            folder.rename(folder.with_name("99"))  # of an attempt that nobody claimed
            (folder.with_name("99") / "manifest.json").rename(trained / "manifest.json")
        read_part(self, ref, *rest)

    monkeypatch.setattr(CheckpointRepository, "read_part", pruned_just_now)
    newest, older, *_ = Bucket(trained).repository(JOB).current()
    try:
        assert drawn(trained)
        assert doomed == [newest]
        assert Bucket(trained).repository(JOB).current()[0] == older
    finally:
        folder = Bucket(trained).part_file(JOB, newest).parent
        (trained / "manifest.json").rename(folder.with_name("99") / "manifest.json")
        folder.with_name("99").rename(folder)


def test_a_token_that_ends_within_a_character_waits_for_the_next() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    tokenizer = Tokenizer(TokenizerFiles(r"[\s\S]", ranks, {BOS: 256}))
    assert [*whole_characters("a\u20ac".encode(), tokenizer)] == ["a", "\u20ac"]
    assert [*whole_characters(b"a\xe2\x82", tokenizer)] == ["a", "\ufffd"]
    assert "".join(whole_characters(b"\xff" * 9, tokenizer)) == "\ufffd" * 9


async def _read(api: Api, request: pb.SampleCheckpointRequest) -> list[str]:
    call = api.training.SampleCheckpoint(request, metadata=bearer(ADMIN), timeout=60)
    return [piece.text async for piece in call]


def _words(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
