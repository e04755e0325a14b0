"""The embedded default as a whole, for tests that break it: started, killed, started again.

Processes are found by what the service itself keeps on disk and by Ray's process titles below its
own raylet, and are ended by pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import psutil

from everstep import Client
from everstep.v1 import everstep_pb2 as pb
from service.ray_cluster import NAMESPACE
from service.standalone import RAY_IP

T = TypeVar("T")
READY_S = 180.0
STOP_S = 180.0
WAIT_S = 300.0  # a loaded machine; usually a tenth of it
EMPTY_S = 60.0

# What an attempt consists of, by Ray's titles.
ROLES = ("ray::AttemptHost", "ray::TrainController", "ray::RayTrainWorker")
# Asked of Ray itself: what the service shows as free comes of its own database.
ASK_RAY = """
import json, sys, ray
from ray.util import list_named_actors, placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
groups = placement_group_table().values()
left = [f"group {each['placement_group_id']} is {each['state']}" for each in groups
        if each["state"] != "REMOVED"]
actors = list_named_actors(all_namespaces=True)
left += [f"actor {each['name']}" for each in actors if each["namespace"] == sys.argv[2]]
has, free = ray.cluster_resources(), ray.available_resources()
left += [f"{key}: {free.get(key, 0)} of {has[key]} free" for key in ("CPU", "GPU")
         if free.get(key, 0) != has.get(key, 0)]
print("LEFT", json.dumps(left))
"""

# A model small enough that a job takes seconds, on the text that ships with the tests.
CORPUS = Path(__file__).parent / "data" / "corpus"
SMALL_JOB: dict[str, Any] = {
    "name": "small",
    "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 128},
    "data": {
        "source": f"file:{CORPUS}",
        "tokenizer": f"file:{CORPUS / 'tokenizer'}",
    },
    "batch": {"device_batch_size": 4, "total_batch_size": 1024},
    "optimizer": {"smear_lr": 0.01, "matrix_lr": 0.02, "embedding_lr": 0.3},
    "schedule": {"num_iterations": 100},
    "evaluate": {"every": 50, "tokens": 4096},
    "sample": {"every": 0},
    "checkpoint": {"every_steps": 20, "every_s": 0, "keep_last": 100},
    "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2},
    "precision": {"compute": "fp32"},
    "compile": "off",
}


class Stack:
    """A service with its Ray and SeaweedFS on one state folder."""

    def __init__(self, state: Path, **settings: object) -> None:
        """settings: of the service, as EVERSTEP_<NAME> would give them."""
        self.state = state
        self._settings = {f"EVERSTEP_{k.upper()}": str(v) for k, v in settings.items()}
        self.service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the service and wait until it is ready."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "service.json").unlink(missing_ok=True)
        with (self.state / "service.log").open("ab") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-m", "service", "--standalone", "--state", str(self.state)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._settings},
            )
        wait_until(self._ready, READY_S, f"the service; see {self.state}/service.log")

    def _ready(self) -> bool:
        assert self.service is not None
        if self.service.poll() is not None:
            raise AssertionError((self.state / "service.log").read_text()[-3000:])
        return (self.state / "service.json").exists()

    def kill_service(self) -> None:
        """kill -9 of the service alone."""
        assert self.service is not None
        self.service.kill()
        self.service.wait()

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.service is not None and self.service.poll() is None:
            self.service.send_signal(signal.SIGTERM)
            self.service.wait(STOP_S)

    def client(self) -> Client:
        """A client of it."""
        return Client.from_state(self.state)

    @property
    def facts(self) -> dict[str, Any]:
        """What service.json says."""
        found: dict[str, Any] = json.loads((self.state / "service.json").read_text())
        return found

    @property
    def wiring(self) -> dict[str, Any]:
        """Ports and keys of the parts."""
        found: dict[str, Any] = json.loads((self.state / "parts" / "wiring.json").read_text())
        return found

    def s3(self) -> Any:
        """A client of its own SeaweedFS."""
        return boto3.client(
            "s3",
            endpoint_url=self.facts["s3_endpoint"],
            aws_access_key_id=self.wiring["s3_access_key"],
            aws_secret_access_key=self.wiring["s3_secret_key"],
            region_name="us-east-1",
        )

    def part_pid(self, name: str) -> int:
        """The process that leads a part: ray or seaweedfs."""
        return int(json.loads((self.state / "parts" / f"{name}.pid.json").read_text())["pid"])

    def processes(self) -> list[psutil.Process]:
        """Every process of the parts, by their sessions."""
        leaders = set()
        for path in (self.state / "parts").glob("*.pid.json"):
            leaders.add(int(json.loads(path.read_text())["pid"]))
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) in leaders and is_alive(process):
                    found.append(process)
        return found

    def titles(self) -> dict[str, list[psutil.Process]]:
        """The processes by title or command; one that ends while it is read is left out."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found.setdefault(" ".join(process.cmdline()), []).append(process)
        return found

    def ray_process(self, title: str) -> psutil.Process:
        """The one process of our Ray whose title or command begins so."""
        found = []
        for name, processes in self.titles().items():
            if name.startswith(title):
                found += processes
        assert len(found) == 1, f"{len(found)} processes are {title}"
        return found[0]

    def ray_leftovers(self) -> list[str]:
        """What jobs hold in Ray: processes, and by its own word actors, groups and resources.

        Waits for Ray where it is away; subprocess.TimeoutExpired after a minute.
        """
        left = [title for title in self.titles() if title.startswith(ROLES)]
        token = str(self.state / "parts" / "ray.token")
        done = subprocess.run(
            [sys.executable, "-c", ASK_RAY, f"{RAY_IP}:{self.wiring['ray_gcs_port']}", NAMESPACE],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return left + list(json.loads(done.stdout.rpartition("LEFT ")[2]))

    def worker(self) -> psutil.Process:
        """The training process of the one running job."""
        return self.ray_process("ray::RayTrainWorker")


@contextlib.contextmanager
def running_stack(state: Path, **settings: object) -> Iterator[Stack]:
    """A started stack; whatever a test did to it, nothing of it is left afterwards."""
    stack = Stack(state, **settings)
    try:
        stack.start()
        yield stack
    finally:
        if stack.service is None or stack.service.poll() is not None:
            stack.start()  # a stop needs a service: it knows what is its own
        left = stack.processes()
        stack.stop()
        alive = [process for process in left if is_alive(process)]
        assert alive == [], f"left behind: {alive}"


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has reaped yet doesn't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Poll until the condition gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


def wait_for_an_empty_ray(stack: Stack) -> None:
    """Wait until nothing of any job is left in Ray."""
    deadline = time.monotonic() + EMPTY_S
    while left := stack.ray_leftovers():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_for_checkpoint(client: Client, job_id: str, step: int) -> pb.Job:
    """Wait until a job has a committed checkpoint at or after a step."""

    def reached() -> pb.Job | None:
        job = client.get(job_id)
        assert job.state != pb.JOB_STATE_FAILED, job.reason
        return job if job.HasField("checkpoint") and job.checkpoint.step >= step else None

    return wait_until(reached, WAIT_S, f"a checkpoint at step {step} of {job_id}")


def wait_for_state(client: Client, job_id: str, state: pb.JobState) -> pb.Job:
    """Wait until a job is in a state."""

    def there() -> pb.Job | None:
        job = client.get(job_id)
        return job if job.state == state else None

    return wait_until(there, WAIT_S, f"{pb.JobState.Name(state)} of {job_id}")
