"""Imports and exports over a real server and its child process, and by the command."""

from __future__ import annotations

import asyncio
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import tiktoken
import torch
from safetensors.torch import load_file
from torch import Tensor

from everstep.cli.__main__ import run
from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.api import ADMIN, Api, bearer, reason
from tests.fakes.attempts import Bucket
from tests.fakes.control_plane import TINY
from tests.fakes.corpus import TOKENIZER
from tests.fakes.nanochat import NATIVE, same, shard
from trainer.checkpoint.nanochat import read_nanochat
from trainer.contract.states import JobState
from trainer.data.tokenizer import Tokenizer
from trainer.storage.object_store import open_store
from trainer.storage.tokenizer_files import read_tokenizer_files

JOB = "JOB"
DATA = {"data": TINY["data"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose bucket holds a checkpoint of a trained job, its tables in bfloat16."""
    folder = tmp_path_factory.mktemp("trained")
    bucket = Bucket(folder)
    bucket.add(JOB, precision={"compute": "bf16"}, schedule={"num_iterations": 4})
    bucket.run(JOB)
    return folder


def native(folder: Path, ranks: int = 1) -> Path:
    folder.mkdir()
    for path in NATIVE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if ranks > 1:
        shard(folder, ranks)
    return folder


def load(path: Path) -> Any:
    """As nanochat does."""
    return torch.load(path, map_location="cpu")


async def imported(api: Api, source: str, **sections: Any) -> pb.Checkpoint:
    spec = dict_to_proto({**DATA, **sections})
    request = pb.ImportCheckpointRequest(source=source, spec=spec)
    answer: pb.ImportCheckpointResponse = await api.call("ImportCheckpoint", request)
    return answer.checkpoint


async def exported(api: Api, name: str, target: Path, form: str = "") -> list[str]:
    request = pb.ExportCheckpointRequest(checkpoint=name, target=f"file:{target}", format=form)
    answer = await api.call("ExportCheckpoint", request)
    return [uri.removeprefix(f"file:{target}/") for uri in answer.files]


@pytest.mark.parametrize("ranks", [1, 3])
async def test_what_is_imported_and_exported_again_is_the_same_to_the_bit(
    api: Api, tmp_path: Path, ranks: int
) -> None:
    source = native(tmp_path / "nanochat", ranks)
    made = await imported(api, f"nanochat:{source}@15")
    name = f"{made.ref.job_id}@15"
    files = await exported(api, name, tmp_path / "out")
    assert files == [
        "meta_000015.json",
        "optim_000015_rank0.pt",
        "tokenizer/token_bytes.pt",
        "tokenizer/tokenizer.pkl",
        "model_000015.pt",
    ]
    weights, theirs = load(tmp_path / "out" / files[-1]), load(NATIVE / "model_000015.pt")
    assert type(weights) is type(theirs)
    assert same(weights, theirs)
    optimizer = load(tmp_path / "out" / files[1])
    whole = load(NATIVE / "optim_000015_rank0.pt")
    assert optimizer["param_groups"] == whole["param_groups"]
    assert same(optimizer["state"], whole["state"])
    meta = json.loads((tmp_path / "out" / files[0]).read_text())
    recorded = json.loads((NATIVE / "meta_000015.json").read_text())
    assert meta.keys() == recorded.keys()
    for key in ("step", "model_config", "dataloader_state_dict", "total_batch_size"):
        assert meta[key] == recorded[key], key
    assert meta["loop_state"].keys() == recorded["loop_state"].keys()


async def test_an_imported_checkpoint_is_the_end_of_a_job_that_others_continue(
    api: Api, tmp_path: Path
) -> None:
    source = native(tmp_path / "nanochat")
    made = await imported(api, f"nanochat:{source}@15", name="theirs")
    job = (await api.call("GetJob", pb.GetJobRequest(job_id=made.ref.job_id))).job
    assert (job.spec.name, job.state) == ("theirs", pb.JOB_STATE_SUCCEEDED)
    assert (job.step, job.checkpoint.step) == (15, 15)
    assert (job.spec.model.depth, job.spec.model.aspect_ratio) == (4, 16)
    assert (job.spec.batch.device_batch_size, job.spec.batch.total_batch_size) == (4, 2048)
    again = await imported(api, f"nanochat:{source}@15", name="theirs")
    assert again == made
    verified = await api.call(
        "VerifyCheckpoint", pb.VerifyCheckpointRequest(checkpoint=f"{job.id}@15")
    )
    assert not verified.problems
    child = {"start": {"from": f"{job.id}@15"}, "guards": {"allow_lr_jump": True}}
    child |= {"schedule": {"num_iterations": 17}, "resources": {"gpus_per_worker": 0}}
    request = pb.SubmitJobRequest(spec=dict_to_proto(child), inherit=True)
    submitted = await api.call("SubmitJob", request)
    document = await api.plane.storage.document(submitted.job.id)
    assert document.start is not None
    assert document.nanochat is not None, "what nanochat read of the epoch isn't read again"
    row = next(row for row in submitted.plan.rates if row.group == "lm_head")
    assert row.parent.learning_rate == read_nanochat(source, 15).in_force.groups["lm_head"].lr
    stored = await api.plane.storage.resolve(f"{job.id}@15")
    assert {"imported_from", "everstep", "torch", "python"} <= stored.versions.keys()


async def test_a_trained_checkpoint_is_what_nanochat_reads(
    api: Api, trained: Path, tmp_path: Path
) -> None:
    files = await exported(api, f"{JOB}@latest", tmp_path / "out")
    read = read_nanochat(tmp_path / "out", 4)
    manifest, tensors = Bucket(trained).checkpoint(JOB, 4)
    assert read.weights["transformer.wte.weight"].dtype is torch.bfloat16
    ours = {name: tensors[f"model.{name}"] for name in read.weights}
    assert same(read.weights, ours)
    state = {name: tensors[f"optimizer.{name}"] for name in read.optimizer_state}
    assert same(read.optimizer_state, state)
    assert len(ours) + len(state) == len(tensors)
    assert read.counters == manifest.state["counters"]
    in_force: Any = manifest.state["in_force"]
    assert {name: vars(values) for name, values in read.in_force.groups.items()} == (
        in_force["groups"]
    )
    assert read.meta["user_config"]["depth"] == 2
    with (tmp_path / "out" / files[-2]).open("rb") as file:
        encoding = pickle.load(file)
    assert isinstance(encoding, tiktoken.Encoding)
    tokenizer = Tokenizer(read_tokenizer_files(open_store(f"file:{TOKENIZER}"))[1])
    assert encoding.encode_ordinary("The quick fox") == tokenizer.encode("The quick fox")
    assert encoding.encode_single_token("<|bos|>") == tokenizer.bos_id
    lengths = load(tmp_path / "out" / "tokenizer" / "token_bytes.pt")
    assert lengths.dtype is torch.int32
    assert lengths.tolist() == tokenizer.token_bytes().tolist()


async def test_safetensors_come_with_a_config(api: Api, trained: Path, tmp_path: Path) -> None:
    files = await exported(api, f"{JOB}@4", tmp_path / "out", "safetensors")
    assert files[-1] == "model.safetensors"
    last = (await api.plane.records.events(JOB))[-1]
    event = pb.WatchJobResponse.FromString(last.body).event
    assert (event.kind, event.actor) == (pb.EVENT_KIND_REQUESTED, "admin")
    assert event.message == f"export {JOB}@4 to file:{tmp_path}/out"
    _, tensors = Bucket(trained).checkpoint(JOB, 4)
    found = {
        f"{prefix}.{name}": tensor
        for prefix in ("model", "optimizer")
        for name, tensor in load_file(tmp_path / "out" / f"{prefix}.safetensors").items()
    }
    assert same(found, tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["sequence_len"]) == (2, 32, 64)
    assert (config["model_type"], config["step"]) == ("nanochat", 4)
    assert read_tokenizer_files(open_store(f"file:{tmp_path / 'out'}"), "tokenizer/")


async def test_what_can_not_be_exported_is_refused(api: Api, tmp_path: Path) -> None:
    target = f"file:{tmp_path / 'out'}"
    await exported(api, f"{JOB}@4", tmp_path / "out")
    cases: list[tuple[dict[str, str], str, str]] = [
        ({"checkpoint": JOB}, "INVALID_ARGUMENT", "checkpoint: "),
        ({"checkpoint": f"{JOB}@5"}, "NOT_FOUND", "no checkpoint"),
        ({"checkpoint": "NOBODY@5"}, "NOT_FOUND", "no job"),
        ({"format": "onnx"}, "INVALID_ARGUMENT", "format: 'onnx'"),
        ({"target": "somewhere"}, "INVALID_ARGUMENT", "target: "),
        ({"target": ""}, "INVALID_ARGUMENT", "target: "),
        ({}, "FAILED_PRECONDITION", "holds model_000004.pt already"),
    ]
    for fields, code, words in cases:
        wish = {"checkpoint": f"{JOB}@4", "target": target, **fields}
        error = await api.refused("ExportCheckpoint", pb.ExportCheckpointRequest(**wish))
        assert code == error.code().name, fields
        assert words in (error.details() or "")
    api.plane.storage._data_roots = [tmp_path / "allowed"]
    wish = {"checkpoint": f"{JOB}@4", "target": f"file:{tmp_path}/allowed/../x"}
    error = await api.refused("ExportCheckpoint", pb.ExportCheckpointRequest(**wish))
    assert "EVERSTEP_DATA_ROOTS" in (error.details() or "")


async def test_what_can_not_be_imported_makes_no_job(api: Api, tmp_path: Path) -> None:
    source = native(tmp_path / "nanochat", 2)
    before = await api.plane.jobs.counts()
    cases: list[tuple[str, dict[str, Any], str]] = [
        (f"nanochat:{source}@14", {}, "meta_000014.json is missing"),
        (f"{source}@15", {}, "start.from"),
        (f"{JOB}@4", {}, "start.from"),
        (f"nanochat:{source}@15", {"model": {"depth": 8}}, "gives n_layer 8"),
        (f"nanochat:{source}@15", {"batch": {"total_batch_size": 512}}, "@15 has 2048"),
        (f"nanochat:{source}@15", {"data": {"source": f"file:{tmp_path}"}}, "data.source"),
    ]
    for name, sections, words in cases:
        spec = dict_to_proto({**DATA, **sections})
        request = pb.ImportCheckpointRequest(source=name, spec=spec)
        error = await api.refused("ImportCheckpoint", request)
        assert error.code().name == "INVALID_ARGUMENT", name
        assert words in (error.details() or ""), error.details()
    (source / "optim_000015_rank1.pt").write_bytes(b"torn")
    request = pb.ImportCheckpointRequest(source=f"nanochat:{source}@15", spec=dict_to_proto(DATA))
    error = await api.refused("ImportCheckpoint", request)
    assert "optim_000015_rank1.pt" in (error.details() or "")
    assert await api.plane.jobs.counts() == before


async def test_one_transfer_at_a_time(api: Api, tmp_path: Path) -> None:
    wishes = [
        pb.ExportCheckpointRequest(checkpoint=f"{JOB}@4", target=f"file:{tmp_path}/{name}")
        for name in ("one", "two")
    ]
    calls = [api.call("ExportCheckpoint", wish) for wish in wishes]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    assert [reason(error) for error in refused] == ["BUSY"]


async def test_a_caller_who_hangs_up_leaves_neither_child_nor_files(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    wish = pb.ExportCheckpointRequest(checkpoint=f"{JOB}@4", target=f"file:{tmp_path}/out")
    call = api.training.ExportCheckpoint(wish, metadata=bearer(ADMIN))
    async with asyncio.timeout(20):
        while not any((tmp_path / "temporary").iterdir()):
            await asyncio.sleep(0.01)
        call.cancel()
        while any((tmp_path / "temporary").iterdir()):
            await asyncio.sleep(0.01)
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [words for words in children if "trainer.transfer" in words]
    assert await exported(api, f"{JOB}@4", tmp_path / "out"), "the next one has its turn"


async def test_the_commands_say_what_they_made(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = native(tmp_path / "nanochat")
    fields = [word for key, uri in TINY["data"].items() for word in ("--set", f"data.{key}={uri}")]
    words = ["import", f"nanochat:{source}@15", "--name", "by-command", *fields]
    assert await asyncio.to_thread(run, words) == 0
    name = capsys.readouterr().out.strip()
    job = await api.plane.job(name.removesuffix("@15"))
    assert (job.spec.name, job.state) == ("by-command", JobState.SUCCEEDED)
    assert await asyncio.to_thread(run, ["export", name, "--to", str(tmp_path / "out")]) == 0
    files = capsys.readouterr().out.split()
    assert files[-1] == f"file:{tmp_path}/out/model_000015.pt"
    words = ["export", name, "--to", str(tmp_path / "out"), "--format", "safetensors", "-o", "json"]
    assert await asyncio.to_thread(run, words) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 5
    assert await asyncio.to_thread(run, ["export", name, "--to", str(tmp_path / "out")]) == 4
    assert "already" in capsys.readouterr().err


def test_the_comparison_of_these_tests_sees_a_bit() -> None:
    one: dict[str, Tensor] = {"a": torch.zeros(2)}
    assert not same(one, {"a": -torch.zeros(2)})
    assert not same(one, {"a": torch.zeros(2, dtype=torch.bfloat16)})
