"""What a use case can refuse, named for what the caller can do about it.

Raised by lifecycle and its neighbours; interceptors.py holds the one table to gRPC statuses.
`trainer.contract.violations.SpecError` belongs here too: a spec to correct.
"""

from __future__ import annotations


class StartError(Exception):
    """The service can't start; the message says what to do."""


class ServiceError(Exception):
    """Base of all refusals. reason is a stable word for programs, the message is for people."""

    reason = "INTERNAL"


class JobNotFoundError(ServiceError):
    """No such job: check the id."""

    reason = "JOB_NOT_FOUND"


class CheckpointNotFoundError(JobNotFoundError):
    """The job has no such checkpoint: check the step."""

    reason = "CHECKPOINT_NOT_FOUND"


class TokenNotFoundError(JobNotFoundError):
    """No such token: check the name."""

    reason = "TOKEN_NOT_FOUND"


class NodeNotFoundError(JobNotFoundError):
    """No such node: check the address."""

    reason = "NODE_NOT_FOUND"


class RequestReusedError(ServiceError):
    """The request_id was used for another submission: choose a new one."""

    reason = "REQUEST_ID_REUSED"


class PreconditionError(ServiceError):
    """The job or the cluster is not in a state that allows this."""

    reason = "PRECONDITION_FAILED"


class LearningRateJumpError(PreconditionError):
    """A continuation would raise a rate by more than its guard allows: see the ways out."""

    reason = "LEARNING_RATE_JUMP"


class JobInUseError(PreconditionError):
    """Jobs that started from its checkpoints still need them: the message says which."""

    reason = "JOB_IN_USE"


class CheckpointNeededError(PreconditionError):
    """Somebody depends on the checkpoint, so it may not be deleted: the message says who."""

    reason = "CHECKPOINT_NEEDED"


class FileExistsElsewiseError(PreconditionError):
    """A file of this name holds other content: choose another name, or overwrite."""

    reason = "FILE_EXISTS"


class NoSpaceError(ServiceError):
    """A disk is too full: make room."""

    reason = "NO_SPACE"


class BusyError(ServiceError):
    """Somebody else's request of this kind is under way: try again later."""

    reason = "BUSY"


class StorageAwayError(ServiceError):
    """Object storage can't be reached: try again later."""

    reason = "STORAGE_UNAVAILABLE"


class StoredDataError(ServiceError):
    """A document in the bucket is torn or of another version: trying again won't help."""

    reason = "STORED_DATA_UNREADABLE"


class ClusterAwayError(ServiceError):
    """Ray can't be reached: try again later."""

    reason = "CLUSTER_UNAVAILABLE"


class UnauthenticatedError(ServiceError):
    """No credential, or one that this service did not issue."""

    reason = "UNAUTHENTICATED"


class ForbiddenError(ServiceError):
    """The credential doesn't allow this call."""

    reason = "FORBIDDEN"


class InvalidRequestError(ServiceError):
    """A field of the request itself (not of a spec) is wrong."""

    reason = "INVALID_REQUEST"


def require(holds: bool, otherwise: str) -> None:
    """Raise InvalidRequestError, which names field, value and bound, unless it holds."""
    if not holds:
        raise InvalidRequestError(otherwise)


class StaleAttemptError(ServiceError):
    """A newer attempt of this job reports: stop."""

    reason = "STALE_ATTEMPT"
