"""Every Prometheus metric that the service exports: one object, its registry handed in.

Names: everstep_<what>_<base unit>, _total on counters only. A job's series carry job_id and
job_name (`job` is Prometheus's own), and are dropped some minutes after the job's end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from everstep.v1 import everstep_pb2 as pb
from service.jobs import Job, JobView
from trainer.contract.states import JobState

JOB = ("job_id", "job_name")
FORGET_AFTER_S = 300.0
STEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
RPC_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60)


class Metrics:
    """Set and counted by whoever knows; read by a scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = JOB) -> Gauge:
            return Gauge(f"everstep_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = JOB) -> Counter:
            return Counter(f"everstep_{name}", text, labels, registry=registry)

        self.train_loss = gauge("train_loss", "Mean cross entropy of the last step, nats a token.")
        self.train_loss_smoothed = gauge("train_loss_smoothed", "Its moving average.")
        self.validation_bpb = gauge("validation_bits_per_byte", "Last validation figure.")
        by_group = (*JOB, "group")
        self.learning_rate = gauge("learning_rate", "Rate in force, by group.", by_group)
        self.momentum = gauge("momentum", "Momentum in force, by group.", by_group)
        self.weight_decay = gauge("weight_decay", "Decay in force, by group.", by_group)
        self.gradient_norm = gauge("gradient_norm", "Whole gradient's norm before clipping.")
        self.step = gauge("step", "Optimizer steps behind the weights.")
        self.tokens_per_second = gauge("tokens_per_second", "Throughput of the last step.")
        self.mfu = gauge("mfu_ratio", "Share of the device's peak, where it is known.")
        self.step_seconds = Histogram(
            "everstep_step_seconds",
            "Wall time of a step.",
            JOB,
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.tokens = counter("tokens_total", "Tokens trained.")
        self.data_wait = counter("data_wait_seconds_total", "Time that steps waited for data.")
        self.checkpoint_committed = gauge(
            "checkpoint_last_committed_timestamp_seconds",
            "When the newest checkpoint was committed.",
        )
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the newest checkpoint.")
        self.checkpoint_seconds = gauge("checkpoint_save_seconds", "Its background save.")
        self.checkpoint_stall = counter(
            "checkpoint_stall_seconds_total", "Time that training stopped for checkpoints."
        )
        self.checkpoint_postponed = counter(
            "checkpoint_postponed_seconds_total",
            "Time that due checkpoints waited for memory: back-pressure of disk or store.",
        )
        self.restarts = counter("restarts_total", "New attempts, by cause.", (*JOB, "cause"))
        by_gpu = (*JOB, "gpu")
        self.gpu_memory_used = gauge("gpu_memory_used_bytes", "In use on the GPU.", by_gpu)
        self.gpu_memory_total = gauge("gpu_memory_total_bytes", "Memory of the GPU.", by_gpu)
        self.gpu_utilization = gauge("gpu_utilization_ratio", "Time with a kernel.", by_gpu)
        self.gpu_power = gauge("gpu_power_watts", "Drawn by the GPU.", by_gpu)
        self.gpu_temperature = gauge("gpu_temperature_celsius", "Of the GPU's core.", by_gpu)
        self.gpu_energy = counter("gpu_energy_joules_total", "Used by the GPU.", by_gpu)
        self._energy: dict[tuple[str, int], float] = {}  # job and GPU -> of its attempt so far
        self.stopping = gauge("stopping", "1 while the service checkpoints and stops.", ())
        self.queue_wait = Histogram(
            "everstep_queue_wait_seconds", "From submission to training.", registry=registry,
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3600, 36_000),
        )  # fmt: skip
        self.cluster_up = gauge("cluster_up", "1 while Ray answers.", ())
        self.rpc_seconds = Histogram(
            "everstep_rpc_seconds", "Latency of unary calls.", ("method", "code"),
            buckets=RPC_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.rpcs = counter("rpcs_total", "Calls answered.", ("method", "code"))
        self._states = _JobStates()
        registry.register(self._states)
        self._of_jobs = [
            metric for metric in vars(self).values()
            if isinstance(metric, Gauge | Counter | Histogram)
            and metric._labelnames[:2] == JOB
        ]  # fmt: skip

    def set_states(self, counts: dict[JobState, int]) -> None:
        """How many jobs are in each state."""
        self._states.counts = counts

    def observe_point(self, job: Job, point: pb.MetricPoint) -> None:
        """What a step measured."""
        labels = {"job_id": job.id, "job_name": job.spec.name}
        self.step.labels(**labels).set(point.step)
        self.train_loss.labels(**labels).set(point.loss)
        self.train_loss_smoothed.labels(**labels).set(point.loss_smoothed)
        self.gradient_norm.labels(**labels).set(point.gradient_norm)
        self.tokens_per_second.labels(**labels).set(point.tokens_per_s)
        self.step_seconds.labels(**labels).observe(point.step_s)
        self.tokens.labels(**labels).inc(job.spec.batch.total_batch_size)
        self.data_wait.labels(**labels).inc(point.data_wait_s)
        if point.HasField("mfu_ratio"):
            self.mfu.labels(**labels).set(point.mfu_ratio)
        for values in point.groups:
            group = {**labels, "group": values.group}
            self.learning_rate.labels(**group).set(values.learning_rate)
            self.momentum.labels(**group).set(values.momentum)
            self.weight_decay.labels(**group).set(values.weight_decay)

        for sample in point.devices:
            self._observe_gpu(job.id, {**labels, "gpu": str(sample.index)}, sample)

    def _observe_gpu(self, job_id: str, labels: dict[str, str], sample: pb.DeviceSample) -> None:
        self.gpu_memory_used.labels(**labels).set(sample.memory_used_bytes)
        self.gpu_memory_total.labels(**labels).set(sample.memory_total_bytes)
        for metric, field in (
            (self.gpu_utilization, "utilization_ratio"),
            (self.gpu_power, "power_watts"),
            (self.gpu_temperature, "temperature_celsius"),
        ):
            if sample.HasField(field):
                metric.labels(**labels).set(getattr(sample, field))
        if sample.HasField("energy_joules"):
            before = self._energy.get((job_id, sample.index), 0.0)
            # A new attempt counts from 0 again.
            grown = sample.energy_joules - (before if before <= sample.energy_joules else 0.0)
            self.gpu_energy.labels(**labels).inc(grown)
            self._energy[job_id, sample.index] = sample.energy_joules

    def observe_event(self, job: Job, event: pb.Event, at: float) -> None:
        """What an attempt says happened."""
        labels = {"job_id": job.id, "job_name": job.spec.name}
        match event.kind:
            case pb.EVENT_KIND_EVALUATED:
                self.validation_bpb.labels(**labels).set(event.validation_bpb)
            case pb.EVENT_KIND_CHECKPOINT_COMMITTED:
                self.checkpoint_committed.labels(**labels).set(at)
                self.checkpoint_bytes.labels(**labels).set(event.checkpoint_bytes)
                self.checkpoint_seconds.labels(**labels).set(event.checkpoint_s)
                self.checkpoint_stall.labels(**labels).inc(event.checkpoint_stall_s)
                self.checkpoint_postponed.labels(**labels).inc(event.checkpoint_postponed_s)

    def restore(self, view: JobView) -> None:
        """What a service that has just started knows of a job: alerts must not wait for news."""
        labels = {"job_id": view.job.id, "job_name": view.job.spec.name}
        self.step.labels(**labels).set(view.progress.step)
        if view.progress.checkpoint_at is not None:
            self.checkpoint_committed.labels(**labels).set(view.progress.checkpoint_at)
        if view.progress.validation_bpb is not None:
            self.validation_bpb.labels(**labels).set(view.progress.validation_bpb)

    def observe_running(self, job: Job) -> None:
        """A job trains for the first time."""
        self.queue_wait.observe(max(time.time() - job.created_at, 0.0))

    def forget_later(self, job_id: str) -> None:
        """Drop a final job's series once its last values were surely scraped."""
        asyncio.get_running_loop().call_later(FORGET_AFTER_S, self.forget, job_id)

    def forget(self, job_id: str) -> None:
        """Drop a job's series."""
        for metric in self._of_jobs:
            metric.remove_by_labels({"job_id": job_id})
        self._energy = {key: value for key, value in self._energy.items() if key[0] != job_id}


class _JobStates(Collector):
    """Jobs by state, whole at every scrape."""

    def __init__(self) -> None:
        self.counts: dict[JobState, int] = {}

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("everstep_jobs", "Jobs by state.", labels=["state"])
        for state in JobState:
            family.add_metric([state.value.lower()], self.counts.get(state, 0))
        yield family
