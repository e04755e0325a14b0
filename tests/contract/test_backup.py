"""The database copied from under a service that writes, and a service started on it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

from everstep.v1 import everstep_pb2 as pb
from tests.fakes.api import ADMIN, Api, bearer, credential, hello, points, served


async def back_up(state: Path, target: Path) -> tuple[int, str]:
    """Run the command; exit status and what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.store.backup", str(state), str(target),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ},
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def history(api: Api, job_id: str) -> list[int]:
    listed = await api.call("ListMetrics", pb.ListMetricsRequest(job_id=job_id))
    return [point.step for point in listed.points]


async def test_a_backup_under_writes_holds_all_that_was_acknowledged_before_it(
    tmp_path: Path,
) -> None:
    live, restored = tmp_path / "live", tmp_path / "restored"
    live.mkdir()
    restored.mkdir()
    copy = tmp_path / "copy.db"
    async with served(live) as api:
        job_id = (await api.submit("R")).job.id
        await api.report(credential(job_id), [hello(job_id), points(*range(1, 500))])
        token = await api.call("CreateToken", pb.CreateTokenRequest(name="ci", role=pb.ROLE_READ))
        stop = asyncio.Event()

        async def keep_writing() -> int:
            step = 500
            while not stop.is_set():
                await api.report(credential(job_id), [hello(job_id), points(step)])
                step += 1
            return step

        writing = asyncio.create_task(keep_writing())
        for _ in range(3):  # the last one wins, whole
            status, said = await back_up(live, copy)
            assert status == 0, said
        stop.set()
        last = await writing
        assert last > 500, "writes went on"
        shutil.copytree(live / "bucket", restored / "bucket")
    shutil.copy(copy, restored / "everstep.db")
    async with served(restored) as api:
        steps = await history(api, job_id)
        assert steps == list(range(1, len(steps) + 1))
        assert 499 <= len(steps) < last
        again = await api.submit("R")
        assert again.job.id == job_id
        await api.call("ListJobs", pb.ListJobsRequest(), token.secret)
        # The attempt that trained on sends again what the copy doesn't have, and nothing twice.
        await api.report(credential(job_id), [hello(job_id), points(*range(1, last))])
        assert await history(api, job_id) == list(range(1, last))


async def test_a_watcher_from_before_a_restore_gets_what_comes_after_it(tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with served(tmp_path) as api:
        job_id = (await api.submit()).job.id
        assert (await back_up(tmp_path, copy))[0] == 0
        await api.report(credential(job_id), [hello(job_id), points(*range(1, 50))])
        cursor = (await api.plane.records.read(job_id, 0, 1000))[-1].cursor
    for log in ("-wal", "-shm"):
        (tmp_path / f"everstep.db{log}").unlink(missing_ok=True)
    copy.replace(tmp_path / "everstep.db")
    async with served(tmp_path) as api:
        request = pb.WatchJobRequest(job_id=job_id, cursor=cursor)
        await api.report(credential(job_id), [hello(job_id), points(*range(50, 150))])
        watch = api.training.WatchJob(request, metadata=bearer(ADMIN), timeout=20)
        found = [await watch.read() for _ in range(101)]
        watch.cancel()
    assert found[0].event.kind == pb.EVENT_KIND_ATTEMPT_STARTED
    assert [each.point.step for each in found[1:]] == [*range(50, 150)]


async def test_a_backup_that_fails_says_why_and_leaves_the_last_one(tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_bytes(b"the last one")
    status, said = await back_up(tmp_path / "nowhere", target)
    assert (status, target.read_bytes()) == (1, b"the last one")
    assert "is not there" in said
    (tmp_path / "everstep.db").write_bytes(b"no database" * 1000)
    status, said = await back_up(tmp_path, target)
    assert (status, target.read_bytes()) == (1, b"the last one")
    assert "no backup was made" in said
    assert "Traceback" not in said
