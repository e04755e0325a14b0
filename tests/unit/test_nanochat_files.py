"""nanochat's folders looked at without torch, and jobs that start from them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes.attempts import Bucket, process_settings_kept
from tests.fakes.control_plane import changed, control_plane
from tests.fakes.nanochat import NATIVE, SPEC, add_from_nanochat
from trainer.checkpoint.nanochat import read_nanochat
from trainer.contract.outcome import Outcome
from trainer.contract.violations import SpecError
from trainer.storage.nanochat_files import (
    NanochatFileCorruptError,
    NanochatFileMissingError,
    read_pt,
    summarise,
)
from trainer.storage.object_store import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "nanochat"
    made.mkdir()
    for path in NATIVE.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


def look(folder: Path) -> Any:
    return summarise(open_store(f"file:{folder}"), 15)


def test_the_summary_is_what_torch_reads(folder: Path) -> None:
    summary, read = look(folder), read_nanochat(folder, 15)
    assert summary.in_force == read.in_force
    assert summary.shape == read.shape
    assert summary.claimed == {}
    assert (summary.start.epoch, summary.start.shard, summary.start.row_group) == (0, 1, 5)


def test_rates_that_user_config_claims_are_told_apart_from_those_in_force(folder: Path) -> None:
    meta = json.loads((folder / "meta_000015.json").read_text())
    meta["user_config"]["matrix_lr"] /= 10
    (folder / "meta_000015.json").write_text(json.dumps(meta))
    summary = look(folder)
    assert all(name.startswith("matrix_") for name in summary.claimed)
    for name, rate in summary.claimed.items():
        assert rate == pytest.approx(summary.in_force.groups[name].lr / 10)


@pytest.mark.parametrize("name", ["meta_000015.json", "model_000015.pt", "optim_000015_rank0.pt"])
def test_a_missing_or_torn_file_is_refused_by_its_name(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(NanochatFileCorruptError, match=name):
        look(folder)
    (folder / name).unlink()
    with pytest.raises(NanochatFileMissingError, match=name):
        look(folder)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_no_pickle_executes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
    store = open_store(f"file:{tmp_path}")
    with pytest.raises(NanochatFileCorruptError, match=r"builtins\.print"):
        read_pt(store, "x.pt", (tmp_path / "x.pt").stat().st_size)
    assert capsys.readouterr().out == ""


async def test_a_plan_shows_the_rates_in_force_and_a_job_is_queued(
    folder: Path, tmp_path: Path
) -> None:
    async with control_plane(tmp_path / "state") as plane:
        data = changed(plane_spec(folder))
        view, made = await plane.lifecycle.submit(data, False, "", "0" * 64)
        assert made is not None
        assert made.plan.start_step == 15
        row = next(row for row in made.plan.rates if row.group == "lm_head")
        assert row.parent is not None
        assert row.parent == look(folder).in_force.groups["lm_head"]
        assert any(
            text.startswith("data: goes on after row group 5") for text in made.plan.warnings
        )
        document = await plane.storage.document(view.job.id)
        assert document.nanochat is not None
        assert document.nanochat.step == 15
        assert view.progress.step == 15


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nanochat:{}@14", "meta_000014.json is missing"),
        ("nanochat:{}x@15", "is missing"),
        ("nanochat:{}@latest", "must name a step"),
        ("nanochat:wherever@15", "must be file:"),
    ],
)
async def test_what_can_not_be_started_from_is_refused_by_name(
    folder: Path, tmp_path: Path, name: str, words: str
) -> None:
    async with control_plane(tmp_path / "state") as plane:
        data = changed(plane_spec(folder), start={"from": name.format(folder)})
        with pytest.raises(SpecError, match=words) as caught:
            await plane.lifecycle.plan(data, False)
        assert "start.from" in {violation.field for violation in caught.value.violations}


async def test_folders_outside_the_allowed_roots_are_refused(folder: Path, tmp_path: Path) -> None:
    async with control_plane(tmp_path / "state") as plane:
        plane.storage._data_roots = [tmp_path / "elsewhere"]
        with pytest.raises(SpecError, match="EVERSTEP_DATA_ROOTS"):
            await plane.lifecycle.plan(plane_spec(folder), False)


def plane_spec(folder: Path) -> dict[str, Any]:
    from tests.fakes.control_plane import TINY

    return changed(TINY, **SPEC, start={"from": f"nanochat:{folder}@15"})


def test_a_job_trains_on_from_nanochats_weights_and_optimizer(folder: Path, tmp_path: Path) -> None:
    with process_settings_kept():
        bucket = Bucket(tmp_path)
        summary = look(folder)
        add_from_nanochat(bucket, "JOB", summary)
        result, told = bucket.run("JOB", stop_at=16)
        assert (result.outcome, result.step) == (Outcome.STOPPED, 16)
        imported = bucket.checkpoint("JOB", 15)[1]
        read = read_nanochat(folder, 15)
        for name, tensor in read.weights.items():
            assert torch.equal(imported[f"model.{name}"], tensor), name
        for name, tensor in read.optimizer_state.items():
            assert isinstance(tensor, Tensor)
            assert torch.equal(imported[f"optimizer.{name}"], tensor), name
        assert told.points[0].loss == pytest.approx(6.15, rel=0.01)  # as nanochat at this step
        (folder / "model_000015.pt").unlink()  # not needed any more
        again, _ = bucket.run("JOB")
        assert again.outcome is Outcome.COMPLETED


def test_files_that_changed_since_submission_are_refused(folder: Path, tmp_path: Path) -> None:
    with process_settings_kept():
        bucket = Bucket(tmp_path)
        summary = look(folder)
        add_from_nanochat(bucket, "JOB", summary)
        (folder / "model_000015.pt").write_bytes(b"other")
        result, _ = bucket.run("JOB")
        assert result.outcome is Outcome.CHECKPOINT_UNUSABLE
        assert "model_000015.pt" in result.message
