"""Every Prometheus metric that the service exports: one object, its registry handed in.

Names: everstep_<what>_<base unit>, _total on counters only. A job's series carry job_id and
job_name (`job` is Prometheus's own), and are dropped some minutes after the job's end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from everstep.v1 import everstep_pb2 as pb
from service.jobs import Job, JobView
from trainer.contract.outcome import Outcome
from trainer.contract.states import JobState

JOB = ("job_id", "job_name")
FORGET_AFTER_S = 300.0
STEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
RPC_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60)


@dataclass(frozen=True)
class Description:
    """What docs/metrics.md says of a metric."""

    name: str
    type: str
    labels: tuple[str, ...]
    text: str
    kept: bool  # a service that starts again goes on with it


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
        self.workers = gauge("job_workers", "Workers in force; 0 while it holds none.")
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
        self.rank_busy = gauge(
            "rank_busy_seconds",
            "A rank's own work on a step, waits for other ranks left out; several workers only.",
            (*JOB, "rank"),
        )
        self.checkpoint_committed = gauge(
            "checkpoint_last_committed_timestamp_seconds", "When the newest one was committed."
        )
        self.attempt_started = gauge("attempt_started_timestamp_seconds", "Of the newest attempt.")
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the newest checkpoint.")
        self.checkpoint_seconds = gauge("checkpoint_save_seconds", "Its background save.")
        by_gpu = (*JOB, "gpu")
        self.gpu_memory_used = gauge("gpu_memory_used_bytes", "In use on the GPU.", by_gpu)
        self.gpu_memory_total = gauge("gpu_memory_total_bytes", "Memory of the GPU.", by_gpu)
        self.gpu_utilization = gauge("gpu_utilization_ratio", "Time with a kernel.", by_gpu)
        self.gpu_power = gauge("gpu_power_watts", "Drawn by the GPU.", by_gpu)
        self.gpu_temperature = gauge("gpu_temperature_celsius", "Of the GPU's core.", by_gpu)
        self.gpu_throttled = gauge(
            "gpu_throttled", "1 while heat or a power fault holds its clocks down.", by_gpu
        )
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
        # By job: the node that its rank 0 is on, and what GPUs there said last. Not exported.
        self.samples: dict[str, tuple[str, Sequence[pb.DeviceSample]]] = {}
        self._states = _JobStates()
        registry.register(self._states)
        self._accounts = _Accounts()
        registry.register(self._accounts)
        # Job id and label -> the ranks or GPUs that have series.
        self._numbered: dict[tuple[str, str], set[int]] = {}
        self._of_jobs = [
            metric for metric in vars(self).values()
            if isinstance(metric, Gauge | Counter | Histogram)
            and metric._labelnames[:2] == JOB
        ]  # fmt: skip

    def set_states(self, counts: dict[JobState, int]) -> None:
        """How many jobs are in each state."""
        self._states.counts = counts

    @property
    def accounted(self) -> list[str]:
        """Ids of the jobs whose accounts are shown."""
        return list(self._accounts.shown)

    def set_accounts(self, accounts: Iterable[JobView]) -> None:
        """What the store adds up; a final job that was dropped meanwhile stays out."""
        shown, jobs = self._accounts.shown, {each.job.id: each for each in accounts}
        shown |= {i: each for i, each in jobs.items() if i in shown or not each.job.is_final}

    def observe_point(self, job: Job, point: pb.MetricPoint, node_id: str = "") -> None:
        """What a step measured; node_id: where rank 0 is."""
        if point.devices:
            self.samples[job.id] = (node_id, point.devices)
        labels = {"job_id": job.id, "job_name": job.spec.name}
        self.step_seconds.labels(**labels).observe(point.step_s)
        self._show_point(labels, point)

    def _show_point(self, labels: dict[str, str], point: pb.MetricPoint) -> None:
        self.step.labels(**labels).set(point.step)
        self.train_loss.labels(**labels).set(point.loss)
        self.train_loss_smoothed.labels(**labels).set(point.loss_smoothed)
        self.gradient_norm.labels(**labels).set(point.gradient_norm)
        self.tokens_per_second.labels(**labels).set(point.tokens_per_s)
        if point.HasField("mfu_ratio"):
            self.mfu.labels(**labels).set(point.mfu_ratio)
        for values in point.groups:
            group = {**labels, "group": values.group}
            self.learning_rate.labels(**group).set(values.learning_rate)
            self.momentum.labels(**group).set(values.momentum)
            self.weight_decay.labels(**group).set(values.weight_decay)
        self._keep_only(labels["job_id"], "rank", range(len(point.rank_busy_s)))
        for rank, busy_s in enumerate(point.rank_busy_s):
            self.rank_busy.labels(**labels, rank=str(rank)).set(busy_s)
        if point.devices:
            self._keep_only(labels["job_id"], "gpu", (each.index for each in point.devices))
        for sample in point.devices:
            self._show_gpu({**labels, "gpu": str(sample.index)}, sample)

    def _keep_only(self, job_id: str, label: str, numbers: Iterable[int]) -> None:
        """Drop a job's series by this label if others than these had any: it was resized, or moved.

        The caller sets those that are kept at once.
        """
        here = set(numbers)
        if self._numbered.setdefault((job_id, label), here) != here:
            self._numbered[job_id, label] = here
            for metric in self._of_jobs:
                if label in metric._labelnames:
                    metric.remove_by_labels({"job_id": job_id})

    def _show_gpu(self, labels: dict[str, str], sample: pb.DeviceSample) -> None:
        self.gpu_memory_used.labels(**labels).set(sample.memory_used_bytes)
        self.gpu_memory_total.labels(**labels).set(sample.memory_total_bytes)
        for metric, field in (
            (self.gpu_utilization, "utilization_ratio"),
            (self.gpu_power, "power_watts"),
            (self.gpu_temperature, "temperature_celsius"),
            (self.gpu_throttled, "throttled"),
        ):
            if sample.HasField(field):
                metric.labels(**labels).set(getattr(sample, field))

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

    def observe_end(self, job: Job, outcome: str) -> None:
        """An attempt ended. A step that is not finite is no point: this alone tells of it."""
        if outcome == Outcome.NOT_FINITE:
            self.train_loss.labels(job_id=job.id, job_name=job.spec.name).set(math.nan)

    def restore(self, view: JobView) -> None:
        """What a service that has just started knows of a job: alerts must not wait for news."""
        labels = {"job_id": view.job.id, "job_name": view.job.spec.name}
        if view.progress.latest_point is not None:
            self._show_point(labels, pb.MetricPoint.FromString(view.progress.latest_point))
        self.step.labels(**labels).set(view.progress.step)
        self.observe_workers(view.job)
        self.observe_attempt(view)
        if view.progress.checkpoint_at is not None:
            self.checkpoint_committed.labels(**labels).set(view.progress.checkpoint_at)
        if view.progress.validation_bpb is not None:
            self.validation_bpb.labels(**labels).set(view.progress.validation_bpb)

    def observe_workers(self, job: Job) -> None:
        """How many workers a job holds."""
        labels = {"job_id": job.id, "job_name": job.spec.name}
        self.workers.labels(**labels).set(len(job.placement))

    def observe_attempt(self, view: JobView) -> None:
        """When a job began to train, or did so again."""
        if view.attempts:
            labels = {"job_id": view.job.id, "job_name": view.job.spec.name}
            self.attempt_started.labels(**labels).set(view.attempts[0].started_at)

    def observe_running(self, job: Job) -> None:
        """A job trains for the first time."""
        self.queue_wait.observe(max(time.time() - job.created_at, 0.0))

    def descriptions(self) -> list[Description]:
        """All that is exported, by name."""
        found = []
        for metric in vars(self).values():
            if isinstance(metric, Gauge | Counter | Histogram):
                of = (metric._name, metric._type, tuple(metric._labelnames), metric._documentation)
                found.append(Description(*of, kept=False))
            elif isinstance(metric, _JobStates | _Accounts):
                for each in metric.collect():
                    labels = tuple(each._labelnames)  # type: ignore[attr-defined] # of families
                    of = (each.name, each.type, labels, each.documentation)
                    found.append(Description(*of, kept=True))
        return sorted(found, key=lambda each: each.name)

    def forget_later(self, job_id: str) -> None:
        """Drop a final job's series once its last values were surely scraped."""
        asyncio.get_running_loop().call_later(FORGET_AFTER_S, self.forget, job_id)

    def forget(self, job_id: str) -> None:
        """Drop a job's series."""
        for metric in self._of_jobs:
            metric.remove_by_labels({"job_id": job_id})
        self._accounts.shown.pop(job_id, None)
        self._accounts.told.pop(job_id, None)
        self._numbered = {key: of for key, of in self._numbered.items() if key[0] != job_id}
        self.samples.pop(job_id, None)


class _JobStates(Collector):
    """Jobs by state, whole at every scrape."""

    def __init__(self) -> None:
        self.counts: dict[JobState, int] = {}

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("everstep_jobs", "Jobs by state.", labels=["state"])
        for state in JobState:
            family.add_metric([state.value.lower()], self.counts.get(state, 0))
        yield family


class _Accounts(Collector):
    """What the store adds up for each job: counters that a service that restarts goes on with."""

    COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "goodput_seconds": ("Seconds since its submission, each in one kind.", ("kind",)),
        "tokens": ("Tokens trained, those trained again too.", ()),
        "data_wait_seconds": ("Time that steps waited for data.", ()),
        "checkpoint_stall_seconds": ("Time that training stopped for checkpoints.", ()),
        "checkpoint_postponed_seconds": (
            "Time that due checkpoints waited for memory: back-pressure of disk or store.",
            (),
        ),
        "restarts": ("Attempts that were lost, by cause.", ("cause",)),
        "gpu_energy_joules": ("Used by the GPU, over all attempts.", ("gpu",)),
    }

    def __init__(self) -> None:
        self.shown: dict[str, JobView] = {}
        # job id -> seconds by kind at the last scrape: an account that is a moment old says too
        # much of a wait that has ended since, and a counter must not go back.
        self.told: dict[str, dict[str, float]] = {}

    def collect(self) -> Iterable[Metric]:
        families = {
            name: CounterMetricFamily(f"everstep_{name}", text, labels=(*JOB, *labels))
            for name, (text, labels) in self.COUNTERS.items()
        }
        ratio = GaugeMetricFamily(
            "everstep_goodput_ratio",
            "Productive seconds of those in which it held resources.",
            labels=JOB,
        )
        now = time.time()
        for account in list(self.shown.values()):  # a scrape has a thread of its own
            job, ledger = account.job, account.progress.ledger
            assert ledger is not None, "the store gives no others"
            of = (job.id, job.spec.name)
            told = self.told.setdefault(job.id, {})
            for kind, seconds in ledger.at(now).items():
                seconds = told[kind] = max(seconds, told.get(kind, 0.0))
                families["goodput_seconds"].add_metric((*of, kind), seconds)
            families["tokens"].add_metric(of, ledger.steps * job.spec.batch.total_batch_size)
            families["data_wait_seconds"].add_metric(of, ledger.seconds["data"])
            families["checkpoint_stall_seconds"].add_metric(of, ledger.stalled_s)
            families["checkpoint_postponed_seconds"].add_metric(of, ledger.postponed_s)
            for cause, count in ledger.restarts.items():
                families["restarts"].add_metric((*of, cause), count)
            for gpu, (joules, _) in ledger.joules.items():
                families["gpu_energy_joules"].add_metric((*of, gpu), joules)
            if ledger.ratio is not None:
                ratio.add_metric(of, ledger.ratio)
        yield from (*families.values(), ratio)
