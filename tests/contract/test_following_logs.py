"""A log that is followed for days: told as it comes, at a cost that does not grow with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from service import lifecycle
from tests.fakes.control_plane import ControlPlane, control_plane, new_job
from trainer.contract.states import JobState
from trainer.storage.layout import LogKey
from trainer.storage.logs import write_piece
from trainer.storage.object_store import LocalObjectStore, ObjectInfo

LISTING_S = 0.1
WAIT_S = 10.0


@pytest.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlPlane]:
    monkeypatch.setattr(lifecycle, "LOG_POLL_S", 0.01)
    async with control_plane(tmp_path) as made:
        await made.add(new_job(1, id="JOB"))
        yield made


async def test_a_follower_lists_a_long_log_a_tenth_of_the_time_and_misses_nothing(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[float] = []
    through = LocalObjectStore.list

    def slow(store: Any, prefix: str) -> Iterator[ObjectInfo]:
        listed.append(time.monotonic())
        time.sleep(LISTING_S)
        return through(store, prefix)

    def wrote(attempt: int, rank: int, sequence: int, text: str) -> None:
        write_piece(plane.store, "JOB", LogKey(attempt, rank, sequence), [(1.0, text)])

    monkeypatch.setattr(LocalObjectStore, "list", slow)
    wrote(1, 0, 1, "first")
    lines = plane.lifecycle.logs("JOB", None, None, follow=True)

    async def told() -> str:
        return (await asyncio.wait_for(anext(lines), WAIT_S)).text

    assert await told() == "first"
    for sequence in range(2, 12):
        wrote(1, 0, sequence, str(sequence))
        assert await told() == str(sequence)
    assert len(listed) < 4, "what comes next is asked for by its name"
    wrote(1, 1, 1, "another rank")
    assert await told() == "another rank"
    wrote(2, 0, 1, "another attempt")
    assert await told() == "another attempt"
    wrote(2, 0, 2, "its next")
    wrote(1, 1, 2, "the last of the one before")
    assert {await told(), await told()} == {"its next", "the last of the one before"}
    for before, after in pairwise(listed):
        assert after - before > 0.9 * lifecycle.LOOK_REST * LISTING_S
    wrote(2, 0, 3, "the end")
    job = await plane.job("JOB")
    assert await plane.jobs.change(job, job.moved(JobState.CANCELLED, "test", time.time()))
    assert [line.text async for line in lines] == ["the end"]
