"""Jobs side by side, as a client meets it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from everstep.v1 import everstep_pb2 as pb
from service import events
from tests.fakes.control_plane import ControlPlane, control_plane, new_job


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def trained(plane: ControlPlane, number: int, evaluation_set: str, **changes: Any) -> str:
    job = await plane.add(new_job(number, **changes))
    new = [
        events.point_record(pb.MetricPoint(step=step, loss_smoothed=5 - step, step_s=2.0), 1.0, 1)
        for step in range(1, 4)
    ]
    event = pb.Event(
        kind=pb.EVENT_KIND_EVALUATED,
        step=3,
        validation_bpb=1.5,
        evaluation_set=evaluation_set,
    )
    await plane.records.append(job.id, [*new, events.event_record(event, 1.0, 1)])
    return job.id


async def test_specs_curves_and_figures_stand_side_by_side(plane: ControlPlane) -> None:
    one = await trained(plane, 1, "A")
    two = await trained(plane, 2, "A", spec={"optimizer": {"matrix_lr": 0.5}})
    found = await plane.lifecycle.compare([one, two])
    assert [(each.field, list(each.values)) for each in found.differences] == [
        ("optimizer.matrix_lr", ["0.0012", "0.5"])
    ]
    for curve in found.curves:
        assert list(curve.loss_steps) == [1, 2, 3]
        assert list(curve.loss) == [4.0, 3.0, 2.0]
        assert (list(curve.steps), list(curve.validation_bpb)) == ([3], [1.5])
        assert curve.lineage[0].job_id == curve.job_id
    assert found.validation_refused == ""


async def test_jobs_of_different_lengths_are_drawn_over_all_that_they_share(
    plane: ControlPlane,
) -> None:
    ids = []
    for number, last, kept in ((1, 3000, 1), (2, 1900, 1), (3, 300_000, 512)):
        job = await plane.add(new_job(number))
        steps = [*range(kept if kept > 1 else 1, min(last, 5000) + 1, kept)]  # old ones thinned
        points = (pb.MetricPoint(step=n, loss_smoothed=5 + number, step_s=2.0) for n in steps)
        await plane.records.append(job.id, [events.point_record(each, 1.0, 1) for each in points])
        ids.append(job.id)
    one, two = (await plane.lifecycle.compare(ids[:2])).curves
    assert list(one.loss_steps) == list(two.loss_steps)
    assert one.loss_steps[0] < 10
    assert one.loss_steps[-1] > 1890
    assert 190 <= len(one.loss_steps) <= 400
    assert set(one.loss) == {6.0}
    assert set(two.loss) == {7.0}
    assert (one.train_s, two.train_s) == (6000.0, 3800.0)
    for curve in (await plane.lifecycle.compare(ids)).curves:
        assert list(curve.loss_steps) == [512, 1024, 1536]


async def test_figures_of_different_evaluation_sets_are_withheld(plane: ControlPlane) -> None:
    one, two = await trained(plane, 1, "A"), await trained(plane, 2, "B")
    found = await plane.lifecycle.compare([one, two])
    assert "different evaluation sets" in found.validation_refused
    assert not any(curve.validation_bpb for curve in found.curves)
    assert all(curve.loss for curve in found.curves)


@pytest.mark.parametrize("ids", [[], ["A"], ["A", "A"], [str(n) for n in range(9)]])
async def test_what_is_no_comparison_is_refused(plane: ControlPlane, ids: list[str]) -> None:
    from service.errors import InvalidRequestError

    with pytest.raises(InvalidRequestError, match="job_ids"):
        await plane.lifecycle.compare(ids)
