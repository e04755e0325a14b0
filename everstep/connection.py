"""The channel to one service: where it is, who we are, deadlines and retries.

Owns address and token discovery (the only reader of EVERSTEP_* in the client) and the retry policy.
Knows nothing of what the calls mean.

Invariant: only UNAVAILABLE is retried; every call of the API may be repeated (submissions carry a
request_id, the others change nothing or set what is wanted), so a retry can't do a thing twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from everstep.errors import ServiceUnreachableError, from_rpc
from everstep.v1 import everstep_pb2_grpc as rpc

DEFAULT_STATE = ".everstep"
# A watch whose peer has silently gone is noticed within 40 s: how often we ask, how long we wait.
KEEPALIVE_MS = (30_000, 10_000)
LOOPBACK = ("127.", "localhost", "[::1]")
NO_SERVICE = "set EVERSTEP_ADDRESS, or start one here: everstep serve --standalone"

RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{"service": "everstep.v1.TrainingService"}],
            "retryPolicy": {
                "maxAttempts": 5,  # gRPC's own ceiling; with these waits about 2 s
                "initialBackoff": "0.2s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@dataclass(frozen=True)
class Endpoint:
    """Where a service answers and what it wants to see. token and ca_cert may be absent."""

    address: str
    token: str | None = None
    ca_cert: Path | None = None

    @classmethod
    def find(
        cls,
        address: str | None = None,
        token: str | None = None,
        ca_cert: str | Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Endpoint:
        """What was given, else EVERSTEP_*, else what `everstep serve` left in its state folder.

        The folder is EVERSTEP_STATE, else ./.everstep. Its token is used only with its address, so
        that it never goes elsewhere.

        Raises:
            ServiceUnreachableError: no address was given or found.
        """
        token = token or environ.get("EVERSTEP_TOKEN") or None
        cert = ca_cert or environ.get("EVERSTEP_CA_CERT") or None
        address = address or environ.get("EVERSTEP_ADDRESS") or None
        if address is None:
            local = cls.of_state(environ.get("EVERSTEP_STATE") or DEFAULT_STATE)
            address, token = local.address, token or local.token
            cert = cert or local.ca_cert
        return cls(address, token, Path(cert) if cert is not None else None)

    @classmethod
    def of_state(cls, folder: str | Path) -> Endpoint:
        """The service that runs on a state folder; ServiceUnreachableError if none does."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / "service.json").read_text())
            address, cert = facts["address"], facts.get("ca_cert")
            token = (folder / "token").read_text().strip()
        except FileNotFoundError:
            message = f"no service runs on {folder}; {NO_SERVICE}"
            raise ServiceUnreachableError(message) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{folder}/service.json can't be read: {error}"
            raise ServiceUnreachableError(message) from error
        return cls(str(address), token, folder / cert if cert else None)


class Connection:
    """An open channel; connects at the first call, and again by itself."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.address = endpoint.address
        self._channel = _channel(endpoint)
        self._stub = rpc.TrainingServiceStub(self._channel)
        self._metadata: tuple[tuple[str, str], ...] = ()
        if endpoint.token is not None:
            self._metadata = (("authorization", f"Bearer {endpoint.token}"),)

    def unary(self, method: str, request: Any, timeout_s: float) -> Any:
        """One call and its answer; raises an EverstepError."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        """One server stream, without a deadline; given up when the iterator is closed."""
        call = getattr(self._stub, method)(request, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
        finally:
            call.cancel()

    def close(self) -> None:
        """End every call; the connection can't be used again."""
        self._channel.close()


def _channel(endpoint: Endpoint) -> grpc.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(RETRY_POLICY)),
        # A watch reconnects while a service restarts: gRPC's own pace grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS[0]),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS[1]),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS[1]),  # what counts; a minute otherwise
        ("grpc.http2.max_pings_without_data", 0),  # a watch may be silent: else one a minute
        ("grpc.max_receive_message_length", 64 << 20),
    ]
    if endpoint.address.startswith(LOOPBACK):  # http_proxy is never meant for this machine
        options.append(("grpc.enable_http_proxy", 0))
    if endpoint.ca_cert is None:
        return grpc.insecure_channel(endpoint.address, options=options)
    try:
        certificate = endpoint.ca_cert.read_bytes()
    except OSError as error:
        message = f"EVERSTEP_CA_CERT {endpoint.ca_cert} can't be read: {error.strerror}"
        raise ServiceUnreachableError(message) from error
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
    return grpc.secure_channel(endpoint.address, credentials, options=options)
