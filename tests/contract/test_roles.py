"""Every caller at every RPC that the server says it has, against the table of rules."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from everstep.cli.__main__ import run
from everstep.v1 import everstep_pb2 as pb
from service import access
from service import tokens as tokens_module
from service.access import RULES, Other, Role
from tests.fakes.api import ADMIN, RUN, TRAINING, Api, bearer, credential, reason, served

# In the order of what they may: what each meets is worked out from the rule of the RPC.
CALLERS = ("anonymous", "foreign attempt", "unknown token", "revoked", "read", "submit", "admin")
METHODS = {f"/{s.full_name}/{m.name}": m for s in (TRAINING, RUN) for m in s.methods}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with served(tmp_path) as made:
        yield made


async def token(api: Api, name: str, role: Role) -> str:
    request = pb.CreateTokenRequest(name=name, role=cast("pb.Role", role.value))
    return str((await api.call("CreateToken", request)).secret)


async def tokens(api: Api) -> dict[str, str | None]:
    """A token for each kind of caller."""
    found: dict[str, str | None] = {
        "anonymous": None,
        "foreign attempt": credential("SOMEBODY"),
        "unknown token": "evt1_" + "x" * 43,
        "revoked": await token(api, "gone", Role.ADMIN),
    }
    await api.call("RevokeToken", pb.RevokeTokenRequest(name="gone"))
    return {**found, **{r.name.lower(): await token(api, f"a-{r.name}", r) for r in Role}}


def expected(rule: Role | Other, caller: str) -> str:
    """The reason of the refusal; empty: it is let in."""
    known = {role.name.lower(): role for role in Role}
    if rule is Other.ATTEMPT:
        # A foreign attempt is let through to the service, which finds that it isn't the one.
        return "" if caller == "foreign attempt" else "UNAUTHENTICATED"
    if caller not in known:
        return "UNAUTHENTICATED"
    return "" if known[caller] >= rule else "FORBIDDEN"


async def reflected(api: Api) -> set[str]:
    """The methods that the server's reflection lists."""
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)

    async def ask(**what: str) -> reflection_pb2.ServerReflectionResponse:
        asked = reflection_pb2.ServerReflectionRequest(**what)
        (answer,) = [r async for r in stub.ServerReflectionInfo(iter([asked]), timeout=20)]
        return answer

    found = set()
    listed = (await ask(list_services="")).list_services_response.service
    for service in listed:
        answer = await ask(file_containing_symbol=service.name)
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for each in file.service:
                if f"{file.package}.{each.name}" == service.name:
                    found |= {f"/{service.name}/{method.name}" for method in each.method}
    return found


async def test_every_rpc_that_the_server_has_has_a_rule_and_every_rule_an_rpc(api: Api) -> None:
    found = await reflected(api)
    assert set(METHODS) <= found
    assert found <= set(RULES), "a new RPC needs a rule in service/access.py"
    ours = {name for name in RULES if name.startswith("/everstep.")}
    assert ours == set(METHODS)
    assert {name for name, rule in RULES.items() if rule is Other.OPEN}.isdisjoint(METHODS)


async def test_every_caller_meets_its_rule_at_every_rpc(api: Api) -> None:
    held = await tokens(api)
    assert set(held) == set(CALLERS)
    refusals: dict[tuple[str, Role | Other], set[str]] = {}
    for name, method in METHODS.items():
        for caller in CALLERS:
            wanted = expected(RULES[name], caller)
            try:
                await api.raw(method, held[caller])
                met, words = "", ""
            except grpc.aio.AioRpcError as error:
                refused = error.code() in (
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                )
                met, words = (reason(error) if refused else ""), error.details() or ""
            assert met == wanted, f"{caller} at {name}: {words}"
            if met:
                refusals.setdefault((caller, RULES[name]), set()).add(words)
    # A refusal doesn't tell a token that was never made from one that was revoked, nor what is
    # behind the call; one for want of a role names the role.
    assert all(len(words) == 1 for words in refusals.values()), refusals
    for role in Role:
        assert refusals["unknown token", role] == refusals["revoked", role]
    assert "role submit" in refusals["read", Role.SUBMIT].pop()
    assert "role admin" in refusals["submit", Role.ADMIN].pop()


async def test_a_foreign_attempt_reports_for_nobody_else(api: Api) -> None:
    job_id = (await api.submit()).job.id
    for hello in (pb.Hello(job_id=job_id, attempt=1), pb.Hello(job_id="NOBODY", attempt=1)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.report(credential("SOMEBODY"), [pb.ReportRequest(hello=hello)])
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_an_rpc_without_a_rule_is_closed_to_everybody(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(access.RULES, f"/{TRAINING.full_name}/ListJobs")
    error = await api.refused("ListJobs", pb.ListJobsRequest())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "no rule" in (error.details() or "")


async def test_a_secret_is_told_once_and_kept_nowhere(api: Api, tmp_path: Path) -> None:
    secret = await token(api, "alice", Role.READ)
    listed = await api.call("ListTokens", pb.ListTokensRequest())
    (made,) = listed.tokens
    assert (made.name, made.role) == ("alice", pb.ROLE_READ)
    assert secret not in str(listed)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


async def test_tokens_outlive_the_service_and_so_do_revocations(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        kept = await token(api, "kept", Role.READ)
        gone = await token(api, "gone", Role.READ)
        revoked = await api.call("RevokeToken", pb.RevokeTokenRequest(name="gone"))
        again = await api.call("RevokeToken", pb.RevokeTokenRequest(name=revoked.token.id))
        assert again == revoked
    async with served(tmp_path) as api:
        await api.call("ListJobs", pb.ListJobsRequest(), kept)
        error = await api.refused("ListJobs", pb.ListJobsRequest(), gone)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        await token(api, "gone", Role.READ)  # the name is free again


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.CreateTokenRequest(name="taken", role=pb.ROLE_READ), "FAILED_PRECONDITION"),
        (pb.CreateTokenRequest(name="admin", role=pb.ROLE_READ), "INVALID_ARGUMENT"),
        (pb.CreateTokenRequest(name="a b", role=pb.ROLE_READ), "INVALID_ARGUMENT"),
        (pb.CreateTokenRequest(role=pb.ROLE_READ), "INVALID_ARGUMENT"),
        (pb.CreateTokenRequest(name="x"), "INVALID_ARGUMENT"),
    ],
)
async def test_what_is_no_token_is_not_made(
    api: Api, request_: pb.CreateTokenRequest, code: str
) -> None:
    await token(api, "taken", Role.READ)
    assert (await api.refused("CreateToken", request_)).code().name == code
    unknown = await api.refused("RevokeToken", pb.RevokeTokenRequest(name="nobody"))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND


async def test_revoked_tokens_make_room_for_others(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "MOST_IN_USE", 1)
    for name in ("first", "second"):
        await api.call("CreateToken", pb.CreateTokenRequest(name=name, role=pb.ROLE_READ))
        third = pb.CreateTokenRequest(name="third", role=pb.ROLE_READ)
        error = await api.refused("CreateToken", third, ADMIN)
        assert "1 tokens are in use already" in (error.details() or "")
        await api.call("RevokeToken", pb.RevokeTokenRequest(name=name))


async def test_a_watch_tells_nothing_more_once_its_token_is_revoked(api: Api) -> None:
    job_id = (await api.submit()).job.id
    secret = await token(api, "watcher", Role.READ)
    call = api.training.WatchJob(
        pb.WatchJobRequest(job_id=job_id), metadata=bearer(secret), timeout=20
    )
    await call.read()
    await api.call("RevokeToken", pb.RevokeTokenRequest(name="watcher"))
    cancelling = asyncio.create_task(api.call("CancelJob", pb.CancelJobRequest(job_id=job_id)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await api.plane.tick()
    await cancelling


async def test_events_say_who_asked(api: Api) -> None:
    alice = await token(api, "alice", Role.SUBMIT)
    job_id = (await api.submit()).job.id
    task = asyncio.create_task(
        api.call("PauseJob", pb.PauseJobRequest(job_id=job_id), alice),
    )
    async with asyncio.timeout(20):
        while (await api.plane.job(job_id)).desired != "PAUSED":
            await asyncio.sleep(0.01)
        await api.plane.tick()
        await task
    await api.call("ResumeJob", pb.ResumeJobRequest(job_id=job_id), alice)
    records = await api.plane.records.read(job_id, 0, 100)
    told = [pb.WatchJobResponse.FromString(record.body).event for record in records]
    asked = [(e.message, e.actor) for e in told if e.kind == pb.EVENT_KIND_REQUESTED]
    assert asked == [("pause", "alice"), ("resume", "alice")]
    assert told[0].actor == "admin", "who submitted it"
    assert not any(alice in str(event) or ADMIN in str(event) for event in told)


async def test_the_command_makes_a_token_that_may_look_and_not_touch(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = (await api.submit()).job.id
    monkeypatch.setenv("EVERSTEP_ADDRESS", api.address)
    monkeypatch.setenv("EVERSTEP_TOKEN", ADMIN)

    async def everstep(*words: str) -> int:
        return await asyncio.to_thread(run, words)

    assert await everstep("token", "create", "guest", "--role", "read") == 0
    monkeypatch.setenv("EVERSTEP_TOKEN", capsys.readouterr().out.strip())
    assert await everstep("get", job_id) == 0
    assert await everstep("update", job_id, "--priority", "3") == 4
    assert "role submit" in capsys.readouterr().err
    monkeypatch.setenv("EVERSTEP_TOKEN", ADMIN)
    assert await everstep("update", job_id, "--priority", "3") == 0
    assert "priority 3" in capsys.readouterr().out
    assert await everstep("delete", job_id) == 4
    assert "cancel it first" in capsys.readouterr().err


async def test_an_upload_is_not_taken_once_its_token_is_revoked(api: Api) -> None:
    secret = await token(api, "uploader", Role.SUBMIT)
    revoked = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PutFileRequest]:
        sha256 = hashlib.sha256(b"x").hexdigest()
        header = pb.FileHeader(folder="d", name="a.parquet", size_bytes=1, sha256=sha256)
        yield pb.PutFileRequest(file=header)
        await revoked.wait()
        yield pb.PutFileRequest(data=b"x")

    call = api.training.PutFile(requests(), metadata=bearer(secret), timeout=20)
    assert not (await call.read()).present
    await api.call("RevokeToken", pb.RevokeTokenRequest(name="uploader"))
    revoked.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not [*api.plane.store.list("data/")]
