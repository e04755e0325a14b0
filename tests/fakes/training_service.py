"""A TrainingService that answers what a test scripted, over real gRPC on loopback.

Owns nothing of the real service's behaviour: each method hands out its scripted answers in order
(the last one for ever) and keeps the requests and tokens it saw. An answer is a message, a list of
messages (a stream), or a Failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from everstep.v1 import everstep_pb2_grpc as rpc


@dataclass
class Failure:
    """Ends a call with a status; after: messages that a stream sends first."""

    code: grpc.StatusCode
    message: str = "scripted"
    details: list[Message] = field(default_factory=list)
    after: list[Message] = field(default_factory=list)


def violations(*pairs: tuple[str, str]) -> Failure:
    """INVALID_ARGUMENT with a BadRequest."""
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=name, description=words)
            for name, words in pairs
        ]
    )
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, "the spec is refused", [bad])


def refusal(code: grpc.StatusCode, reason: str, message: str = "scripted") -> Failure:
    """A status with an ErrorInfo."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="everstep")
    return Failure(code, message, [info])


class FakeTrainingService(rpc.TrainingServiceServicer):
    """Use as a context manager; script(Method=[answers]) says what is answered."""

    def __init__(self) -> None:
        self.requests: dict[str, list[Any]] = {}
        self.tokens: list[str | None] = []
        self.deadlines_s: dict[str, float | None] = {}  # left of each method's last call
        self._answers: dict[str, list[Any]] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        rpc.add_TrainingServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> FakeTrainingService:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def script(self, **answers: list[Any]) -> None:
        self._answers.update({method: list(items) for method, items in answers.items()})

    def _unary(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        answer = self._next(method, request, context)
        if isinstance(answer, Failure):
            self._abort(answer, context)
        return answer

    def _next(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.setdefault(method, []).append(request)
        self.deadlines_s[method] = context.time_remaining()
        metadata = dict(context.invocation_metadata())
        self.tokens.append(metadata.get("authorization"))
        answers = self._answers[method]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def _abort(self, failure: Failure, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
        for detail in failure.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    def WatchJob(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        yield from self._stream("WatchJob", request, context)

    def StreamLogs(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        yield from self._stream("StreamLogs", request, context)

    def _stream(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        answer = self._next(method, request, context)
        if isinstance(answer, Failure):
            yield from answer.after
            self._abort(answer, context)
        yield from answer


def _handler(method: str) -> Any:
    def handle(self: FakeTrainingService, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary(method, request, context)

    return handle


for _method in (
    "SubmitJob",
    "PlanJob",
    "GetJob",
    "ListJobs",
    "PauseJob",
    "ResumeJob",
    "CancelJob",
    "ListCheckpoints",
    "VerifyCheckpoint",
    "DeleteCheckpoint",
    "GetLineage",
    "ListMetrics",
    "CompareJobs",
    "CreateToken",
    "ListTokens",
    "RevokeToken",
    "UpdateJob",
    "DeleteJob",
    "GetCluster",
    "DrainNode",
):
    setattr(FakeTrainingService, _method, _handler(_method))
