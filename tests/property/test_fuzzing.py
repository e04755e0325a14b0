"""Random and mutated messages at every RPC of a real server: answered in time, telling nothing.

500 calls in CI; EVERSTEP_FUZZ_ROUNDS asks for more (make chaos: 10,000). A failure names its seed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from everstep.specs import dict_to_proto
from everstep.v1 import everstep_pb2 as pb
from service.errors import ClusterAwayError
from tests.fakes.api import ADMIN, RUN, TRAINING, Api, bearer, credential, served
from tests.fakes.control_plane import TINY

ROUNDS = int(os.environ.get("EVERSTEP_FUZZ_ROUNDS", "500"))
BATCH = 100  # rounds of one test, against a service of its own
METHODS = [*TRAINING.methods, *RUN.methods]
ANSWER_S = 20.0  # a machine three times slower than ours still answers a call in a tenth of it
READ = 20  # answers of a stream that are looked at
# Streams that wait for a job's end are given up by their callers.
ENDLESS = {"WatchJob", "StreamLogs", "PutFile", "Report"}
PATIENCE_S = 0.3
NEVER = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE")
# grpc.aio's own words for a request that it could not write to a call that had just ended.
WRITE_FAILED = "Internal error from Core"
INSIDE = ("Traceback", 'File "', "site-packages", "sqlalchemy", "sqlite", "object at 0x", ".py:")
TEXTS = [
    "", "JOB", "JOB@latest", "JOB@5", "x" * 300, "../../etc/passwd", "file:/etc", "\0", "s3://b/p",
    "nanochat:/no/where@3", "http://169.254.169.254/latest", "builtin:nothing", "admin", "%s%n",
]  # fmt: skip
NUMBERS = [0, 0, 0, 1, 1, -1, 2, 7, 500, 2**31 - 1, -(2**31)]
FLOATS = [0.0, -1.0, 1e308, float("inf"), float("nan"), 1e-300, 0.5]


def value(dice: random.Random, field: FieldDescriptor, jobs: list[str]) -> Any:
    """Something that a field of this kind can hold."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return dice.randbytes(dice.choice([0, 1, 100]))
            if jobs and dice.random() < 0.7:
                return dice.choice(jobs) + dice.choice(["", "", "", "@latest"])
            return dice.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return dice.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return dice.choice([0, 1, 2, 3, 99])
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
            return dice.choice([0, 1, 2**31])
        case _:
            return dice.choice(NUMBERS)


def fill(dice: random.Random, message: Message, jobs: list[str], depth: int = 0) -> None:
    """Set some fields of a message, and of those in it."""
    for field in message.DESCRIPTOR.fields:
        if dice.random() < 0.4 or depth > 4:
            continue
        held = getattr(message, field.name)
        if field.message_type is not None:
            for _ in range(dice.choice([1, 3]) if field.is_repeated else 1):
                inner = held.add() if field.is_repeated else held
                inner.SetInParent()
                fill(dice, inner, jobs, depth + 1)
        elif field.is_repeated:
            held.extend(value(dice, field, jobs) for _ in range(dice.choice([0, 1, 3])))
        else:
            setattr(message, field.name, value(dice, field, jobs))


def spoil(dice: random.Random, spec: pb.JobSpec, jobs: list[str]) -> None:
    """Change a few fields of a spec that would run."""
    for _ in range(dice.choice([0, 1, 2])):
        section = dice.choice([f for f in spec.DESCRIPTOR.fields if f.message_type is not None])
        inner = getattr(spec, section.name)
        plain = [field for field in inner.DESCRIPTOR.fields if field.message_type is None]
        field = dice.choice(plain)
        setattr(inner, field.name, value(dice, field, jobs))


def payload(dice: random.Random, method: MethodDescriptor, jobs: list[str]) -> bytes:
    """The bytes of one request: nonsense, a whole message, or one with a few bytes changed."""
    kind = dice.random()
    if kind < 0.2:
        return dice.randbytes(dice.choice([1, 10, 1000, 100_000]))
    message = GetMessageClass(method.input_type)()
    fill(dice, message, jobs)
    if "spec" in message.DESCRIPTOR.fields_by_name and dice.random() < 0.7:
        message.spec.CopyFrom(dict_to_proto(TINY))
        spoil(dice, message.spec, jobs)
    raw = bytearray(message.SerializeToString())
    if kind < 0.5:
        for _ in range(dice.choice([1, 2, 5])):
            if raw:
                raw[dice.randrange(len(raw))] = dice.randrange(256)
        if dice.random() < 0.3:
            del raw[dice.randrange(len(raw) + 1) :]
    return bytes(raw)


def token(dice: random.Random, method: MethodDescriptor, jobs: list[str]) -> str:
    right = credential(dice.choice(jobs or ["X"]), 1) if method in RUN.methods else ADMIN
    return right if dice.random() < 0.95 else dice.choice(["", "evr1.a.1.1.x", "evt1_x", "x" * 500])


async def attempt(api: Api, method: MethodDescriptor, raw: list[bytes], held: str) -> str:
    """Call once; what the caller is told in words, the code first. Hangs are ANSWER_S long."""
    kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): api.channel.unary_unary,
        (False, True): api.channel.unary_stream,
        (True, True): api.channel.stream_stream,
    }
    call = kinds[method.client_streaming, method.server_streaming](
        f"/{method.containing_service.full_name}/{method.name}"
    )
    argument: Any = iter(raw) if method.client_streaming else raw[0]
    called = call(argument, metadata=bearer(held), timeout=ANSWER_S)
    try:
        if not method.server_streaming:
            await called
            return "OK"
        try:
            async with asyncio.timeout(PATIENCE_S if method.name in ENDLESS else ANSWER_S):
                for _ in range(READ):
                    if await called.read() is grpc.aio.EOF:
                        break
        except TimeoutError:
            assert method.name in ENDLESS, f"{method.name} hangs"
        called.cancel()
        return "OK"
    except grpc.aio.AioRpcError as error:
        if error.details() == WRITE_FAILED and method.client_streaming:
            return "CLOSED"
        return f"{error.code().name} {error.details()} {error.trailing_metadata()}"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A service whose cluster is away: jobs wait, pauses and cancels are carried out."""
    async with served(tmp_path) as made:
        await made.plane.tick()  # its nodes are known
        made.plane.cluster.away = True

        async def settle() -> None:
            while True:
                try:
                    await made.plane.tick()
                except ClusterAwayError:
                    await asyncio.sleep(0.02)

        ticking = asyncio.create_task(settle())
        yield made
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)


@pytest.mark.parametrize("seed", range(max(ROUNDS // BATCH, 1)))
async def test_whatever_is_sent_is_answered_in_time_and_tells_nothing(
    api: Api, seed: int, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    jobs = [(await api.submit()).job.id for _ in range(2)]
    codes: dict[str, int] = {}
    for turn in range(BATCH):
        method = METHODS[(seed * BATCH + turn) % len(METHODS)]
        raw = [payload(dice, method, jobs) for _ in range(3 if method.client_streaming else 1)]
        told = await attempt(api, method, raw, token(dice, method, jobs))
        code = told.split()[0]
        codes[code] = codes.get(code, 0) + 1
        assert code not in NEVER, f"seed {seed}, turn {turn}, {method.name}: {told}"
        if code not in ("OK", "CLOSED"):
            assert "grpc-status-details-bin" in told, (
                f"seed {seed}, turn {turn}: no details: {told}"
            )
        for inside in (*INSIDE, str(tmp_path)):
            assert inside not in told, f"seed {seed}, turn {turn}, {method.name}: {told}"
    # The service lives, and the dice reach past the gate.
    assert (await api.call("ListJobs", pb.ListJobsRequest())).jobs is not None
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(codes), codes
