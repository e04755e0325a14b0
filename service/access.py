"""Who may call what: roles, the rule of every RPC, and the tokens that are in use. Pure.

Knows neither gRPC nor the database: the gate asks, `tokens.py` fills the keyring.

Invariant: a method without a rule is nobody's. A token itself is never kept, only its digest, and
whoever is refused learns nothing of which tokens there are.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, IntEnum

from service.errors import ForbiddenError, UnauthenticatedError

BOOTSTRAP = "admin"  # the name in events of the token that the service was started with


class Role(IntEnum):
    """What a token lets its holder do; a higher role may do what a lower one may."""

    READ = 1
    SUBMIT = 2
    ADMIN = 3


class Other(Enum):
    """Rules that no token's role meets."""

    OPEN = 1  # anybody; tells nothing that is not in the public .proto
    ATTEMPT = 2  # an attempt's own credential


TRAINING = "/everstep.v1.TrainingService/"
READ = (
    "PlanJob", "GetJob", "ListJobs", "WatchJob", "StreamLogs", "ListCheckpoints",
    "VerifyCheckpoint", "GetLineage", "ListMetrics", "CompareJobs", "GetCluster",
)  # fmt: skip
SUBMIT = (
    "SubmitJob", "PauseJob", "ResumeJob", "CancelJob", "UpdateJob", "ImportCheckpoint",
    "ExportCheckpoint", "SampleCheckpoint", "PutFile",
)  # fmt: skip
# What can't be got back, what is other people's, and who comes in.
ADMIN = (
    "DeleteJob", "DeleteCheckpoint", "DrainNode", "CreateToken", "ListTokens", "RevokeToken",
)  # fmt: skip

RULES: dict[str, Role | Other] = {
    **{TRAINING + name: Role.READ for name in READ},
    **{TRAINING + name: Role.SUBMIT for name in SUBMIT},
    **{TRAINING + name: Role.ADMIN for name in ADMIN},
    "/everstep.v1.RunService/Report": Other.ATTEMPT,
    "/grpc.health.v1.Health/Check": Other.OPEN,
    "/grpc.health.v1.Health/Watch": Other.OPEN,
    "/grpc.health.v1.Health/List": Other.OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Other.OPEN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Other.OPEN,
}


@dataclass(frozen=True)
class Identity:
    """Who calls, by a token."""

    name: str
    role: Role


# Of the call under way, set by the gate; None outside a call and for an attempt.
identity: ContextVar[Identity | None] = ContextVar("identity", default=None)


def actor() -> str:
    """The name of the token of the call under way; empty where there is none."""
    found = identity.get()
    return found.name if found is not None else ""


def digest(token: str) -> str:
    """What is kept of a token. It has 256 random bits, so there is nothing to guess from it."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


class Keyring:
    """The tokens in use, by digest."""

    def __init__(self, bootstrap: str) -> None:
        """bootstrap: the token that the service was started with; it can't be revoked."""
        self._bootstrap = {digest(bootstrap): Identity(BOOTSTRAP, Role.ADMIN)}
        self._known = dict(self._bootstrap)
        self.version = 0  # grows with every change

    def fill(self, tokens: Iterable[tuple[str, Identity]]) -> None:
        """Take these tokens, digest and holder, in place of those before."""
        self._known = {**dict(tokens), **self._bootstrap}
        self.version += 1

    def identify(self, token: str) -> Identity:
        """Who holds it; UnauthenticatedError, the same for any token that is not in use."""
        presented = digest(token)
        found = None
        for known, holder in self._known.items():  # all of them: time tells nothing
            if hmac.compare_digest(known, presented):
                found = holder
        if found is None:
            raise UnauthenticatedError("the token is not one of this service's")
        return found


def permit(method: str, holder: Identity) -> None:
    """Raise ForbiddenError, naming the role that is needed, unless the holder may call it."""
    rule = RULES.get(method)
    if not isinstance(rule, Role):
        raise ForbiddenError(f"no rule allows {method}")
    if holder.role < rule:
        raise ForbiddenError(
            f"needs a token of role {rule.name.lower()}, this one has {holder.role.name.lower()}"
        )
