"""Between the wire (everstep.v1) and our own values. Pure; decides nothing.

Invariant: a spec that goes out comes back in equal: `spec_from_proto(spec_to_proto(s)) == s`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import cast

from google.protobuf.timestamp_pb2 import Timestamp

from everstep.plans import plan_to_proto
from everstep.specs import spec_dict_from_proto, spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from service.access import Role
from service.errors import InvalidRequestError
from service.jobs import Attempt, Desired, JobView, Record
from service.ledger import Ledger
from service.lineage import Ancestor
from service.store import Token
from trainer.contract.states import JobState
from trainer.storage.manifest import CheckpointRef, Manifest

__all__ = ["ancestor_to_proto", "plan_to_proto", "spec_dict_from_proto", "spec_to_proto"]


def timestamp(seconds: float | None) -> Timestamp | None:
    """Seconds since the epoch on the wire; None stays absent."""
    if seconds is None:
        return None
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def seconds(stamp: Timestamp) -> float:
    """The inverse of timestamp."""
    return stamp.seconds + stamp.nanos / 1e9


def state_to_proto(state: JobState | Desired) -> pb.JobState:
    """JOB_STATE_<name>."""
    # The stubs type an enum's numbers as the enum, and Value's result as int.
    return cast("pb.JobState", pb.JobState.Value(f"JOB_STATE_{state.value}"))


def state_from_proto(number: pb.JobState) -> JobState:
    """The inverse; ValueError for UNSPECIFIED and numbers that this version doesn't know."""
    return JobState(pb.JobState.Name(number).removeprefix("JOB_STATE_"))


def role_from_proto(number: pb.Role) -> Role:
    """A token's role; InvalidRequestError where it is none."""
    try:
        return Role(number)
    except ValueError:
        known = ", ".join(role.name.lower() for role in Role)
        raise InvalidRequestError(f"role: {number}: must be one of {known}") from None


def token_to_proto(token: Token) -> pb.Token:
    """A token without its secret."""
    return pb.Token(
        id=token.id,
        name=token.name,
        role=cast("pb.Role", Role[token.role].value),
        create_time=timestamp(token.created_at),
        revoke_time=timestamp(token.revoked_at),
    )


def ref_to_proto(ref: CheckpointRef | None) -> pb.CheckpointRef | None:
    """A checkpoint's name."""
    if ref is None:
        return None
    return pb.CheckpointRef(job_id=ref.job_id, step=ref.step, attempt=ref.attempt)


def ref_from_proto(ref: pb.CheckpointRef) -> CheckpointRef:
    """The inverse."""
    return CheckpointRef(job_id=ref.job_id, step=ref.step, attempt=ref.attempt)


def attempt_to_proto(attempt: Attempt) -> pb.Attempt:
    """One attempt."""
    return pb.Attempt(
        number=attempt.number,
        start_time=timestamp(attempt.started_at),
        end_time=timestamp(attempt.ended_at),
        start_step=attempt.start_step,
        outcome=attempt.outcome,
        message=attempt.message,
    )


def job_to_proto(view: JobView) -> pb.Job:
    """A job with its progress and attempts."""
    job, progress = view.job, view.progress
    message = pb.Job(
        id=job.id,
        spec=spec_to_proto(job.spec),
        state=state_to_proto(job.state),
        desired_state=state_to_proto(job.desired),
        reason=job.reason,
        start=ref_to_proto(job.start),
        step=progress.step,
        create_time=timestamp(job.created_at),
        start_time=timestamp(job.started_at),
        end_time=timestamp(job.ended_at),
        attempts=[attempt_to_proto(attempt) for attempt in view.attempts],
        checkpoint=ref_to_proto(progress.checkpoint),
        validation_bpb=progress.validation_bpb,
        workers=job.workers,
    )
    if progress.latest_point is not None:
        message.latest.ParseFromString(progress.latest_point)
        left = job.spec.schedule.num_iterations - progress.step
        if job.state is JobState.RUNNING and message.latest.step_s > 0:
            stretch = progress.ledger.stretch if progress.ledger is not None else 1.0
            message.eta_s = left * message.latest.step_s * stretch
    if progress.in_force is not None:
        message.in_force.extend(pb.Event.FromString(progress.in_force).groups)
    if (ledger := progress.ledger) is not None:
        message.goodput.CopyFrom(goodput_to_proto(ledger, time.time()))
        if (joules := ledger.energy_joules) is not None:
            message.energy_joules = joules
    return message


def goodput_to_proto(ledger: Ledger, now: float) -> pb.Goodput:
    """Where a job's time went."""
    kinds = {f"{kind}_s": seconds for kind, seconds in ledger.at(now).items()}
    return pb.Goodput(**kinds, ratio=ledger.ratio)


def record_to_proto(record: Record) -> pb.WatchJobResponse:
    """A stored record with its cursor."""
    message = pb.WatchJobResponse.FromString(record.body)
    message.cursor = record.cursor
    return message


def ancestor_to_proto(ancestor: Ancestor) -> pb.Ancestor:
    """One job of a lineage."""
    return pb.Ancestor(**asdict(ancestor))


def checkpoint_to_proto(manifest: Manifest, uri: str) -> pb.Checkpoint:
    """A committed checkpoint."""
    return pb.Checkpoint(
        ref=ref_to_proto(manifest.ref),
        size_bytes=manifest.size_bytes,
        create_time=timestamp(manifest.created_at.timestamp()),
        validation_bpb=manifest.validation_bpb,
        uri=uri,
    )
