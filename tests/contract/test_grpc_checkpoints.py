"""Checkpoints, lineage and metric history as a client meets them: a real server on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from everstep.v1 import everstep_pb2 as pb
from service import checkpoints, events, servicer
from service.errors import CheckpointNeededError
from service.store import NewRecord
from tests.fakes.api import Api, credential, hello, reason, served
from tests.fakes.checkpoints import JOB, MOMENT, ref_to, save
from tests.fakes.control_plane import new_job
from tests.fakes.flaky_store import FlakyStore
from tests.fakes.memory_store import MemoryObjectStore
from trainer.contract.states import JobState
from trainer.storage import layout
from trainer.storage.manifest import JobDocument
from trainer.storage.object_store import ObjectStore, StoreUnavailableError
from trainer.storage.repository import CheckpointRepository


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        await made.plane.add(new_job(1, id=JOB, request_id="JOB"))
        yield made


@pytest.fixture
def repository(api: Api) -> CheckpointRepository:
    """The job's, with one attempt that started afresh."""
    made = CheckpointRepository(api.plane.store, JOB)
    made.claim(None, "host")
    return made


async def verify(api: Api, name: str) -> pb.VerifyCheckpointResponse:
    return await api.call("VerifyCheckpoint", pb.VerifyCheckpointRequest(checkpoint=name))


async def delete(api: Api, name: str) -> None:
    await api.call("DeleteCheckpoint", pb.DeleteCheckpointRequest(checkpoint=name))


async def kept(api: Api, name: str) -> str:
    """Why a checkpoint may not be deleted; it is still whole afterwards."""
    error = await api.refused("DeleteCheckpoint", pb.DeleteCheckpointRequest(checkpoint=name))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(error) == "CHECKPOINT_NEEDED"
    assert not (await verify(api, name)).problems
    return error.details() or ""


async def listed(api: Api) -> list[int]:
    found = await api.call("ListCheckpoints", pb.ListCheckpointsRequest(job_id=JOB))
    return [each.ref.step for each in found.checkpoints]


async def test_a_sound_checkpoint_is_verified_by_step_and_as_the_latest(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8):
        save(repository, tmp_path, step, bpb=1.5)
    for name, step in ((f"{JOB}@4", 4), (f"{JOB}@latest", 8)):
        answer = await verify(api, name)
        assert not answer.problems
        assert (answer.checkpoint.ref.step, answer.checkpoint.validation_bpb) == (step, 1.5)
        assert answer.checkpoint.size_bytes == 2 * len(f"step {step} attempt 1 part 0")


async def test_what_is_wrong_is_said_part_by_part(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    save(repository, tmp_path, 4)
    first, second = (layout.part_key(JOB, 4, 1, layout.part_name(index)) for index in (0, 1))
    data = bytearray(api.plane.store.get(first))
    data[3] ^= 1
    api.plane.store.put(first, bytes(data))
    api.plane.store.delete(second)
    problems = (await verify(api, f"{JOB}@4")).problems
    assert len(problems) == 2
    assert "part-00000-00000.safetensors: expected sha256" in problems[0]
    assert "part-00000-00001.safetensors: expected a file, found nothing" in problems[1]


async def test_a_torn_manifest_is_a_problem_and_hides_no_other_checkpoint(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8):
        save(repository, tmp_path, step)
    api.plane.store.put(layout.manifest_key(JOB, 8, 1), b'{"format_version": 1')
    answer = await verify(api, f"{JOB}@8")
    assert answer.checkpoint.ref.step == 8
    assert not answer.checkpoint.HasField("create_time")
    assert "is not JSON" in answer.problems[0]
    assert await listed(api) == [8, 4]


@pytest.mark.parametrize("method", ["VerifyCheckpoint", "DeleteCheckpoint"])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "INVALID_ARGUMENT"),
        (JOB, "INVALID_ARGUMENT"),
        (f"{JOB}@", "INVALID_ARGUMENT"),
        (f"{JOB}@-1", "INVALID_ARGUMENT"),
        (f"{JOB}@newest", "INVALID_ARGUMENT"),
        (f"{JOB}@\u0664", "INVALID_ARGUMENT"),
        (f"{JOB}@4\n", "INVALID_ARGUMENT"),
        (f"{JOB}@{'9' * 11}", "INVALID_ARGUMENT"),
        ("a/b@4", "INVALID_ARGUMENT"),
        ("x" * 9000 + "@4", "INVALID_ARGUMENT"),
        ("NOBODY@4", "NOT_FOUND"),
        (f"{JOB}@5", "NOT_FOUND"),
        (f"{JOB}@{'9' * 10}", "NOT_FOUND"),
    ],
)
async def test_a_wrong_name_is_the_callers_fault(
    api: Api,
    repository: CheckpointRepository,
    tmp_path: Path,
    method: str,
    name: str,
    code: str,
) -> None:
    save(repository, tmp_path, 4)
    request = pb.VerifyCheckpointRequest(checkpoint=name)
    error = await api.refused(method, request)  # both requests have the same one field
    assert error.code().name == code
    if code == "INVALID_ARGUMENT":
        assert (error.details() or "").startswith("checkpoint: ")
    elif name.startswith(JOB):
        assert reason(error) == "CHECKPOINT_NOT_FOUND"
        assert "there are at steps: 4" in (error.details() or "")


async def test_what_nobody_needs_is_deleted_whole(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8, 12):
        save(repository, tmp_path, step)
    await delete(api, f"{JOB}@4")
    assert await listed(api) == [12, 8]
    assert not [*api.plane.store.list(layout.checkpoint_prefix(JOB, 4, 1))]
    error = await api.refused("DeleteCheckpoint", pb.DeleteCheckpointRequest(checkpoint=f"{JOB}@4"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_the_last_two_stay(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8, 12):
        save(repository, tmp_path, step)
    for name in ("8", "12", "latest"):
        assert "among the last 2" in await kept(api, f"{JOB}@{name}")


async def test_what_another_job_starts_from_stays_and_says_whose_it_is(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8, 12):
        save(repository, tmp_path, step)
    repository.hold(ref_to(4), "CHILD")
    assert "where job CHILD starts" in await kept(api, f"{JOB}@4")


async def test_the_newest_attempts_start_stays(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    save(repository, tmp_path, 4)
    repository.claim(ref_to(4), "host")
    for step in (8, 12):
        save(repository, tmp_path, step, 2)
    assert "attempt 2, its job's newest, starts" in await kept(api, f"{JOB}@4")


async def test_a_job_that_runs_keeps_all_and_paused_gives_them_up(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    for step in (4, 8, 12):
        save(repository, tmp_path, step)
    await api.plane.tick()
    job = await api.plane.trains(await api.plane.job(JOB))
    assert f"job {JOB} is RUNNING" in await kept(api, f"{JOB}@4")
    await api.plane.jobs.change(job, job.moved(JobState.PAUSED, "set aside", 1.0))
    await delete(api, f"{JOB}@4")
    assert await listed(api) == [12, 8]


async def test_of_two_commits_at_a_step_none_comes_back(
    api: Api, repository: CheckpointRepository, tmp_path: Path
) -> None:
    save(repository, tmp_path, 4)
    repository.claim(ref_to(4), "host")
    save(repository, tmp_path, 4, 2)  # a stop right at the start commits the same step again
    repository.claim(ref_to(4, 2), "host")
    for step in (8, 12):
        save(repository, tmp_path, step, 3)
    repository.claim(ref_to(12, 3), "host")
    await delete(api, f"{JOB}@4")
    assert await listed(api) == [12, 8]


class TakenUp(MemoryObjectStore):
    """Another job holds a checkpoint right before its manifest is deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.fired = 0

    def delete(self, key: str) -> None:
        if key.endswith(layout.MANIFEST):
            CheckpointRepository(self, JOB).hold(ref_to(4), "CHILD")
            self.fired += 1
        super().delete(key)


def three(store: ObjectStore, folder: Path) -> CheckpointRepository:
    made = CheckpointRepository(store, JOB)
    made.claim(None, "host")
    for step in (4, 8, 12):
        save(made, folder, step)
    return made


def test_who_takes_a_checkpoint_up_while_it_is_deleted_wins(tmp_path: Path) -> None:
    store = TakenUp()
    repository = three(store, tmp_path)
    with pytest.raises(CheckpointNeededError, match="where job CHILD starts"):
        checkpoints.delete(repository, 4)
    assert store.fired == 1
    assert ref_to(4) in repository.current()
    assert repository.verify(ref_to(4)) == ()


def test_a_deletion_that_breaks_off_leaves_the_checkpoint_whole_or_gone(tmp_path: Path) -> None:
    rehearsal = FlakyStore(MemoryObjectStore())
    repository = three(rehearsal, tmp_path)
    rehearsal.calls.clear()
    checkpoints.delete(repository, 4)
    calls = sorted(set(rehearsal.calls))
    assert len(calls) > 5
    for call in calls:
        for after in (False, True):
            store = FlakyStore(MemoryObjectStore())
            repository = three(store, tmp_path)
            fault = store.script(call, after=after)
            with pytest.raises(StoreUnavailableError):
                checkpoints.delete(repository, 4)
            assert fault.fired == 1
            assert {ref.step for ref in repository.current()} >= {8, 12}
            if ref_to(4) in repository.current():
                assert repository.verify(ref_to(4)) == ()


async def lineage(api: Api, job_id: str) -> list[tuple[str, str, int, int]]:
    answer = await api.call("GetLineage", pb.GetLineageRequest(job_id=job_id))
    return [(a.job_id, a.name, a.start_step, a.end_step) for a in answer.ancestors]


async def test_a_lineage_goes_back_to_fresh_weights_through_jobs_the_database_forgot(
    api: Api,
) -> None:
    for job_id, start in (("ROOT", None), ("MIDDLE", ref_to(100, 2, "ROOT"))):
        CheckpointRepository(api.plane.store, job_id).save_document(
            JobDocument(
                job_id=job_id, spec={"name": job_id.lower()}, start=start, created_at=MOMENT
            )
        )
    await api.plane.add(new_job(2, start=ref_to(300, 1, "MIDDLE")))
    await api.plane.add(new_job(3, start=ref_to(450, 1, "JOB2")))
    older = [("MIDDLE", "middle", 100, 300), ("ROOT", "root", 0, 100)]
    assert await lineage(api, "JOB3") == [
        ("JOB3", "tiny", 450, 450),
        ("JOB2", "tiny", 300, 450),
        *older,
    ]
    assert await lineage(api, "MIDDLE") == [("MIDDLE", "middle", 100, 100), older[1]]
    assert await lineage(api, JOB) == [(JOB, "tiny", 0, 0)]


async def test_a_lineage_shows_every_fork_and_where_nanochats_part_began(api: Api) -> None:
    began = {"start": {"from": "nanochat:/d12@900"}}
    await api.plane.add(new_job(2, spec=began))
    for number, parent, step in ((3, 2, 950), (4, 2, 1000), (5, 4, 1200), (6, 2, 950)):
        await api.plane.add(new_job(number, start=ref_to(step, 1, f"JOB{parent}")))
    answer = await api.call("GetLineage", pb.GetLineageRequest(job_id="JOB3"))
    assert [(a.job_id, a.name, a.start_step, a.end_step) for a in answer.ancestors] == [
        ("JOB3", "tiny", 950, 950),
        ("JOB2", "tiny", 900, 950),
        ("", "nanochat:file:/d12@900", 0, 900),
    ]
    assert [(f.job_id, f.parent_job_id, f.start_step) for f in answer.forks] == [
        ("JOB4", "JOB2", 1000),
        ("JOB6", "JOB2", 950),
        ("JOB5", "JOB4", 1200),
    ]


async def test_a_lineage_ends_where_nothing_is_left(api: Api) -> None:
    await api.plane.add(new_job(2, start=ref_to(30, 1, "LOST")))
    assert await lineage(api, "JOB2") == [("JOB2", "tiny", 30, 30), ("LOST", "", 0, 30)]
    for job_id in ("LOST", "a/b", "", "\0"):
        error = await api.refused("GetLineage", pb.GetLineageRequest(job_id=job_id))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def report(api: Api, attempt: int, *steps: int) -> None:
    """An attempt's points, whose loss says who measured."""
    entries = [
        pb.ReportEntry(sequence=number, point=pb.MetricPoint(step=step, loss=step + attempt / 10))
        for number, step in enumerate(steps, 1)
    ]
    requests = [hello(JOB, attempt), pb.ReportRequest(entries=entries)]
    await api.report(credential(JOB, attempt), requests)


async def steps(api: Api, first: int = 0, last: int = 0, count: int = 0) -> list[int]:
    request = pb.ListMetricsRequest(job_id=JOB, start_step=first, end_step=last, max_points=count)
    return [point.step for point in (await api.call("ListMetrics", request)).points]


async def test_a_step_trained_twice_shows_as_the_newest_attempt_measured_it(api: Api) -> None:
    await report(api, 1, 1, 2, 3, 4, 5)
    await report(api, 2, 3, 4)
    answer = await api.call("ListMetrics", pb.ListMetricsRequest(job_id=JOB))
    assert [point.loss for point in answer.points] == [1.1, 2.1, 3.2, 4.2, 5.1]


async def test_points_are_of_the_range_and_evenly_spaced(api: Api) -> None:
    assert await steps(api) == []
    assert await steps(api, count=5) == []
    await report(api, 1, *range(1, 101))
    assert await steps(api) == [*range(1, 101)]
    assert await steps(api, 98) == [98, 99, 100]
    assert await steps(api, 98, 99) == [98, 99]
    assert await steps(api, 7, 7, 3) == [7]
    assert await steps(api, count=1) == [100]
    assert await steps(api, 1, 9, 9) == await steps(api, 1, 9, 50) == [*range(1, 10)]
    for count in (2, 3, 7, 50, 99, 100):
        found = await steps(api, count=count)
        gaps = {late - early for early, late in pairwise(found)}
        assert (len(found), found[0], found[-1]) == (count, 1, 100)
        assert max(gaps) - min(gaps) <= 1


async def test_more_points_than_an_answer_holds_are_refused(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "MAX_POINTS", 3)
    await report(api, 1, 1, 2, 3, 4)
    assert await steps(api, 2) == [2, 3, 4]
    assert await steps(api, count=3) == [1, 3, 4]
    error = await api.refused("ListMetrics", pb.ListMetricsRequest(job_id=JOB))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 3 points" in (error.details() or "")


async def test_any_client_takes_the_longest_answer(api: Api) -> None:
    """grpcurl and generated clients take 4 MiB unless they are told otherwise."""

    def point(step: int) -> NewRecord:
        made = pb.MetricPoint(step=step, loss=2.0)
        made.devices.add(name="a card")
        made.devices[0].name += "." * (700 - made.ByteSize())  # as large as real ones
        return events.point_record(made, 1.5, 1)

    await api.plane.records.append(JOB, [point(step) for step in range(servicer.MAX_POINTS)])
    assert len(await steps(api)) == servicer.MAX_POINTS


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"start_step": -1}, "INVALID_ARGUMENT"),
        ({"end_step": -1}, "INVALID_ARGUMENT"),
        ({"max_points": -1}, "INVALID_ARGUMENT"),
        ({"start_step": 5, "end_step": 4}, "INVALID_ARGUMENT"),
        ({"job_id": "NOBODY"}, "NOT_FOUND"),
    ],
)
async def test_a_wrong_range_or_job_is_the_callers_fault(
    api: Api, fields: dict[str, int], code: str
) -> None:
    request = pb.ListMetricsRequest(**{"job_id": JOB, **fields})  # type: ignore[arg-type]
    assert (await api.refused("ListMetrics", request)).code().name == code
