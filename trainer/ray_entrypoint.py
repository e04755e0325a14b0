"""The only module of trainer/ that knows Ray: the host of a job's attempts, and its workers.

AttemptHost is a detached actor: it outlives the service, runs one fit() after another until the job
is done or can't go on, and remembers how each ended. It knows nothing of the job but what a worker
tells it; workers read the spec from storage.

Invariant: fit() never retries by itself (max_failures=0), so each fit() is one attempt.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.contract.memory import ALLOCATOR
from trainer.contract.outcome import AttemptResult, Outcome, Policy, pause_before_restart

ABORT_TIMEOUT_S = 4.0
COLLECTIVE_TIMEOUT_S = 900  # ranks may wait for one another's data, compilation or last save
LEAVE_TIMEOUT_S = 30.0
WORD_TIMEOUT_S = 10.0  # of a rank's word to the host, when the rank may be about to end
# Read when a worker loads torch. Threads that wait spin for some 20 us: if they slept at once, each
# of a step's thousands of parallel loops would wait to be woken, a sixth of the time; if they spun
# as long as libgomp lets them, a step beside other work would take three to five times as long
# (docs/log.md). The allocator's word is read once, and ranks that meet on CUDA allocate before the
# attempt has set up anything.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
    "PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR,
}
OUTPUT = (1, 2)  # of a worker: Ray gives each process files of its own
NODE_LABEL = "ray.io/node-id"  # Ray's own, on every node
CARD = "accelerator_type:"  # how Ray names a node's resource for the type of its cards
# Set where Ray starts a process for us; read by Ray Train itself. A worker that only doesn't answer
# is stopped, not dead (Ray would give it 10 minutes): a week. The watchdog ends one that hangs.
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "604800",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostConfig:
    """All that a host is told. host_key: see trainer.contract.credential.

    placement: Ray's id of each worker's node.
    earlier_ends: of attempts on hosts before this one, which the budget of restarts counts too.
    """

    job_id: str
    host_number: int
    storage_uri: str
    cache_dir: str
    service_address: str
    service_ca: str | None
    host_key: str
    placement: tuple[str, ...]
    gpus_per_worker: int
    cpus_per_worker: int
    stall_floor_s: float
    earlier_ends: tuple[float, ...] = ()


class AttemptHost:
    """Runs attempts until one ends the job. Methods may be called from any thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        os.environ.update(RAY_TRAIN_SETTINGS)
        logging.basicConfig(level=logging.INFO)  # into Ray's log of this actor
        self._config = HostConfig(**config)
        self._lock = threading.Lock()
        self._results: list[AttemptResult] = []
        self._reported: AttemptResult | None = None
        self._claimed = 0
        self._stacks: dict[int, str] = {}
        self._finished = False
        self._budget_spent = False
        self._stop = threading.Event()
        self._controller: Any = None
        self._thread = threading.Thread(target=self._run, name="attempts", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        """Whether the host is done, and how its attempts ended."""
        with self._lock:
            return {
                "finished": self._finished,
                "budget_spent": self._budget_spent,
                "results": [_plain(result) for result in self._results],
            }

    def stop(self) -> None:
        """Start no further attempt, and give up one that still waits for resources."""
        self._stop.set()

    def stop_wanted(self) -> bool:
        """Asked by the controller before it starts workers."""
        return self._stop.is_set()

    def attempt_claimed(self, number: int) -> None:
        """Rank 0 has claimed an attempt number."""
        with self._lock:
            self._claimed = number

    def attempt_ended(self, result: dict[str, Any]) -> None:
        """A worker says how the attempt ended. The first word counts: others follow from it.

        But a collective that failed has its cause at another rank, which may say so later. A word
        about another attempt than the claimed one is late: its worker outlived it.
        """
        told = AttemptResult.from_dict(result)
        with self._lock:
            said = self._reported
            first = said is None or said.outcome is Outcome.COLLECTIVE_FAILED
            if first and told.attempt in (0, self._claimed):
                self._reported = told

    def stack(self, rank: int, text: str) -> dict[int, str]:
        """Where a rank of an attempt that stands still is; what all of them said so far."""
        with self._lock:
            self._stacks[rank] = text
            return dict(self._stacks)

    def controller_started(self, controller: Any) -> None:
        """Ray's controller of the run introduces itself, so that it can be aborted."""
        self._controller = controller

    def abort(self) -> None:
        """End what runs, without a checkpoint: workers are gone when this returns."""
        import ray

        self._stop.set()
        if self._controller is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._controller.abort.remote(), timeout=ABORT_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            result = replace(self._attempt(), ended_at=time.time())
            with self._lock:
                self._results.append(result)
                pause_s = self._pause(result)
                if pause_s is None:
                    self._finished = True
                    return
            self._stop.wait(pause_s)

    def _pause(self, result: AttemptResult) -> float | None:
        """Seconds before the next attempt; None: there is none, for this host is done."""
        if result.policy is not Policy.RESTART or self._stop.is_set():
            return None
        if not result.counts:
            return 0.0
        own = (each.ended_at for each in self._results if each.counts)
        pause_s = pause_before_restart([*self._config.earlier_ends, *own])
        self._budget_spent = pause_s is None
        return pause_s

    def _attempt(self) -> AttemptResult:
        with self._lock:
            self._reported, self._claimed, self._stacks = None, 0, {}
        failure: BaseException | None = None
        try:
            _fit(self._config)
        except BaseException as error:
            failure = error
        with self._lock:
            if self._reported is not None:
                return self._reported
            unclaimed = self._stop.is_set() and not self._claimed
            return AttemptResult(self._claimed, *_classify(failure, unclaimed), step=0)


def _plain(result: AttemptResult) -> dict[str, Any]:
    return {**result.to_dict(), "outcome": result.outcome.value}


def _classify(failure: BaseException | None, given_up: bool) -> tuple[Outcome, str]:
    """Name an end that no worker explained; given_up: it was told to stop before it claimed."""
    from ray.exceptions import RayError
    from ray.train import ControllerError, WorkerGroupError

    if given_up:
        return Outcome.STOPPED, "stopped before training began"
    match cause := getattr(failure, "cause", failure):  # of what a call to an actor raised
        case None:
            return Outcome.WORKER_LOST, "the workers ended without a word"
        case WorkerGroupError():
            return Outcome.WORKER_LOST, _summary(cause)
        case ControllerError():
            return Outcome.START_TIMEOUT, _summary(cause)
        case RayError() | OSError():  # the cluster's or the box's, not ours
            return Outcome.CONTROLLER_LOST, _summary(cause)
        case _:
            return Outcome.CODE_ERROR, f"{type(cause).__name__}: {_summary(cause)}"


def _summary(error: BaseException) -> str:
    """The error's first lines as one: Ray puts the cause below a headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(error).__name__


def _fit(config: HostConfig) -> None:
    """One attempt. Returns when all workers returned; raises what Ray Train raises."""
    # Ray Train insists on a folder for its own notes on a run; nothing of ours goes through it.
    with tempfile.TemporaryDirectory(prefix="everstep-run-", ignore_cleanup_errors=True) as notes:
        _trainer(config, notes).fit()


def _trainer(config: HostConfig, notes: str) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Run(DataParallelTrainer):  # type: ignore[misc] # untyped
        def _create_default_callbacks(self) -> list[Any]:
            # One starts a process for each attempt, to share out datasets, of which there are none.
            made = super()._create_default_callbacks()
            return [each for each in made if not isinstance(each, DatasetsCallback)]

    host_name = _own_name()
    nodes = ray.nodes()
    use_gpu = config.gpus_per_worker > 0
    backend = _backend(config, nodes)
    told = {"config": asdict(config), "host": host_name, "has_card": backend == "nccl"}
    return Run(
        run_worker,
        train_loop_config=told,
        scaling_config=ScalingConfig(
            num_workers=len(config.placement),
            use_gpu=use_gpu,
            label_selector=[{NODE_LABEL: node} for node in config.placement],
            resources_per_worker={
                "CPU": config.cpus_per_worker,
                **({"GPU": config.gpus_per_worker} if use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=f"{config.job_id}-{config.host_number}-{time.time_ns()}",
            storage_path=notes,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=[_host_callback(host_name)],
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
        backend_config=_process_group(backend),
    )


def _process_group(speaks: str) -> Any:
    """torch's process group of the ranks, as Ray's own TorchConfig makes it.

    With that one host and controller load torch too, one after the other: seconds of each start.
    """
    import ray
    from ray.train._internal.utils import get_address_and_port
    from ray.train.backend import Backend, BackendConfig

    class ProcessGroup(Backend):  # type: ignore[misc] # untyped
        share_cuda_visible_devices = True

        def on_start(self, ranks: Any, _config: Any) -> None:
            told = (len(ranks), *ranks.execute_single(0, get_address_and_port), speaks)
            ray.get([ranks.execute_single_async(n, _join, n, *told) for n in range(len(ranks))])

        def on_shutdown(self, ranks: Any, _config: Any) -> None:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                ray.get(ranks.execute_async(_leave, len(ranks)), timeout=LEAVE_TIMEOUT_S)

    class ProcessGroupConfig(BackendConfig):  # type: ignore[misc] # untyped
        backend_cls = ProcessGroup
        train_func_context = staticmethod(_own_device)

    return ProcessGroupConfig()


def _join(rank: int, size: int, address: str, port: int, speaks: str) -> None:
    """In a rank: meet the others at rank 0's address."""
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(speaks, rank, size, "env://", COLLECTIVE_TIMEOUT_S)


def _leave(size: int) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=size > 1)


def _own_device() -> Any:
    """In a rank: what it trains in; its own card is torch's default there."""
    from ray.train.torch import config

    return config.TorchConfigContextManager()


def _backend(config: HostConfig, nodes: Iterable[dict[str, Any]]) -> str:
    """What ranks speak: NCCL where all their nodes have cards, else gloo, which works on both.

    The host's own machine says nothing of that. nodes: what Ray knows; it gives one on which it has
    found a card a resource with the card's type, and logical GPUs of a box without any none.
    """
    if not config.gpus_per_worker:
        return "gloo"
    cards = {
        node["NodeID"] for node in nodes if any(name.startswith(CARD) for name in node["Resources"])
    }
    if bare := sorted(set(config.placement) - cards):
        log.warning("ranks speak gloo: Ray has found no card on %s", ", ".join(bare))
        return "gloo"
    log.info("ranks speak nccl: Ray has found cards on every node of the placement")
    return "nccl"


def _own_name() -> str:
    import ray

    name = ray.get_runtime_context().get_actor_name()
    assert name is not None, "hosts are named actors"
    return str(name)


def _host_callback(host_name: str) -> Any:
    """Ties a run to its host: hands over the controller, and asks before it starts workers.

    Ray doesn't process an abort while it waits for resources, and killing the host then would leak
    the placement group: so a run that is no longer wanted fails before its workers start.
    """
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class HostCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc] # untyped
        def after_controller_start(self, *_args: Any, **_kwargs: Any) -> None:
            controller = ray.get_runtime_context().current_actor
            ray.get(ray.get_actor(host_name).controller_started.remote(controller))

        def before_worker_group_start(self, *_args: Any, **_kwargs: Any) -> None:
            if ray.get(ray.get_actor(host_name).stop_wanted.remote()):
                raise RuntimeError("stop was asked for while waiting for resources")

    return HostCallback()


def run_worker(arguments: dict[str, Any]) -> None:
    """One rank of one attempt, in a process that Ray started."""
    faulthandler.enable(OUTPUT[-1], all_threads=True)  # Ray's own tells of one thread
    import ray
    from ray.train import get_context

    from trainer.attempt import AttemptContext, run_attempt
    from trainer.distributed import World

    config = HostConfig(**arguments["config"])
    host = ray.get_actor(arguments["host"])
    context = get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    result = run_attempt(
        AttemptContext(
            job_id=config.job_id,
            storage_uri=config.storage_uri,
            cache_dir=config.cache_dir,
            host=arguments["host"],
            host_number=config.host_number,
            host_key=config.host_key,
            service_address=config.service_address,
            service_ca=config.service_ca,
            threads=config.cpus_per_worker,
            stall_floor_s=config.stall_floor_s,
            node_id=ray.get_runtime_context().get_node_id(),
            has_card=arguments["has_card"],
            output=OUTPUT,
            on_claim=lambda number: ray.get(host.attempt_claimed.remote(number)),
            stacks=lambda rank, text: ray.get(
                host.stack.remote(rank, text), timeout=WORD_TIMEOUT_S
            ),
            on_stall=lambda result: ray.get(
                host.attempt_ended.remote(_plain(result)), timeout=WORD_TIMEOUT_S
            ),
        ),
        world,
    )
    ray.get(host.attempt_ended.remote(_plain(result)))
    if world.size > 1 and result.policy is not Policy.DONE:
        # The other ranks wait for this one in a collective: end the group.
        raise RuntimeError(f"{result.outcome}: {result.message}")
