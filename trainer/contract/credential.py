"""The credential with which an attempt reports to the service.

The service gives each host a key derived from its own secret; the host derives a credential for
each attempt. So an attempt that starts while the service is down has one too, the service checks it
without a lookup, and a credential is worth nothing for another job or attempt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass

PREFIX = "evr1"
# Prefix, job, host number, attempt, MAC. Only ASCII and short numbers: a token is anybody's text.
_FORM = re.compile(PREFIX + r"\.([0-9A-Za-z]{1,64})\.([0-9]{1,10})\.([0-9]{1,10})\.[0-9a-f]{64}")


class BadCredentialError(ValueError):
    """A credential that this service did not issue."""


@dataclass(frozen=True)
class AttemptIdentity:
    """Who a credential speaks for."""

    job_id: str
    host_number: int
    attempt: int


def host_key(service_secret: bytes, job_id: str, host_number: int) -> str:
    """The key of one host, in hexadecimal."""
    return _mac(service_secret, f"host:{job_id}:{host_number}")


def attempt_credential(key: str, identity: AttemptIdentity) -> str:
    """The bearer token of one attempt; key is its host's."""
    name = f"{identity.job_id}.{identity.host_number}.{identity.attempt}"
    return f"{PREFIX}.{name}.{_mac(bytes.fromhex(key), name)}"


def check_credential(service_secret: bytes, token: str) -> AttemptIdentity:
    """Who the token speaks for.

    Raises:
        BadCredentialError: malformed, or not derived from service_secret.
    """
    found = _FORM.fullmatch(token)
    if found is None:
        raise BadCredentialError("not an attempt's credential")
    identity = AttemptIdentity(found[1], int(found[2]), int(found[3]))
    key = host_key(service_secret, identity.job_id, identity.host_number)
    if not hmac.compare_digest(attempt_credential(key, identity), token):
        raise BadCredentialError("not issued by this service")
    return identity


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
