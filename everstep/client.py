"""Client: the whole service as typed, synchronous methods. Everything goes through here.

Owns deadlines, request ids and the watch that survives a restart of the service. Knows neither
gRPC's channels (connection.py) nor its errors (errors.py). Answers are protobuf messages.

Invariant: a method either returns what the service answered or raises an EverstepError; every
method is safe to repeat, submit with the request_id of the first time.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.connection import Connection, Endpoint
from everstep.errors import ServiceUnreachableError
from everstep.patience import Patience
from everstep.specs import AnySpec, spec_message
from everstep.uploads import upload
from everstep.v1 import everstep_pb2 as pb

CALL_S = 30.0
PLAN_S = 120.0  # a builtin corpus may be prepared first
STOP_S = 600.0  # a running job checkpoints before it stops; past 480 s the service uses force
VERIFY_S = 3600.0  # every byte is read back, one checkpoint at a time
TRANSFER_S = 3600.0  # a whole state is read and written
WINDOW_STEPS = 5_000  # of a metric history in one answer
PAGE_SIZE = 100
WATCH_PATIENCE_S = 120.0  # a service that restarts is back in seconds; a box, in a minute or two
FINAL_STATES = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})


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
        return cls(local.address, local.token, local.ca_cert)

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

    def plan(self, spec: AnySpec, inherit: bool = False, device: str = "") -> pb.Plan:
        """What submit would run; nothing is created.

        inherit: fields that spec leaves out take the values of the job that start.from names.
        device: the GPU to plan for; empty: what this cluster's jobs ran on.

        Raises:
            InvalidSpecError: with every violation.
        """
        message = spec_message(spec, inherit)
        request = pb.PlanJobRequest(spec=message, inherit=inherit, device=device)
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
            spec=spec_message(spec, inherit),
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
        ended, patience = False, Patience(patience_s)
        while True:
            try:
                request = pb.WatchJobRequest(job_id=job_id, cursor=cursor)
                for record in self._connection.stream("WatchJob", request):
                    cursor, ended = record.cursor, ended or record.event.state in FINAL_STATES
                    patience.heard()
                    yield record
                # A service that stops may end its streams as if all were said.
                if ended or self.get(job_id).state in FINAL_STATES:
                    return
            except ServiceUnreachableError:
                if not patience.lasts():
                    raise
            patience.pause()

    def logs(
        self, job_id: str, attempt: int = 0, rank: int | None = None, follow: bool = False
    ) -> Iterator[pb.StreamLogsResponse]:
        """Log lines of every rank and attempt, or of one; with follow as they come.

        attempt 0: all. Ends with the lines that are there, or with follow when the job is final:
        then it goes on by itself after a broken connection, each line once, as watch does.
        """
        request = pb.StreamLogsRequest(job_id=job_id, attempt=attempt, rank=rank, follow=follow)
        told, patience = Counter[tuple[int, int]](), Patience(WATCH_PATIENCE_S)
        while True:
            said = Counter[tuple[int, int]]()  # by attempt and rank, whose lines have one order
            try:
                for line in self._connection.stream("StreamLogs", request):
                    patience.heard()
                    said[whose := (line.attempt, line.rank)] += 1
                    if said[whose] > told[whose]:
                        told[whose] += 1
                        yield line
                if not follow or self.get(job_id).state in FINAL_STATES:
                    return
            except ServiceUnreachableError:
                if not (follow and patience.lasts()):
                    raise
            patience.pause()

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

    def update(
        self, job_id: str, priority: int | None = None, retention: pb.CheckpointSpec | None = None
    ) -> pb.Job:
        """Give a job another priority, or let it keep other checkpoints: keep_* of retention."""
        request = pb.UpdateJobRequest(job_id=job_id, priority=priority, retention=retention)
        response: pb.UpdateJobResponse = self._connection.unary("UpdateJob", request, CALL_S)
        return response.job

    def delete(self, job_id: str, checkpoints: bool = False) -> None:
        """Forget a final job, and its checkpoints if it has any; returns when it is gone.

        Raises:
            RefusedError: not final, has checkpoints, or others may still have to start from them.
        """
        request = pb.DeleteJobRequest(job_id=job_id, delete_checkpoints=checkpoints)
        self._connection.unary("DeleteJob", request, TRANSFER_S)

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

    def export(self, checkpoint: str, target: str, form: str = "") -> Sequence[str]:
        """Write JOB@STEP or JOB@latest into a folder (file: or s3:); the URIs of its files.

        form: nanochat (the default) or safetensors. file: is a folder where the service runs.

        Raises:
            NotFoundError: there is no such checkpoint.
            RefusedError: it can't be read or written, or another transfer is under way.
        """
        request = pb.ExportCheckpointRequest(checkpoint=checkpoint, target=target, format=form)
        answer: pb.ExportCheckpointResponse = self._connection.unary(
            "ExportCheckpoint", request, TRANSFER_S
        )
        return answer.files

    def import_checkpoint(self, source: str, spec: AnySpec) -> pb.Checkpoint:
        """Make nanochat:<folder or s3 uri>@STEP the end of a job of its own, without training.

        spec names data and tokenizer; model and batch are the checkpoint's. Safe to repeat.

        Raises:
            InvalidSpecError: source or spec can't be used.
            RefusedError: a file is torn, or another transfer is under way.
        """
        request = pb.ImportCheckpointRequest(source=source, spec=spec_message(spec, inherit=True))
        answer: pb.ImportCheckpointResponse = self._connection.unary(
            "ImportCheckpoint", request, TRANSFER_S
        )
        return answer.checkpoint

    def sample(
        self,
        checkpoint: str,
        prompt: str = "",
        *,
        max_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Text that JOB@STEP or JOB@latest writes after a prompt, in pieces as they come.

        max_tokens 0: 64. temperature 0: always the likeliest token. top_k 0: among all tokens.

        Raises:
            NotFoundError: there is no such checkpoint.
            RefusedError: it can't be used, or another sample is being drawn.
        """
        request = pb.SampleCheckpointRequest(
            checkpoint=checkpoint,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        for piece in self._connection.stream("SampleCheckpoint", request):
            yield piece.text

    def put_file(
        self,
        path: str | Path,
        folder: str,
        *,
        overwrite: bool = False,
        progress: Callable[[int], None] = lambda stored_bytes: None,
    ) -> str:
        """Store a parquet shard or a tokenizer's file in a data folder; its URI for specs.

        Safe to repeat: what the store holds already isn't sent again. progress hears how many
        bytes of the file are there.

        Raises:
            InvalidRequestError: no shard or tokenizer file by its name.
            RefusedError: the name is taken by other content, or the service's disk is full.
            OSError: the file can't be read.
        """
        return upload(self._connection, Path(path), folder, overwrite, progress)

    def create_token(self, name: str, role: pb.Role) -> pb.CreateTokenResponse:
        """A new token with its secret, which is told nowhere else; for admins.

        Raises:
            RefusedError: a token in use has the name, perhaps after an answer that was lost.
        """
        request = pb.CreateTokenRequest(name=name, role=role)
        response: pb.CreateTokenResponse = self._connection.unary("CreateToken", request, CALL_S)
        return response

    def tokens(self) -> Sequence[pb.Token]:
        """All tokens, oldest first, without their secrets; for admins."""
        request = pb.ListTokensRequest()
        response: pb.ListTokensResponse = self._connection.unary("ListTokens", request, CALL_S)
        return response.tokens

    def revoke_token(self, name: str) -> pb.Token:
        """Take a token out of use, by its name or id; for admins. NotFoundError."""
        request = pb.RevokeTokenRequest(name=name)
        response: pb.RevokeTokenResponse = self._connection.unary("RevokeToken", request, CALL_S)
        return response.token

    def cluster(self) -> pb.GetClusterResponse:
        """The machines: what each has, what is free, who holds what; and why queued jobs wait."""
        request = pb.GetClusterRequest()
        response: pb.GetClusterResponse = self._connection.unary("GetCluster", request, CALL_S)
        return response

    def drain(self, node: str, undo: bool = False) -> Sequence[str]:
        """Move all jobs off a node, and put nothing there; undo: let jobs onto it again."""
        request = pb.DrainNodeRequest(node_id=node, undo=undo)
        response: pb.DrainNodeResponse = self._connection.unary("DrainNode", request, STOP_S)
        return response.job_ids

    def lineage(self, job_id: str) -> pb.GetLineageResponse:
        """The job, its parent, and so on back to fresh weights; and jobs that forked from these."""
        request = pb.GetLineageRequest(job_id=job_id)
        response: pb.GetLineageResponse = self._connection.unary("GetLineage", request, CALL_S)
        return response

    def compare(self, job_ids: Sequence[str]) -> pb.CompareJobsResponse:
        """Two jobs or more side by side; figures of different evaluation sets are withheld."""
        request = pb.CompareJobsRequest(job_ids=job_ids)
        response: pb.CompareJobsResponse = self._connection.unary("CompareJobs", request, CALL_S)
        return response

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
