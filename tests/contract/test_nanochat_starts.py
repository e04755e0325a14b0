"""Whole attempts that start from nanochat's checkpoint, wherever it lies and whoever wrote it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.attempts import Bucket, differing, process_settings_kept, ref_of
from tests.fakes.nanochat import NATIVE, add_from_nanochat, shard
from tests.servers import S3Server
from trainer.contract.outcome import Outcome
from trainer.start import import_nanochat
from trainer.storage.nanochat_files import NanochatSummary, summarise
from trainer.storage.object_store import open_store


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with process_settings_kept():
        yield Bucket(tmp_path)


def look(uri: str) -> NanochatSummary:
    return summarise(open_store(uri), 15)


def trained(bucket: Bucket, job_id: str) -> list[float]:
    result, told = bucket.run(job_id)
    assert (result.outcome, result.step) == (Outcome.COMPLETED, 17), result
    return [point.loss for point in told.points]


def test_three_ranks_files_in_s3_start_what_one_ranks_folder_does(
    bucket: Bucket, s3_environment: S3Server
) -> None:
    add_from_nanochat(bucket, "FOLDER", look(f"file:{NATIVE}"))
    losses = trained(bucket, "FOLDER")
    sharded = bucket.folder / "sharded"
    sharded.mkdir()
    for path in NATIVE.iterdir():
        (sharded / path.name).write_bytes(path.read_bytes())
    shard(sharded, 3)
    uri = f"s3://{s3_environment.bucket}/nanochat/{secrets.token_hex(6)}"
    for path in sharded.iterdir():
        open_store(uri).put_file(path.name, path)
    summary = look(uri)
    assert len(summary.start.files) == 5, "meta, model, and every rank's optimizer"
    add_from_nanochat(bucket, "BUCKET", summary)
    assert trained(bucket, "BUCKET") == losses
    (one, weights), (other, merged) = (bucket.checkpoint(job, 17) for job in ("FOLDER", "BUCKET"))
    assert differing(weights, merged) == []
    assert one.state == other.state


def test_to_continue_an_import_is_to_start_from_nanochat_itself(bucket: Bucket) -> None:
    summary = look(f"file:{NATIVE}")
    add_from_nanochat(bucket, "DIRECT", summary)
    losses = trained(bucket, "DIRECT")
    add_from_nanochat(bucket, "IMPORT", summary)
    repository = bucket.repository("IMPORT")
    import_nanochat(repository, repository.document(), bucket.folder / "work", "here")
    add_from_nanochat(bucket, "CHILD", summary, through=ref_of(bucket, "IMPORT", 15))
    assert trained(bucket, "CHILD") == losses
    (one, weights), (other, continued) = (bucket.checkpoint(job, 17) for job in ("DIRECT", "CHILD"))
    assert differing(weights, continued) == []
    assert one.state["position"] == other.state["position"]
