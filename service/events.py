"""Records of a job's stream, built from what happened. Pure.

The body of a record is a serialised everstep.v1.WatchJobResponse without its cursor, so that what
is stored is what watchers get.
"""

from __future__ import annotations

from typing import Any

from everstep.v1 import everstep_pb2 as pb
from service import convert
from service.jobs import Job
from service.store import NewRecord
from trainer.storage.manifest import Manifest


def state_changed(job: Job, now: float, step: int = 0, actor: str = "") -> NewRecord:
    """A job entered its state, for its reason; actor: by whose token, where somebody asked."""
    event = pb.Event(
        kind=pb.EVENT_KIND_STATE_CHANGED,
        message=job.reason,
        state=convert.state_to_proto(job.state),
        step=step,
        actor=actor,
    )
    return event_record(event, now)


def requested(message: str, actor: str, now: float, step: int = 0) -> NewRecord:
    """Somebody asked something of a job."""
    event = pb.Event(kind=pb.EVENT_KIND_REQUESTED, message=message, actor=actor, step=step)
    return event_record(event, now)


def attempt_started(number: int, start_step: int, now: float) -> NewRecord:
    """An attempt began to report."""
    event = pb.Event(
        kind=pb.EVENT_KIND_ATTEMPT_STARTED,
        message=f"attempt {number} starts at step {start_step}",
        step=start_step,
    )
    return event_record(event, now, number)


def attempt_ended(number: int, outcome: str, message: str, step: int, now: float) -> NewRecord:
    """An attempt ended."""
    event = pb.Event(kind=pb.EVENT_KIND_ATTEMPT_ENDED, message=message, outcome=outcome, step=step)
    return event_record(event, now, number)


def warning(message: str, now: float, attempt: int = 0) -> NewRecord:
    """Something to know that stops nothing."""
    return event_record(pb.Event(kind=pb.EVENT_KIND_WARNING, message=message), now, attempt)


def imported(manifest: Manifest, now: float) -> NewRecord:
    """A checkpoint of another trainer was brought in."""
    event = pb.Event(
        kind=pb.EVENT_KIND_CHECKPOINT_COMMITTED,
        message=f"imported from {manifest.versions.get('imported_from', '')}",
        step=manifest.step,
        checkpoint=convert.ref_to_proto(manifest.ref),
    )
    return event_record(event, now, manifest.attempt)


def event_record(event: pb.Event, time: float, attempt: int = 0) -> NewRecord:
    """Any event, with what it changes of the job's progress."""
    changes: dict[str, Any] = {}
    match event.kind:
        case pb.EVENT_KIND_ATTEMPT_STARTED:
            changes = {"step": event.step}
        case pb.EVENT_KIND_VALUES_IN_FORCE:
            changes = {"in_force": event.SerializeToString()}
        case pb.EVENT_KIND_EVALUATED if event.HasField("validation_bpb"):
            changes = {"validation_bpb": event.validation_bpb}
        case pb.EVENT_KIND_CHECKPOINT_COMMITTED:
            changes = NewRecord.checkpoint_change(convert.ref_from_proto(event.checkpoint), time)
    body = pb.WatchJobResponse(time=convert.timestamp(time), attempt=attempt, event=event)
    return NewRecord(time, attempt, event.step, "event", body.SerializeToString(), changes, body)


def point_record(point: pb.MetricPoint, time: float, attempt: int) -> NewRecord:
    """A metric point; it is also the job's latest."""
    body = pb.WatchJobResponse(time=convert.timestamp(time), attempt=attempt, point=point)
    changes = {"step": point.step, "latest_point": point.SerializeToString()}
    return NewRecord(time, attempt, point.step, "point", body.SerializeToString(), changes, body)
