"""Jobs side by side: where specs differ, their curves, and whether figures compare at all.

Reads the database and storage's lineage; changes nothing.

Invariant: validation figures are given only where all were measured on one evaluation set.
"""

from __future__ import annotations

import json
import math
from typing import Any

from everstep.v1 import everstep_pb2 as pb
from service import convert
from service.errors import InvalidRequestError, JobNotFoundError
from service.jobs import JobView
from service.lineage import lineage
from service.storage import Storage
from service.store import JobStore, RecordStore

MAX_JOBS = 8
CURVE_POINTS = 400  # of each job, evenly spaced


class Comparison:
    """Compares jobs."""

    def __init__(self, jobs: JobStore, records: RecordStore, storage: Storage) -> None:
        self._jobs = jobs
        self._records = records
        self._storage = storage

    async def compare(self, job_ids: list[str]) -> pb.CompareJobsResponse:
        """Two jobs or more; JobNotFoundError, InvalidRequestError."""
        if not 2 <= len(set(job_ids)) == len(job_ids) <= MAX_JOBS:
            raise InvalidRequestError(f"job_ids: 2 to {MAX_JOBS} different jobs")
        views = []
        for job_id in job_ids:
            view = await self._jobs.view(job_id)
            if view is None:
                raise JobNotFoundError(f"no job {job_id!r}")
            views.append(view)
        curves = [await self._curve(view) for view in views]
        sets = {each for curve in curves for each in curve.evaluation_set.split(",") if each}
        refused = ""
        if len(sets) > 1:
            told = "; ".join(f"{each.job_id}: {each.evaluation_set or 'none'}" for each in curves)
            refused = f"validation figures were measured on different evaluation sets ({told})"
            for curve in curves:
                curve.ClearField("steps")
                curve.ClearField("validation_bpb")
        await self._on_common_steps(curves)
        specs = [_flat(view.job.spec.to_dict()) for view in views]
        differences = []
        for field in sorted(set().union(*specs)):
            values = [json.dumps(spec.get(field)) for spec in specs]
            if len(set(values)) > 1:
                differences.append(pb.SpecDifference(field=field, values=values))
        return pb.CompareJobsResponse(
            differences=differences, curves=curves, validation_refused=refused
        )

    async def _on_common_steps(self, curves: list[pb.Curve]) -> None:
        """Losses on steps of the range that all have, if there is one; else they stay."""
        first = max((*curve.loss_steps, 1 << 40)[0] for curve in curves)  # none: beyond any last
        last = min((0, *curve.loss_steps)[-1] for curve in curves)
        stride = 2 ** math.ceil(math.log2(max((last - first) / CURVE_POINTS, 1)))
        losses = []
        for curve in curves if first <= last else ():
            found = await self._records.points(
                curve.job_id, first, last, None, CURVE_POINTS + 1, stride
            )
            points = [pb.WatchJobResponse.FromString(record.body).point for record in found]
            losses.append({point.step: point.loss_smoothed for point in points})
        common = sorted(set.intersection(*map(set, losses))) if losses else []
        for curve, loss in zip(curves, losses, strict=False) if common else ():
            curve.loss_steps[:], curve.loss[:] = common, [loss[step] for step in common]

    async def _curve(self, view: JobView) -> pb.Curve:
        job, made = view.job, convert.job_to_proto(view)
        ancestors = await lineage(self._jobs, self._storage, job.id)
        curve = pb.Curve(
            job_id=job.id,
            name=job.spec.name,
            in_force=made.in_force,
            start_step=ancestors[0].start_step,
            end_step=view.progress.step,
            tokens=made.latest.tokens,
            lineage=[convert.ancestor_to_proto(each) for each in ancestors],
        )
        seconds = []
        for record in await self._records.points(job.id, 0, None, CURVE_POINTS, CURVE_POINTS):
            point = pb.WatchJobResponse.FromString(record.body).point
            curve.loss_steps.append(point.step)
            curve.loss.append(point.loss_smoothed)
            seconds.append(point.step_s)
        if seconds:  # evenly spaced, so that their mean stands for all
            curve.train_s = sum(seconds) / len(seconds) * (curve.loss_steps[-1] - curve.start_step)
        figures = {}
        for record in await self._records.events(job.id):
            event = pb.WatchJobResponse.FromString(record.body).event
            if event.HasField("validation_bpb"):
                figures[event.step] = event  # of a step validated twice, the later
        curve.steps.extend(sorted(figures))
        curve.validation_bpb.extend(figures[step].validation_bpb for step in sorted(figures))
        curve.evaluation_set = ",".join(sorted({e.evaluation_set for e in figures.values()}))
        return curve


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
