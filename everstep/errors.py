"""What a call can raise, named for what the caller can do about it.

Owns the one translation from gRPC statuses and google.rpc details. Knows nothing of commands or
exit statuses.

Invariant: nothing of gRPC's own reaches a caller of Client; every error here is an EverstepError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from trainer.contract.violations import SpecError

Detail = TypeVar("Detail", bound=ProtoMessage)


class EverstepError(Exception):
    """Base of everything that a Client raises; itself: a fault inside the service."""


class ServiceUnreachableError(EverstepError):
    """The service, or what stands behind it, is away: start it, or try again later."""


class DeadlineError(EverstepError):
    """No answer in time; every call is safe to repeat (submit: with the same request_id)."""


class InvalidRequestError(EverstepError):
    """The request itself is wrong: correct it and send it again."""


class FieldViolation(NamedTuple):
    """One thing wrong with a spec."""

    field: str  # the path, as in optimizer.matrix_lr
    description: str  # the value found, the bound and the reason


class InvalidSpecError(InvalidRequestError):
    """A spec to correct; nothing was created. violations has every one that was found."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        super().__init__("\n".join(f"{item.field}: {item.description}" for item in violations))
        self.violations = list(violations)

    @classmethod
    def of(cls, error: SpecError) -> InvalidSpecError:
        """The same, found before anything was sent."""
        return cls([FieldViolation(found.field, found.describe()) for found in error.violations])


class RefusedError(EverstepError):
    """The service won't, as things stand. reason is a stable word for programs."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class UnauthenticatedError(RefusedError):
    """No token, or one that the service doesn't know: set EVERSTEP_TOKEN."""


class PermissionDeniedError(RefusedError):
    """The token doesn't allow this call."""


class NotFoundError(EverstepError):
    """No such job or checkpoint: check the name."""


REFUSALS: dict[grpc.StatusCode, type[RefusedError]] = {
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.ALREADY_EXISTS: RefusedError,
    grpc.StatusCode.ABORTED: RefusedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RefusedError,
    grpc.StatusCode.UNIMPLEMENTED: RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
}


def from_rpc(error: grpc.RpcError, address: str) -> EverstepError:
    """The error that a failed call means to the caller."""
    assert isinstance(error, grpc.Call), "every RpcError that a stub raises is a call"
    code, message = error.code(), error.details() or ""
    details = _details(error)
    info = _find(details, error_details_pb2.ErrorInfo)
    reason = info.reason if info is not None else code.name
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad = _find(details, error_details_pb2.BadRequest)
        if bad is None:
            return InvalidRequestError(message)
        found = [FieldViolation(item.field, item.description) for item in bad.field_violations]
        return InvalidSpecError(found)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFoundError(message)
    if code in REFUSALS:
        return REFUSALS[code](message, reason)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"no answer in time from {address}; the call is safe to repeat")
    if code is grpc.StatusCode.UNAVAILABLE:
        if info is not None:  # the service itself answered: what it needs is away
            return ServiceUnreachableError(message)
        return ServiceUnreachableError(f"no service answers at {address} ({message})")
    return EverstepError(f"{code.name}: {message}")


def _details(call: grpc.Call) -> Sequence[Any]:
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # trailers that contradict the call, or aren't a Status
        return ()
    return status.details if status is not None else ()


def _find(details: Sequence[Any], kind: type[Detail]) -> Detail | None:
    """The first detail of a kind."""
    for packed in details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None
