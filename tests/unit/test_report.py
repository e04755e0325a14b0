"""The reporter against a scripted RunService over real gRPC: batches, replay, directives, end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc
import pytest

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
from trainer import report
from trainer.contract.devices import Device
from trainer.contract.schedule import GroupValues
from trainer.events import (
    CheckpointCommitted,
    CheckpointPassedOver,
    Directive,
    Evaluated,
    Event,
    Point,
    Sampled,
    ValuesInForce,
    Warned,
)
from trainer.report import ServiceReporter, event_to_proto, point_to_proto
from trainer.storage.manifest import CheckpointRef

WAIT_S = 20.0
HELLO = pb.Hello(job_id="JOB", attempt=3, start_step=7)
REF = CheckpointRef(job_id="JOB", step=8, attempt=3)
CPU = Device("cpu", memory_bytes=2000, free_bytes=1000)
GROUPS = {"wte": GroupValues(0.1, 0.8, 0.001)}


class ScriptedRunService(rpc.RunServiceServicer):
    """Acknowledges what it records; directives and refusals are scripted."""

    def __init__(self) -> None:
        self.hellos: list[pb.Hello] = []
        self.tokens: list[str] = []
        self.batches: list[list[int]] = []
        self.entries: list[pb.ReportEntry] = []
        self.directives: list[Any] = []  # given one an answer
        self.refusal: grpc.StatusCode | None = None
        self.break_after: int | None = None  # a stream ends after so many batches, unacknowledged
        self.silent = threading.Event()  # answers nothing while it is set
        self.delay_s = 0.0  # before each answer
        self.changed = threading.Condition()
        self.port = 0

    def Report(self, requests: Any, context: grpc.ServicerContext) -> Iterator[pb.ReportResponse]:  # noqa: N802
        self.tokens.append(dict(context.invocation_metadata())["authorization"])
        if self.refusal is not None:
            context.abort(self.refusal, "scripted")
        for request in requests:
            if self.silent.is_set():
                continue
            time.sleep(self.delay_s)
            with self.changed:
                self._take(request)
                self.changed.notify_all()
                if self.break_after == 0:
                    self.break_after = None
                    context.abort(grpc.StatusCode.UNAVAILABLE, "scripted: the stream breaks")
                if self.break_after is not None and request.entries:
                    self.break_after -= 1
                directive = self.directives.pop(0) if self.directives else 0
                yield pb.ReportResponse(acknowledged_sequence=self.heard(), directive=directive)

    def heard(self) -> int:
        return self.entries[-1].sequence if self.entries else 0

    def wait_for(self, reached: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(reached, WAIT_S), "not reported in time"

    def _take(self, request: pb.ReportRequest) -> None:
        if request.HasField("hello"):
            self.hellos.append(request.hello)
            return
        if request.entries:
            self.batches.append([entry.sequence for entry in request.entries])
        for entry in request.entries:
            if entry.sequence > self.heard() and self.break_after != 0:
                self.entries.append(entry)


def serve(service: ScriptedRunService) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    rpc.add_RunServiceServicer_to_server(service, server)
    service.port = server.add_insecure_port(f"127.0.0.1:{service.port}")
    server.start()
    return server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FLUSH_S", 0.02)
    monkeypatch.setattr(report, "RECONNECT_S", (0.02,))
    monkeypatch.setattr(report, "CLOSE_S", 10.0)


@pytest.fixture
def service() -> Iterator[ScriptedRunService]:
    made = ScriptedRunService()
    server = serve(made)
    yield made
    server.stop(0).wait()


def reporter_to(service: ScriptedRunService) -> ServiceReporter:
    return ServiceReporter(f"127.0.0.1:{service.port}", None, "CREDENTIAL", HELLO)


def point(step: int) -> Point:
    return Point(step, 2.5, 2.6, 0.5, 0.1, 0.01, step * 512, 5120.0, GROUPS)


def numbers(service: ScriptedRunService) -> list[int]:
    return [entry.point.step for entry in service.entries]


def test_what_is_told_arrives_in_order_and_is_delivered_at_close(
    service: ScriptedRunService,
) -> None:
    reporter = reporter_to(service)
    for step in range(1, 21):
        reporter.point(point(step))
    reporter.event(Warned(20, "almost done"))
    reporter.close()
    assert service.hellos == [HELLO]
    assert service.tokens == ["Bearer CREDENTIAL"]
    assert numbers(service)[:20] == list(range(1, 21))
    assert [entry.sequence for entry in service.entries] == list(range(1, 22))
    assert service.entries[-1].event.message == "almost done"
    assert all(entry.HasField("time") for entry in service.entries)


def test_no_proxy_stands_between_trainer_and_service(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(report, "CLOSE_S", 3.0)
    reporter = reporter_to(service)
    reporter.point(point(1))
    reporter.close()
    assert numbers(service) == [1]


def test_much_goes_in_batches(service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_BATCH", 10)
    monkeypatch.setattr(report, "FLUSH_S", 0.5)
    reporter = reporter_to(service)
    service.wait_for(lambda: bool(service.hellos))
    for step in range(1, 36):
        reporter.point(point(step))
    reporter.close()
    assert max(len(batch) for batch in service.batches) <= 10
    assert numbers(service) == list(range(1, 36))


def test_a_broken_stream_is_replayed_from_the_last_acknowledged_number(
    service: ScriptedRunService,
) -> None:
    service.break_after = 1
    reporter = reporter_to(service)
    for step in range(1, 200):
        reporter.point(point(step))
        time.sleep(0)
    service.wait_for(lambda: len(service.entries) > 0)
    acknowledged = len(service.entries)
    reporter.point(point(200))
    service.wait_for(lambda: len(service.hellos) == 2)
    reporter.close()
    assert service.break_after is None
    assert numbers(service) == list(range(1, 201))
    again = [batch[0] for batch in service.batches]
    assert acknowledged + 1 in again
    assert service.hellos == [HELLO, HELLO]


def test_a_service_that_comes_back_hears_everything() -> None:
    service = ScriptedRunService()
    server = serve(service)
    reporter = reporter_to(service)
    reporter.point(point(1))
    service.wait_for(lambda: len(service.entries) == 1)
    server.stop(0).wait()
    for step in range(2, 50):
        reporter.point(point(step))  # training goes on
    server = serve(service)
    service.wait_for(lambda: len(service.entries) == 49)
    reporter.close()
    server.stop(0).wait()
    assert numbers(service) == list(range(1, 50))


def test_a_service_that_stops_answering_is_taken_for_gone(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ANSWER_S", 0.2)
    reporter = reporter_to(service)
    reporter.point(point(1))
    service.wait_for(lambda: len(service.entries) == 1)
    service.silent.set()
    reporter.point(point(2))
    wait_until(lambda: len(service.tokens) > 1)
    service.silent.clear()
    reporter.close()
    assert numbers(service) == [1, 2]


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.005)


def test_a_stop_is_heard_and_stays(service: ScriptedRunService) -> None:
    service.directives = [pb.DIRECTIVE_UNSPECIFIED] + [pb.DIRECTIVE_STOP] * 1000
    reporter = reporter_to(service)
    wait_until(lambda: reporter.directive() is Directive.STOP)
    assert reporter.directive() is Directive.STOP
    reporter.close()


def test_a_checkpoint_asked_for_once_is_given_once_however_late_the_loop_looks(
    service: ScriptedRunService,
) -> None:
    service.directives = [pb.DIRECTIVE_CHECKPOINT]
    reporter = reporter_to(service)
    for step in (1, 2):  # two more answers, which ask for nothing
        reporter.point(point(step))
        service.wait_for(lambda step=step: len(service.entries) >= step)  # type: ignore[misc]
    reporter.close()
    assert reporter.directive() is Directive.CHECKPOINT
    assert reporter.directive() is Directive.GO_ON


@pytest.mark.parametrize(
    ("code", "directive"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, Directive.STOP),
        (grpc.StatusCode.NOT_FOUND, Directive.STOP),
        (grpc.StatusCode.UNAUTHENTICATED, Directive.GO_ON),
        (grpc.StatusCode.PERMISSION_DENIED, Directive.GO_ON),
    ],
)
def test_a_refusal_is_final(
    service: ScriptedRunService, code: grpc.StatusCode, directive: Directive
) -> None:
    service.refusal = code
    reporter = reporter_to(service)
    reporter.close()
    assert reporter.directive() is directive
    assert len(service.tokens) == 1


def test_closing_waits_no_longer_than_it_must_for_a_service_that_is_away(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CLOSE_S", 0.3)
    service.refusal = grpc.StatusCode.UNAVAILABLE
    reporter = reporter_to(service)
    reporter.point(point(1))
    reporter.close()
    assert len(service.tokens) >= 1
    assert not service.entries
    # Given up is given up: no thread goes on trying.
    wait_until(lambda: not any(t.name == "report" for t in threading.enumerate()))


def test_closing_goes_on_while_a_slow_service_takes_what_is_left(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CLOSE_S", 1.5)
    monkeypatch.setattr(report, "MAX_BATCH", 2)
    service.delay_s = 0.4
    reporter = reporter_to(service)
    for step in range(1, 13):
        reporter.point(point(step))
    reporter.close()
    assert numbers(service) == list(range(1, 13))


def test_memory_is_bounded_and_events_stay(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_WAITING", 10)
    monkeypatch.setattr(report, "ANSWER_S", 0.2)
    service.silent.set()
    reporter = reporter_to(service)
    for step in range(1, 31):
        if step % 10 == 5:
            reporter.event(Warned(step, f"at {step}"))
        else:
            reporter.point(point(step))
    service.silent.clear()
    reporter._closing.set()
    service.wait_for(lambda: service.heard() == 30)
    reporter.close()
    kept = [entry.point.step for entry in service.entries if entry.HasField("point")]
    assert len(kept) <= 7  # with three events: ten
    assert kept[-3:] == [28, 29, 30], "the newest are whole"
    assert kept == sorted(kept)
    told = [e.event.message for e in service.entries if e.event.kind == pb.EVENT_KIND_WARNING]
    assert told == ["at 5", "at 15", "at 25"]
    sequence = [entry.sequence for entry in service.entries]
    assert sequence == sorted(set(sequence)), "each once, in order"


def test_a_long_outage_keeps_no_more_than_the_bound(
    service: ScriptedRunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_WAITING", 100)
    monkeypatch.setattr(report, "ANSWER_S", 0.2)
    service.silent.set()
    reporter = reporter_to(service)
    most = 0
    for step in range(1, 5001):
        reporter.point(point(step))
        most = max(most, len(reporter._waiting))
    assert most <= 100
    service.silent.clear()
    reporter.close()
    assert service.heard() == 5000
    assert not reporter._waiting, "what was dropped is not waited for"
    assert numbers(service)[-50:] == list(range(4951, 5001)), "the newest are whole"


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION]
)
def test_nothing_is_kept_for_a_service_that_refused_us_for_good(
    service: ScriptedRunService, code: grpc.StatusCode
) -> None:
    service.refusal = code
    reporter = reporter_to(service)
    reporter.point(point(1))
    reporter._thread.join(WAIT_S)
    assert not reporter._thread.is_alive()
    for step in range(2, 100):
        reporter.point(point(step))
    assert len(reporter._waiting) == 0


@pytest.mark.parametrize(
    ("event", "kind", "step"),
    [
        (ValuesInForce(8, GROUPS, CPU), pb.EVENT_KIND_VALUES_IN_FORCE, 8),
        (CheckpointCommitted(REF, 100, 1.5, 0.5), pb.EVENT_KIND_CHECKPOINT_COMMITTED, 8),
        (CheckpointPassedOver(REF, "torn"), pb.EVENT_KIND_CHECKPOINT_FALLBACK, 8),
        (Evaluated(8, 1.25, "E"), pb.EVENT_KIND_EVALUATED, 8),
        (Sampled(8, "The end"), pb.EVENT_KIND_SAMPLED, 8),
        (Warned(8, "careful"), pb.EVENT_KIND_WARNING, 8),
    ],
)
def test_every_event_has_its_form_on_the_wire(event: Event, kind: Any, step: int) -> None:
    message = event_to_proto(event)
    assert (message.kind, message.step) == (kind, step)
    assert message.message


def test_what_the_job_runs_on_and_what_was_free_travel_with_the_values_in_force() -> None:
    device = event_to_proto(ValuesInForce(8, GROUPS, CPU)).device
    assert (device.name, device.memory_bytes, device.free_bytes) == ("cpu", 2000, 1000)
    assert not event_to_proto(ValuesInForce(8, GROUPS)).HasField("device")


def test_seconds_that_stopped_training_are_on_the_wire() -> None:
    assert event_to_proto(Evaluated(8, 1.25, "E", 3.5)).evaluation_s == 3.5
    assert event_to_proto(Sampled(8, "The end", 2.5)).evaluation_s == 2.5
    assert point_to_proto(replace(point(9), checkpoint_s=0.5)).checkpoint_s == 0.5


def test_a_share_of_the_peak_is_on_the_wire_only_where_the_peak_is_known() -> None:
    assert not point_to_proto(point(9)).HasField("mfu_ratio")
    assert point_to_proto(replace(point(9), mfu_ratio=0.5)).mfu_ratio == 0.5


def test_a_point_on_the_wire_is_the_same_to_the_last_bit() -> None:
    message = point_to_proto(point(9))
    assert (message.loss, message.loss_smoothed, message.tokens) == (2.5, 2.6, 9 * 512)
    (values,) = message.groups
    assert (values.group, values.learning_rate, values.momentum) == ("wte", 0.1, 0.8)
