"""The client of Everstep: what a user installs to submit, watch and continue training jobs.

Needs neither torch nor Ray. `Client` and the error classes here are the public surface; the
messages it returns are those of everstep.v1 (everstep/v1/everstep_pb2.pyi has every field).
"""

from everstep.client import Client
from everstep.errors import (
    DeadlineError,
    EverstepError,
    FieldViolation,
    InvalidRequestError,
    InvalidSpecError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServiceUnreachableError,
    UnauthenticatedError,
)
from trainer.contract.spec import JobSpec

__all__ = [
    "Client",
    "DeadlineError",
    "EverstepError",
    "FieldViolation",
    "InvalidRequestError",
    "InvalidSpecError",
    "JobSpec",
    "NotFoundError",
    "PermissionDeniedError",
    "RefusedError",
    "ServiceUnreachableError",
    "UnauthenticatedError",
]
