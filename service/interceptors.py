"""What every call passes through: authentication, timing, and the one table error -> gRPC status.

Invariant: a method without a rule in access.RULES is refused, and no exception reaches a client as
itself: what the table doesn't hold becomes INTERNAL with a number to look up in the log.
"""

from __future__ import annotations

import inspect
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from service import access, errors
from service.access import RULES, Keyring, Other
from service.metrics import Metrics
from trainer.contract.credential import AttemptIdentity, BadCredentialError, check_credential
from trainer.contract.violations import SpecError

DOMAIN = "everstep"
BEARER = "bearer "

STATUSES: list[tuple[type[Exception], grpc.StatusCode]] = [
    (SpecError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.JobNotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.RequestReusedError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NoSpaceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.StaleAttemptError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StorageAwayError, grpc.StatusCode.UNAVAILABLE),
    (errors.StoredDataError, grpc.StatusCode.DATA_LOSS),
    (errors.ClusterAwayError, grpc.StatusCode.UNAVAILABLE),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
]

# Clients refuse more than 8 KB of trailing metadata, where bytes grow by a third and more, and the
# message is there twice, one byte as three where it is not ASCII: so a spec that is wrong
# everywhere names every field, with shorter sentences.
MESSAGE_BYTES = 500
DETAILS_BYTES = 4000
ALONE_BYTES = 1800  # a message without such details
FIELD_OVERHEAD_BYTES = 8

WAIT = "wait"
WAITS = {
    f"/everstep.v1.TrainingService/{name}" for name in ("PauseJob", "CancelJob", "DrainNode")
}  # they answer once jobs have stopped, minutes later
# Streams at once, by who opens them: people by a token (None), attempts, anybody; and calls that
# wait. Each costs some memory, and nobody can take the room of another kind: an attempt that isn't
# heard counts for dead.
MAX_OPEN: dict[Other | str | None, int] = {
    None: 1000,
    Other.ATTEMPT: 1000,
    Other.OPEN: 100,
    WAIT: 500,
}
MAX_OPEN_OF_ONE = 400  # of a kind, by one token: whose programs run wild locks out nobody else

Context = grpc.aio.ServicerContext[Any, Any]

caller: ContextVar[AttemptIdentity | None] = ContextVar("caller", default=None)
log = logging.getLogger(__name__)


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call in, times it, and words its errors."""

    def __init__(self, keyring: Keyring, secret: bytes, metrics: Metrics) -> None:
        """keyring: the tokens in use. secret: what attempts' credentials are derived from."""
        self._keyring = keyring
        self._secret = secret
        self._metrics = metrics
        self._open = Counter[object]()  # by kind, and by kind and token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._unknown)
        method = handler_call_details.method
        if handler.response_streaming:
            return _rebuild(handler, self._streaming(method, handler))
        return _rebuild(handler, self._unary(method, handler))

    async def _unknown(self, _requests: Any, context: Context) -> AsyncIterator[Any]:
        """Nobody answers such a call; gRPC itself would say so without details."""
        self._metrics.rpcs.labels(method="unknown", code="UNIMPLEMENTED").inc()
        await _abort(context, *describe(NotImplementedError()))
        yield  # never reached: what makes this a stream, as every call may be

    def _unary(self, method: str, handler: Any) -> Callable[..., Awaitable[Any]]:
        inner, decode = handler.stream_unary or handler.unary_unary, _decoder(handler)

        async def call(request: Any, context: Context) -> Any:
            with self._timed(method) as outcome:
                try:
                    self._admit(method, context)
                    with self._counted(WAIT) if method in WAITS else nullcontext():
                        return await inner(decode(request), context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    status = describe(error)
                    outcome["code"] = status[0].name
                    await _abort(context, *status)

        return call

    def _streaming(self, method: str, handler: Any) -> Callable[..., AsyncIterator[Any]]:
        inner, decode = handler.stream_stream or handler.unary_stream, _decoder(handler)

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            code, admitted = "OK", -1

            def admit() -> None:
                """At first, and again once tokens changed: perhaps its own was revoked."""
                nonlocal admitted
                if admitted != self._keyring.version:
                    self._admit(method, context)
                    admitted = self._keyring.version

            try:
                admit()
                rule = RULES.get(method)
                with self._counted(rule if isinstance(rule, Other) else None):
                    answers = inner(decode(request, admit), context)
                    if inspect.iscoroutine(answers):  # health's Watch writes by itself
                        await answers
                        return
                    # Closed with us: a caller who hangs up must not leave what it started behind.
                    async with aclosing(answers) as responses:
                        async for response in responses:
                            admit()
                            yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = describe(error)
                code = status[0].name
                await _abort(context, *status)
            finally:
                self._metrics.rpcs.labels(method=method, code=code).inc()

        return call

    @contextmanager
    def _timed(self, method: str) -> Iterator[dict[str, str]]:
        began = time.monotonic()
        outcome = {"code": "OK"}
        try:
            yield outcome
        finally:
            labels = {"method": method, "code": outcome["code"]}
            self._metrics.rpcs.labels(**labels).inc()
            self._metrics.rpc_seconds.labels(**labels).observe(time.monotonic() - began)

    @contextmanager
    def _counted(self, kind: Other | str | None) -> Iterator[None]:
        """One of the calls of a kind that may be open at once; BusyError past the last."""
        rooms: dict[object, int] = {
            kind: MAX_OPEN[kind],
            (kind, access.actor()): MAX_OPEN_OF_ONE if access.actor() else MAX_OPEN[kind],
        }
        for room, most in rooms.items():
            if self._open[room] >= most:
                what = "calls that wait for jobs" if kind == WAIT else "streams of such callers"
                raise errors.BusyError(f"{most} {what} are open already; end some")
        self._open.update(rooms.keys())
        try:
            yield
        finally:
            self._open.subtract(rooms.keys())

    def _admit(self, method: str, context: Context) -> None:
        """Let the caller in and remember who it is, or raise."""
        rule = RULES.get(method)
        if rule is Other.OPEN:
            return
        metadata = dict(context.invocation_metadata() or ())
        header = metadata.get("authorization", "")
        text = header.decode(errors="replace") if isinstance(header, bytes) else header
        if not text.lower().startswith(BEARER):
            raise errors.UnauthenticatedError("needs a bearer token (EVERSTEP_TOKEN)")
        token = text[len(BEARER) :].strip()
        if rule is Other.ATTEMPT:
            try:
                caller.set(check_credential(self._secret, token))
            except BadCredentialError as error:
                raise errors.UnauthenticatedError("not the credential of an attempt") from error
            return
        holder = self._keyring.identify(token)
        access.permit(method, holder)
        access.identity.set(holder)


def _decoder(handler: Any) -> Callable[..., Any]:
    """From the bytes that came to what the method takes: once the caller was let in, and worded.

    admit: called before each message of a stream of requests; raises where the caller may no more.
    """

    def decode(raw: bytes, _admit: Callable[[], None] | None = None) -> Any:
        try:
            return handler.request_deserializer(raw)
        except DecodeError:
            raise errors.InvalidRequestError("the request is no message of this call") from None

    async def each(requests: AsyncIterator[bytes], admit: Callable[[], None]) -> AsyncIterator[Any]:
        async for raw in requests:
            admit()
            yield decode(raw)

    return each if handler.request_streaming else decode


def _rebuild(handler: Any, behaviour: Any) -> Any:
    """A handler of the same shape around another behaviour, which is given bytes."""
    shape = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    build = getattr(grpc, f"{shape}_rpc_method_handler")
    return build(
        behaviour,
        request_deserializer=None,
        response_serializer=handler.response_serializer,
    )


async def _abort(context: Context, code: grpc.StatusCode, message: str, details: list[Any]) -> None:
    """End the call with a status and its google.rpc details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    rich = rpc_status.to_status(status)
    await context.abort(code, message, rich.trailing_metadata)


def describe(error: Exception) -> tuple[grpc.StatusCode, str, list[Any]]:
    """Status, message and google.rpc details of an error."""
    for kind, code in STATUSES:
        if isinstance(error, kind):
            if isinstance(error, SpecError):
                message = _cut(f"the spec is refused: {error}", MESSAGE_BYTES)
                return code, message, [_bad_request(error)]
            assert isinstance(error, errors.ServiceError)
            return code, _cut(str(error), ALONE_BYTES), [_info(error.reason)]
    if isinstance(error, NotImplementedError):  # from the generated base class
        words = "this release has no such call"
        return grpc.StatusCode.UNIMPLEMENTED, words, [_info("UNIMPLEMENTED")]
    number = secrets.token_hex(4)
    log.error("internal error %s", number, exc_info=error)
    words = f"internal error; number {number} in the service's log"
    return grpc.StatusCode.INTERNAL, words, [_info("INTERNAL")]


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _bad_request(error: SpecError) -> error_details_pb2.BadRequest:
    room = DETAILS_BYTES // max(len(error.violations), 1) - FIELD_OVERHEAD_BYTES
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field,
                description=_cut(violation.describe(), max(room - len(violation.field), 0)),
            )
            for violation in error.violations
        ]
    )


def _cut(text: str, limit_bytes: int) -> str:
    """The text, or what of it fits."""
    raw = text.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return text
    return raw[: max(limit_bytes - 3, 0)].decode(errors="ignore") + "..."
