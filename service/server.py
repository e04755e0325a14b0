"""The gRPC server: our services, health and reflection behind one gate; graceful stop."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from everstep.v1 import everstep_pb2, everstep_pb2_grpc
from service.interceptors import Gate
from service.reports import RunServicer
from service.servicer import TrainingServicer

STOP_GRACE_S = 5.0
OPTIONS = [
    # Long watches through NATs and sleepy laptops: both sides notice a dead peer within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # what counts: a minute of its own otherwise
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", 8 << 20),
    # Of one connection: who opens a call and sends no message is met by no rule of ours.
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.so_reuseport", 0),  # a second service on our port is a mistake, not load balancing
]


class Server:
    """Serves once started, until stopped."""

    def __init__(
        self,
        gate: Gate,
        training: TrainingServicer,
        run: RunServicer,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """credentials: None serves plaintext."""
        self._credentials = credentials
        self._server = grpc.aio.server(interceptors=[gate], options=OPTIONS)
        everstep_pb2_grpc.add_TrainingServiceServicer_to_server(training, self._server)
        everstep_pb2_grpc.add_RunServiceServicer_to_server(run, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.full_name for service in everstep_pb2.DESCRIPTOR.services_by_name.values()]
        self._names = names
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    async def start(self, listen: str) -> int:
        """Listen; the port, which may have been 0. RuntimeError where it is taken."""
        if self._credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, self._credentials)
        await self._server.start()
        await self.ready(True)
        return int(port)

    async def ready(self, well: bool) -> None:
        """Tell by health whether work is done; once the service leaves it says no for good."""
        answer = health_pb2.HealthCheckResponse
        for name in ["", *self._names]:
            await self._health.set(name, answer.SERVING if well else answer.NOT_SERVING)

    async def leave(self) -> None:
        """Say that others should be asked from now on; calls are answered until `stop`."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Answer what is under way, refuse what is new, then close."""
        await self.leave()
        await self._server.stop(STOP_GRACE_S)
