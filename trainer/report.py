"""The only module that speaks gRPC to the service: events and points up, directives down.

A thread sends what has gathered twice a second, off the step's path, and keeps what isn't yet
acknowledged; after a broken connection it connects again and sends from there.

Invariant: memory is bounded: past MAX_WAITING entries older points are dropped, events stay; and
nothing is kept that nobody will ever hear, once the service has refused us for good.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict

import grpc

from everstep.v1 import everstep_pb2 as pb
from everstep.v1 import everstep_pb2_grpc as rpc
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

FLUSH_S = 0.5
MAX_BATCH = 500
MAX_WAITING = 50_000  # about a day of one-second steps is 86,400 points of 1 kB
RECONNECT_S = (0.2, 0.5, 1.0, 2.0, 5.0)
CLOSE_S = 15.0
ANSWER_S = 30.0  # a service that takes longer to answer is taken for gone
OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),  # what http_proxy names is for the world, not for our service
]
log = logging.getLogger(__name__)

DIRECTIVES = {
    pb.DIRECTIVE_UNSPECIFIED: Directive.GO_ON,
    pb.DIRECTIVE_CHECKPOINT: Directive.CHECKPOINT,
    pb.DIRECTIVE_STOP: Directive.STOP,
}


class ServiceReporter:
    """A Reporter that tells the service. Never blocks but in close."""

    def __init__(self, address: str, ca: str | None, credential: str, hello: pb.Hello) -> None:
        """ca: the certificates that vouch for the service, PEM; None: plaintext."""
        self._address = address
        self._ca = ca
        self._credential = credential
        self._hello = hello
        self._lock = threading.Lock()
        self._waiting: deque[pb.ReportEntry] = deque()
        self._sequence = 0
        self._directive = Directive.GO_ON
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)
        self._thread.start()

    def point(self, point: Point) -> None:
        """See Reporter."""
        self._add(pb.ReportEntry(point=point_to_proto(point)))

    def event(self, event: Event) -> None:
        """See Reporter."""
        self._add(pb.ReportEntry(event=event_to_proto(event)))

    def directive(self) -> Directive:
        """See Reporter."""
        found = self._directive
        if found is Directive.CHECKPOINT:
            self._directive = Directive.GO_ON
        return found

    def close(self) -> None:
        """Deliver what is left; a service that takes nothing for CLOSE_S is given up."""
        self._closing.set()
        left = -1
        while self._thread.is_alive() and left != len(self._waiting):
            left = len(self._waiting)
            self._thread.join(CLOSE_S)
        self._given_up.set()

    def _add(self, entry: pb.ReportEntry) -> None:
        entry.time.FromNanoseconds(time.time_ns())
        with self._lock:
            if self._given_up.is_set():
                return
            self._sequence += 1
            entry.sequence = self._sequence
            self._waiting.append(entry)
            if len(self._waiting) > MAX_WAITING:
                self._thin_out()

    def _thin_out(self) -> None:
        """Drop every second of the older points; what stays keeps its number, with gaps between."""
        points = [entry.sequence for entry in self._waiting if entry.HasField("point")]
        dropped = set(points[: max(len(points) // 2, 1) : 2])
        self._waiting = deque(each for each in self._waiting if each.sequence not in dropped)

    def _run(self) -> None:
        failures = 0
        while True:
            try:
                with self._channel() as channel:
                    self._talk(channel)
                return
            except grpc.RpcError as error:
                if self._gave_up(error):
                    with self._lock:
                        self._given_up.set()
                        self._waiting.clear()
                    return
            except TimeoutError:
                log.warning("the service does not answer; connecting again")
            pause_s = RECONNECT_S[min(failures, len(RECONNECT_S) - 1)]
            failures += 1
            # Closing: try again soon, until close gives up.
            if self._closing.wait(pause_s) and self._given_up.wait(RECONNECT_S[0]):
                return

    def _gave_up(self, error: grpc.RpcError) -> bool:
        """A refusal is final: this attempt is stale, or not the service's own."""
        code = error.code() if isinstance(error, grpc.Call) else None
        if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
            self._directive = Directive.STOP
            return True
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            log.error("the service refuses our credential; training goes on untold")
            return True
        return False

    def _channel(self) -> grpc.Channel:
        if self._ca is None:
            return grpc.insecure_channel(self._address, options=OPTIONS)
        trusted = grpc.ssl_channel_credentials(self._ca.encode())
        return grpc.secure_channel(self._address, trusted, options=OPTIONS)

    def _talk(self, channel: grpc.Channel) -> None:
        """One stream, a request and its answer in turn, until closed and all is delivered."""
        outgoing: queue.SimpleQueue[pb.ReportRequest | None] = queue.SimpleQueue()
        metadata = (("authorization", f"Bearer {self._credential}"),)
        call = rpc.RunServiceStub(channel).Report(iter(outgoing.get, None), metadata=metadata)
        try:
            outgoing.put(pb.ReportRequest(hello=self._hello))
            answers = _answers(call)
            self._hear(next(answers))
            while True:
                closing = self._closing.wait(FLUSH_S)
                while True:
                    batch = self._batch()
                    outgoing.put(pb.ReportRequest(entries=batch))
                    self._hear(next(answers))
                    if len(batch) < MAX_BATCH:
                        break
                if closing and not self._batch():
                    return
        finally:
            outgoing.put(None)
            call.cancel()

    def _batch(self) -> list[pb.ReportEntry]:
        with self._lock:
            return [self._waiting[i] for i in range(min(MAX_BATCH, len(self._waiting)))]

    def _hear(self, answer: pb.ReportResponse) -> None:
        with self._lock:
            while self._waiting and self._waiting[0].sequence <= answer.acknowledged_sequence:
                self._waiting.popleft()
        told = DIRECTIVES.get(answer.directive, Directive.GO_ON)
        # A checkpoint is asked for in one answer; it stays asked for until the loop has heard it.
        if told is not Directive.GO_ON or self._directive is not Directive.CHECKPOINT:
            self._directive = told


def _answers(call: Iterator[pb.ReportResponse]) -> Iterator[pb.ReportResponse]:
    """The call's answers, each waited for at most ANSWER_S."""
    found: queue.SimpleQueue[pb.ReportResponse | BaseException] = queue.SimpleQueue()

    def pull() -> None:
        try:
            for answer in call:
                found.put(answer)
            found.put(TimeoutError("the service ended the stream"))
        except BaseException as error:  # carried to the talking thread
            found.put(error)

    threading.Thread(target=pull, name="report-answers", daemon=True).start()
    while True:
        try:
            item = found.get(timeout=ANSWER_S)
        except queue.Empty:
            raise TimeoutError("no answer") from None
        if isinstance(item, BaseException):
            raise item
        yield item


def point_line(point: Point) -> str:
    """A step in one line of text."""
    return (
        f"step {point.step}  loss {point.loss:.4f}  norm {point.gradient_norm:.3f}  "
        f"{point.tokens_per_s:,.0f} tokens/s"
    )


def _device(device: Device) -> pb.DeviceInfo:
    return pb.DeviceInfo(
        name=device.name, memory_bytes=device.memory_bytes, free_bytes=device.free_bytes
    )


def point_to_proto(point: Point) -> pb.MetricPoint:
    """A point on the wire."""
    message = pb.MetricPoint(
        step=point.step,
        loss=point.loss,
        loss_smoothed=point.loss_smoothed,
        gradient_norm=point.gradient_norm,
        step_s=point.step_s,
        data_wait_s=point.data_wait_s,
        tokens=point.tokens,
        tokens_per_s=point.tokens_per_s,
        mfu_ratio=point.mfu_ratio,
        checkpoint_s=point.checkpoint_s,
        groups=[_values(group, values) for group, values in point.groups.items()],
        devices=[pb.DeviceSample(**asdict(sample)) for sample in point.devices],
        rank_busy_s=point.rank_busy_s if len(point.rank_busy_s) > 1 else (),
    )
    message.time.FromNanoseconds(time.time_ns())
    return message


def event_to_proto(event: Event) -> pb.Event:
    """An event on the wire."""
    match event:
        case ValuesInForce(step, groups, device):
            return pb.Event(
                kind=pb.EVENT_KIND_VALUES_IN_FORCE,
                message="read back from the optimizer at the attempt's first step",
                step=step,
                groups=[_values(group, values) for group, values in groups.items()],
                device=_device(device) if device is not None else None,
            )
        case CheckpointCommitted(ref, size_bytes, save_s, stall_s, postponed_s):
            return pb.Event(
                kind=pb.EVENT_KIND_CHECKPOINT_COMMITTED,
                message=f"checkpoint {ref} committed",
                step=ref.step,
                checkpoint=pb.CheckpointRef(**ref.model_dump()),
                checkpoint_bytes=size_bytes,
                checkpoint_s=save_s,
                checkpoint_stall_s=stall_s,
                checkpoint_postponed_s=postponed_s,
            )
        case CheckpointPassedOver(ref, reason):
            return pb.Event(
                kind=pb.EVENT_KIND_CHECKPOINT_FALLBACK,
                message=f"checkpoint {ref} can't be used: {reason}",
                step=ref.step,
                checkpoint=pb.CheckpointRef(**ref.model_dump()),
            )
        case Evaluated(step, bits_per_byte, evaluation_set, took_s):
            return pb.Event(
                kind=pb.EVENT_KIND_EVALUATED,
                message=f"validation {bits_per_byte:.4f} bits per byte",
                step=step,
                validation_bpb=bits_per_byte,
                evaluation_set=evaluation_set,
                evaluation_s=took_s,
            )
        case Sampled(step, text, took_s):
            return pb.Event(
                kind=pb.EVENT_KIND_SAMPLED, message=text, step=step, evaluation_s=took_s
            )
        case Warned(step, message):
            return pb.Event(kind=pb.EVENT_KIND_WARNING, message=message, step=step)


def _values(group: str, values: GroupValues) -> pb.GroupValues:
    return pb.GroupValues(
        group=group,
        learning_rate=values.lr,
        momentum=values.momentum,
        weight_decay=values.weight_decay,
    )


class PrintingReporter:
    """A Reporter for a run without a service: lines of text, and a stop flag of the caller's."""

    def __init__(self, say: Callable[[str], None], stop: threading.Event) -> None:
        self._say = say
        self._stop = stop

    def point(self, point: Point) -> None:
        """See Reporter."""
        self._say(point_line(point))

    def event(self, event: Event) -> None:
        """See Reporter."""
        self._say(event_to_proto(event).message)

    def directive(self) -> Directive:
        """See Reporter."""
        return Directive.STOP if self._stop.is_set() else Directive.GO_ON

    def close(self) -> None:
        """Nothing is held back."""
        with contextlib.suppress(ValueError):
            self._say("done")
