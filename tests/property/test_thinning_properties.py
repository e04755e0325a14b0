"""A job's metric history, thinned: what stays, at what cost to whoever reads it."""

from __future__ import annotations

import asyncio
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import Database, JobStore, NewRecord, RecordStore, Thinning
from service.store.record_store import append_records
from tests.fakes.control_plane import new_job

RECENT, PER_OCTAVE = 16, 4
Points = list[tuple[int, int]]  # attempt and step, in the order in which they came

# Stretches of training: each attempt begins at or before where the last one was.
stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), min_size=1, max_size=5)


def trained(runs: list[tuple[int, int]], start: int) -> Points:
    found, step = [], start
    for attempt, (back, length) in enumerate(runs, start=1):
        from_step = max(start, step - back)
        step = from_step + length
        found += [(attempt, each) for each in range(from_step + 1, step + 1)]
    return found


def stays(points: Points) -> set[int]:
    """The places that must be left, by the words of the module's docstring."""
    newest = {step: place for place, (_, step) in enumerate(points)}
    first, last = min(newest), max(newest)
    kept = set(range(max(0, len(points) - RECENT), len(points)))
    for step, place in newest.items():
        age, stride = last - step, RECENT // PER_OCTAVE
        while age >= 2 * RECENT:
            age //= 2
            stride *= 2
        if age < RECENT or step % stride == 0 or step == first:
            kept.add(place)
    return kept


async def filled(folder: Path, points: Points) -> Database:
    database = await Database.open(folder / "everstep.db")
    await JobStore(database).insert(new_job(1), NewRecord(0.0, 0, 0, "event", b"event"))
    records = [NewRecord(0.0, a, s, "point", b"%d" % s) for a, s in points]
    async with database.write() as connection:
        await append_records(connection, "JOB1", records)
    return database


async def steps_left(database: Database) -> list[tuple[int, str]]:
    found = await RecordStore(database).read("JOB1", 0, 100_000)
    return [(record.cursor, record.body.decode()) for record in found]


@settings(max_examples=20, deadline=None)
@given(runs=stretches, start=st.integers(0, 500))
def test_what_stays_is_what_the_words_say_and_thinning_again_takes_nothing(
    runs: list[tuple[int, int]], start: int
) -> None:
    async def check(folder: Path) -> None:
        points = trained(runs, start)
        database = await filled(folder, points)
        try:
            thinning = Thinning(database, RECENT, PER_OCTAVE)
            before = dict(await steps_left(database))
            taken = await thinning.thin("JOB1")
            left = await steps_left(database)
            assert set(left) <= set(before.items()), "no record changes"
            assert taken == len(before) - len(left)
            assert [body for _, body in left].count("event") == 1, "events are never thinned"
            of_points = [cursor for cursor, body in before.items() if body != "event"]
            wanted = {of_points[place] for place in stays(points)}
            assert {cursor for cursor, body in left if body != "event"} == wanted
            assert await thinning.thin("JOB1") == 0
        finally:
            await database.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(check(Path(folder)))


@settings(max_examples=8, deadline=None)
@given(runs=stretches, rounds=st.integers(1, 2))
def test_thinning_on_the_way_leaves_what_thinning_at_the_end_would(
    runs: list[tuple[int, int]], rounds: int
) -> None:
    async def left(folder: Path, on_the_way: bool) -> list[tuple[int, str]]:
        points = trained([(0, length) for _, length in runs] * rounds, 0)
        database = await filled(folder, points[:1])
        try:
            thinning = Thinning(database, RECENT, PER_OCTAVE)
            for place in range(1, len(points), 30):
                some = [NewRecord(0.0, a, s, "point", b"%d" % s) for a, s in points[place:][:30]]
                await RecordStore(database).append("JOB1", some)
                if on_the_way:
                    await thinning.thin("JOB1")
            await thinning.thin("JOB1")
            return await steps_left(database)
        finally:
            await database.close()

    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        assert asyncio.run(left(Path(first), True)) == asyncio.run(left(Path(second), False))


@pytest.mark.parametrize("again", [False, True])
async def test_a_long_history_is_bounded_and_its_curve_stays_even(
    tmp_path: Path, again: bool
) -> None:
    length = 20_000
    points = [(1, step) for step in range(1, length + 1)]
    if again:  # a job that is set back without end
        points += [(a, step) for a in range(2, 30) for step in range(length - 500, length + 1)]
    database = await filled(tmp_path, points)
    thinning = Thinning(database, 512, 64)
    assert await thinning.due() == ["JOB1"]
    await thinning.thin("JOB1")
    assert await thinning.due() == []
    left = [(c, b) for c, b in await steps_left(database) if b != "event"]
    octaves = (length // 512).bit_length()
    assert len(left) <= 2 * 512 + (octaves + 1) * 64 + 1
    records = RecordStore(database)
    curve = [int(r.body) for r in await records.points("JOB1", 0, None, 21, 1000)]
    assert (curve[0], curve[-1]) == (1, length)
    assert len(curve) <= 21
    gaps = [b - a for a, b in pairwise(curve)]
    assert max(gaps) <= 2 * 1000, "by step, not by place: old points lie thinner"
    # Whoever watched up to an old cursor goes on from there, over the gaps, in order.
    rest = [record.cursor for record in await records.read("JOB1", 5000, 100_000)]
    assert rest == sorted(set(rest))
    assert rest[0] > 5000
    await database.close()


@pytest.mark.parametrize("steps", [[7], [7, 7, 7], [7, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("most", [1, 2, 3, 100])
async def test_few_points_are_chosen_as_many_are(
    tmp_path: Path, steps: list[int], most: int
) -> None:
    database = await filled(tmp_path, [(1, step) for step in steps])
    found = await RecordStore(database).points("JOB1", 0, None, most, 100)
    chosen = [int(record.body) for record in found]
    assert chosen[-1] == steps[-1]
    assert chosen[0] == (steps[0] if most > 1 else steps[-1])
    assert len(chosen) == min(most, len(set(steps)))
    await database.close()
