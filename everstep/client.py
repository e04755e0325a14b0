"""Client: the whole service as typed, synchronous methods. Everything goes through here.

Owns deadlines, request ids and the watch that survives a restart of the service. Knows neither
gRPC's channels (connection.py) nor its errors (errors.py). Answers are protobuf messages.

Invariant: a method either returns what the service answered or raises an EverstepError; every
method is safe to repeat, submit with the request_id of the first time.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from everstep.connection import Connection, Endpoint
from everstep.errors import InvalidSpecError, ServiceUnreachableError
from everstep.specs import dict_to_proto, spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError, Violation, from_pydantic

CALL_S = 30.0
PLAN_S = 120.0  # a builtin corpus may be prepared first
STOP_S = 300.0  # a running job checkpoints before it stops
VERIFY_S = 3600.0  # every byte is read back, one checkpoint at a time
WINDOW_STEPS = 10_000  # of a metric history in one answer
PAGE_SIZE = 100
WATCH_PATIENCE_S = 120.0  # a service that restarts is back in seconds; a box, in a minute or two
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
FINAL_STATES = frozenset(
    {pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED},
)

# A validated spec, the part of one that somebody wrote down, or the message itself.
AnySpec = JobSpec | Mapping[str, Any] | pb.JobSpec


class Client:
    """A service to talk to. Threads may share one.

    What isn't given is taken from EVERSTEP_ADDRESS, EVERSTEP_TOKEN and EVERSTEP_CA_CERT, else from
    the service that `everstep serve` runs in this folder (./.everstep). Without ca_cert the
    connection isn't encrypted. Connects at the first call.

    Raises:
        ServiceUnreachableError: no address is given or found.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        ca_cert: str | Path | None = None,
    ) -> None:
        self._connection = Connection(Endpoint.find(address, token, ca_cert))

    @classmethod
    def from_state(cls, folder: str | Path) -> Self:
        """The service that runs on a state folder of this machine, whatever EVERSTEP_* say."""
        local = Endpoint.of_state(folder)
        return cls(local.address, local.token)

    @property
    def address(self) -> str:
        """Where the service answers."""
        return self._connection.address

    def close(self) -> None:
        """Give the connection up; watches end."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def plan(self, spec: AnySpec, inherit: bool = False) -> pb.Plan:
        """What submit would run; nothing is created.

        inherit: fields that spec leaves out take the values of the job that start.from names.

        Raises:
            InvalidSpecError: with every violation.
        """
        request = pb.PlanJobRequest(spec=_message(spec, inherit), inherit=inherit)
        response: pb.PlanJobResponse = self._connection.unary("PlanJob", request, PLAN_S)
        return response.plan

    def submit(
        self, spec: AnySpec, request_id: str | None = None, inherit: bool = False
    ) -> pb.SubmitJobResponse:
        """Queue a job; the answer has it and its plan.

        request_id (a fresh one by default) makes the call safe to repeat: a second submission with
        the same one returns the job of the first, without a plan.

        Raises:
            InvalidSpecError: with every violation; nothing was created.
            RefusedError: a learning rate would jump, or request_id was used for another spec.
        """
        request = pb.SubmitJobRequest(
            spec=_message(spec, inherit),
            request_id=request_id or str(uuid.uuid4()),
            inherit=inherit,
        )
        response: pb.SubmitJobResponse = self._connection.unary("SubmitJob", request, PLAN_S)
        return response

    def get(self, job_id: str) -> pb.Job:
        """One job with its attempts and progress; NotFoundError."""
        request = pb.GetJobRequest(job_id=job_id)
        response: pb.GetJobResponse = self._connection.unary("GetJob", request, CALL_S)
        return response.job

    def list(self, states: Iterable[pb.JobState] = ()) -> Iterator[pb.Job]:
        """Jobs, newest first, read page by page; only those in states, if any are given."""
        request = pb.ListJobsRequest(states=states, page_size=PAGE_SIZE)
        while True:
            response: pb.ListJobsResponse = self._connection.unary("ListJobs", request, CALL_S)
            yield from response.jobs
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def watch(
        self, job_id: str, cursor: int = 0, patience_s: float = WATCH_PATIENCE_S
    ) -> Iterator[pb.WatchJobResponse]:
        """A job's events and metric points after cursor, as they come; ends when it is final.

        Goes on by itself where a broken connection left it, each record once, and raises
        ServiceUnreachableError when the service stays away for patience_s.
        """
        ended = False
        wait_s, away_since = FIRST_WAIT_S, None
        while True:
            try:
                request = pb.WatchJobRequest(job_id=job_id, cursor=cursor)
                for record in self._connection.stream("WatchJob", request):
                    cursor, ended = record.cursor, ended or _ends(record)
                    wait_s, away_since = FIRST_WAIT_S, None
                    yield record
                # A service that stops may end its streams as if all were said.
                if ended or self.get(job_id).state in FINAL_STATES:
                    return
            except ServiceUnreachableError:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if now - away_since >= patience_s:
                    raise
            time.sleep(wait_s * random.uniform(0.8, 1.2))
            wait_s = min(wait_s * 1.6, LONGEST_WAIT_S)

    def logs(
        self, job_id: str, attempt: int = 0, rank: int | None = None, follow: bool = False
    ) -> Iterator[pb.StreamLogsResponse]:
        """Log lines of every rank and attempt, or of one; with follow as they come.

        attempt 0: all. Ends with the lines that are there, or with follow when the job is final.
        """
        request = pb.StreamLogsRequest(job_id=job_id, attempt=attempt, rank=rank, follow=follow)
        yield from self._connection.stream("StreamLogs", request)

    def cancel(self, job_id: str) -> pb.CancelJobResponse:
        """Stop a job for good; returns when it has, with its last checkpoint or why there is none.

        Raises:
            RefusedError: the job has ended otherwise.
        """
        request = pb.CancelJobRequest(job_id=job_id)
        response: pb.CancelJobResponse = self._connection.unary("CancelJob", request, STOP_S)
        return response

    def pause(self, job_id: str) -> pb.PauseJobResponse:
        """Checkpoint a job and free its resources; returns when it has."""
        request = pb.PauseJobRequest(job_id=job_id)
        response: pb.PauseJobResponse = self._connection.unary("PauseJob", request, STOP_S)
        return response

    def resume(self, job_id: str) -> pb.Job:
        """Queue a paused job again."""
        request = pb.ResumeJobRequest(job_id=job_id)
        response: pb.ResumeJobResponse = self._connection.unary("ResumeJob", request, CALL_S)
        return response.job

    def checkpoints(self, job_id: str) -> Sequence[pb.Checkpoint]:
        """The committed checkpoints of a job, newest first."""
        request = pb.ListCheckpointsRequest(job_id=job_id)
        response: pb.ListCheckpointsResponse = self._connection.unary(
            "ListCheckpoints", request, CALL_S
        )
        return response.checkpoints

    def verify(self, checkpoint: str) -> pb.VerifyCheckpointResponse:
        """Read every byte of JOB@STEP or JOB@latest back; problems is empty where all is well.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        request = pb.VerifyCheckpointRequest(checkpoint=checkpoint)
        response: pb.VerifyCheckpointResponse = self._connection.unary(
            "VerifyCheckpoint", request, VERIFY_S
        )
        return response

    def delete_checkpoint(self, checkpoint: str) -> None:
        """Delete JOB@STEP. When repeated after a lost answer it may say NotFoundError.

        Raises:
            RefusedError: somebody depends on it.
        """
        request = pb.DeleteCheckpointRequest(checkpoint=checkpoint)
        self._connection.unary("DeleteCheckpoint", request, CALL_S)

    def lineage(self, job_id: str) -> Sequence[pb.Ancestor]:
        """The job, its parent, and so on back to fresh weights."""
        request = pb.GetLineageRequest(job_id=job_id)
        response: pb.GetLineageResponse = self._connection.unary("GetLineage", request, CALL_S)
        return response.ancestors

    def metrics(
        self, job_id: str, start_step: int = 0, end_step: int = 0, max_points: int = 0
    ) -> Sequence[pb.MetricPoint]:
        """A job's points from start_step to end_step (0: the end), in order, one a step.

        max_points: so many, evenly spaced, the first and the last among them; 0: all.
        """
        if max_points:
            return self._points(job_id, start_step, end_step, max_points)
        # All of a long job are more than one answer holds.
        ends = self._points(job_id, start_step, end_step, 2)
        found: list[pb.MetricPoint] = []
        if ends:
            for first in range(ends[0].step, ends[-1].step + 1, WINDOW_STEPS):
                last = min(first + WINDOW_STEPS - 1, ends[-1].step)
                found += self._points(job_id, first, last, 0)
        return found

    def _points(
        self, job_id: str, start_step: int, end_step: int, max_points: int
    ) -> Sequence[pb.MetricPoint]:
        request = pb.ListMetricsRequest(
            job_id=job_id, start_step=start_step, end_step=end_step, max_points=max_points
        )
        response: pb.ListMetricsResponse = self._connection.unary("ListMetrics", request, CALL_S)
        return response.points


def _ends(record: pb.WatchJobResponse) -> bool:
    return record.event.kind == pb.EVENT_KIND_STATE_CHANGED and record.event.state in FINAL_STATES


def _message(spec: AnySpec, inherit: bool) -> pb.JobSpec:
    """A spec on the wire; InvalidSpecError where that can already be told here."""
    if isinstance(spec, JobSpec):
        return spec_to_proto(spec)
    if isinstance(spec, pb.JobSpec):
        return spec
    try:
        _check(spec, inherit)
        return dict_to_proto(dict(spec))
    except SpecError as error:
        raise InvalidSpecError.of(error) from None


def _check(spec: Mapping[str, Any], inherit: bool) -> None:
    """Refuse what the wire couldn't carry or would change: unknown fields, wrong types, nulls."""
    if not inherit:
        JobSpec.parse(spec)
        return
    # Contradictions between fields can only be told with the parent's values: the service does.
    found = [
        Violation(field, None, "a value of the parent's can be replaced, not taken away")
        for field in _nulls(spec)
    ]
    try:
        JobSpec.model_validate(dict(spec))
    except ValidationError as error:
        found += [item for item in from_pydantic(error) if item.value is not None]
    if found:
        raise SpecError(found)


def _nulls(spec: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in spec.items():
        if value is None:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from _nulls(value, f"{prefix}{key}.")
