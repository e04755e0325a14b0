"""The API served in process on loopback: a real gRPC server over a control plane without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from service.access import Keyring
from service.cluster import Cluster
from service.deletions import Deletions
from service.interceptors import Gate
from service.reports import RunServicer
from service.sampling import Sampler
from service.server import Server
from service.servicer import TrainingServicer
from service.store import TokenStore
from service.tls import Certificate
from service.tokens import Tokens
from service.transfers import Transfers
from service.updates import Updates
from service.uploads import Uploads
from tests.fakes.control_plane import TINY, ControlPlane, changed, control_plane
from tests.fakes.ray_cluster import FakeRayCluster
from trainer.contract.credential import AttemptIdentity, attempt_credential, host_key

ADMIN = "the-admin's"
SECRET = bytes(range(32))
TRAINING = pb.DESCRIPTOR.services_by_name["TrainingService"]
RUN = pb.DESCRIPTOR.services_by_name["RunService"]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def credential(job_id: str, attempt: int = 1, host: int = 1) -> str:
    identity = AttemptIdentity(job_id, host, attempt)
    return attempt_credential(host_key(SECRET, job_id, host), identity)


@dataclass
class Api:
    """A served control plane and a channel to it."""

    plane: ControlPlane
    address: str
    channel: grpc.aio.Channel
    training: Any
    server: Server
    gate: Gate

    async def call(self, method: str, request: Any, token: str | None = ADMIN) -> Any:
        metadata = bearer(token) if token is not None else ()
        return await getattr(self.training, method)(request, metadata=metadata, timeout=20)

    async def refused(
        self, method: str, request: Any, token: str | None = ADMIN
    ) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, request, token)
        return caught.value

    async def submit(self, request_id: str = "", **sections: Any) -> pb.SubmitJobResponse:
        spec = dict_to_proto(changed(TINY, **sections))
        return await self.call("SubmitJob", pb.SubmitJobRequest(spec=spec, request_id=request_id))

    async def raw(self, method: MethodDescriptor, token: str | None) -> list[Any]:
        """Call any method of the descriptor with one empty request; every response."""
        stub = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, True): self.channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        service = method.containing_service.full_name
        call: Callable[..., Any] = stub(
            f"/{service}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        request = GetMessageClass(method.input_type)()
        metadata = bearer(token) if token is not None else ()
        argument = iter([request]) if method.client_streaming else request
        called = call(argument, metadata=metadata, timeout=20)
        if method.server_streaming:
            return [response async for response in called]
        return [await called]

    async def report(self, token: str, requests: list[pb.ReportRequest]) -> list[Any]:
        stub = rpc.RunServiceStub(self.channel)
        call = stub.Report(iter(requests), metadata=bearer(token), timeout=20)
        return [response async for response in call]


@asynccontextmanager
async def served(
    folder: Path, cluster: FakeRayCluster | None = None, tls: Certificate | None = None
) -> AsyncIterator[Api]:
    async with control_plane(folder, cluster) as plane:
        keyring = Keyring(ADMIN)
        tokens = Tokens(TokenStore(plane.database), keyring)
        await tokens.load()
        deletions = Deletions(
            plane.lifecycle, plane.jobs, plane.deletions, plane.storage, plane.metrics
        )
        gate = Gate(keyring, SECRET, plane.metrics)
        server = Server(
            gate,
            TrainingServicer(
                plane.lifecycle,
                plane.storage,
                Uploads(plane.storage, folder / "uploads"),
                Sampler(plane.lifecycle, plane.storage.uri),
                Transfers(plane.lifecycle, plane.storage, plane.records),
                tokens,
                Updates(plane.lifecycle, plane.jobs, plane.storage, plane.reconciler.wake),
                deletions,
                Cluster(
                    plane.jobs,
                    plane.records,
                    lambda: plane.reconciler.nodes,
                    lambda: plane.reconciler.seen_at,
                    plane.metrics.samples,
                    plane.upkeep,
                    plane.reconciler.wake,
                    plane.reconciler.explained,
                ),
            ),
            RunServicer(plane.jobs, plane.records, plane.metrics, plane.reconciler.directive),
            tls.credentials() if tls else None,
        )
        address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
        try:
            async with _channel(address, tls) as channel:
                yield Api(plane, address, channel, rpc.TrainingServiceStub(channel), server, gate)
        finally:
            await server.stop()
            await deletions.close()


def _channel(address: str, tls: Certificate | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    trusted = grpc.ssl_channel_credentials(tls.authority.read_bytes())
    return grpc.aio.secure_channel(address, trusted)


def details(error: grpc.aio.AioRpcError, kind: type[Any]) -> Any:
    """The google.rpc detail of a kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


def reason(error: grpc.aio.AioRpcError) -> str:
    info = details(error, error_details_pb2.ErrorInfo)
    assert info.domain == "everstep"
    return info.reason


def hello(job_id: str, attempt: int = 1) -> pb.ReportRequest:
    return pb.ReportRequest(hello=pb.Hello(job_id=job_id, attempt=attempt))


def points(*steps: int) -> pb.ReportRequest:
    entries = [
        pb.ReportEntry(sequence=step, point=pb.MetricPoint(step=step, step_s=0.5)) for step in steps
    ]
    return pb.ReportRequest(entries=entries)
