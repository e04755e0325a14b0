"""`everstep doctor`: looks at this machine, and says what to do about what it finds.

A program of its own (`python -m service.doctor`): it must work where the service won't start.
Changes nothing but a probe object in the store, which it deletes again.

Invariant: every check ends in a finding, whatever it meets; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from service.errors import ClusterAwayError, StartError
from service.placement import whole
from service.ray_cluster import RayCluster
from service.settings import Settings
from service.standalone import BUCKET, Standalone
from service.tls import certificate
from trainer.storage.object_store import (
    NotFoundError,
    ObjectStore,
    StoreError,
    StoreRefusedError,
    StoreUnsuitableError,
    open_store,
    probe,
)

LEAST_DISK_BYTES, GOOD_DISK_BYTES = 5 << 30, 20 << 30  # a d12 checkpoint is 2 GB, and three stay
D12_BYTES = 9448 << 20  # measured peak at device_batch_size 8: reference card of the docs
GOOD_SHM_BYTES = 1 << 30
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 300.0  # S3 refuses requests that are 15 minutes off
COMMAND_S = 60.0
LARGE_MIB = 20  # above the size from which S3 clients write in parts
TORCH = "import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.is_available()]))"


class State(StrEnum):
    """How a check ended. SKIPPED: there is nothing to check here."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what to do about it where something is wrong."""

    check: str
    state: State
    found: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, one after the other."""
    checks: list[Callable[[Settings], Iterator[Finding]]] = [
        versions, gpus, container_toolkit, disks, shared_memory, ports, encryption, ray_cluster,
        store,
    ]  # fmt: skip
    for check in checks:
        try:
            yield from check(settings)
        except Exception as error:  # a check that fails in a new way is a finding too
            name = check.__name__.replace("_", " ")
            yield Finding(name, State.FAILED, f"{type(error).__name__}: {error}")


def versions(_settings: Settings) -> Iterator[Finding]:
    """What is installed."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("everstep", "torch", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            advice = "pip install 'everstep[service,trainer]'"
            yield Finding("versions", State.FAILED, f"{name} is not installed", advice)
    yield Finding("versions", State.OK, ", ".join(found))


def gpus(_settings: Settings) -> Iterator[Finding]:
    """The driver against torch's CUDA, and each GPU's free memory."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        advice = "without a GPU jobs need resources.gpus_per_worker: 0; else install its driver"
        yield Finding("gpu", State.SKIPPED, f"no NVIDIA driver answers ({error})", advice)
        return
    driver = pynvml.nvmlSystemGetDriverVersion()
    number = pynvml.nvmlSystemGetCudaDriverVersion()
    yield driver_fits(driver, (number // 1000, number % 1000 // 10), *_torch_cuda())
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        yield free_memory(index, pynvml.nvmlDeviceGetName(handle), memory.free, memory.total)


def driver_fits(
    driver: str, driver_cuda: tuple[int, int], wheel_cuda: str | None, usable: bool
) -> Finding:
    """Whether torch's wheels run on a driver: CUDA is compatible within a major version."""
    found = f"driver {driver} (CUDA {driver_cuda[0]}.{driver_cuda[1]}), torch's CUDA {wheel_cuda}"
    if wheel_cuda is None:
        advice = "this torch is a build for the CPU: install the one that PyPI has"
        return Finding("gpu driver", State.FAILED, found, advice)
    if driver_cuda[0] < int(wheel_cuda.split(".")[0]):
        advice = f"update the NVIDIA driver to one that knows CUDA {wheel_cuda}"
        return Finding("gpu driver", State.FAILED, found, advice)
    if not usable:
        advice = "torch can't use the GPU: is another process's or container's hold on it gone?"
        return Finding("gpu driver", State.FAILED, found, advice)
    return Finding("gpu driver", State.OK, found)


def free_memory(index: int, name: str, free_bytes: int, total_bytes: int) -> Finding:
    """What a GPU has left: a desktop or another program may hold some."""
    found = f"{name}: {_gib(free_bytes)} free of {_gib(total_bytes)}"
    if free_bytes < min(D12_BYTES, 0.9 * total_bytes):
        advice = (
            f"the default job, d12 at 8 rows, takes {_gib(D12_BYTES)}: end what uses the GPU "
            "(nvidia-smi names it; a desktop takes some), or lower batch.device_batch_size"
        )
        return Finding(f"gpu {index}", State.WARNING, found, advice)
    return Finding(f"gpu {index}", State.OK, found)


def container_toolkit(_settings: Settings) -> Iterator[Finding]:
    """Whether Docker can hand GPUs to containers."""
    name = "container toolkit"
    if shutil.which("docker") is None or shutil.which("nvidia-smi") is None:
        yield Finding(name, State.SKIPPED, "no docker, or no GPU, to be reached from here")
        return
    done = _run("docker", "info", "--format", "{{json .Runtimes}}")
    if done.returncode != 0:
        yield Finding(name, State.WARNING, "the Docker engine doesn't answer", "start it")
    elif "nvidia" in done.stdout:
        yield Finding(name, State.OK, "Docker knows the runtime nvidia")
    else:
        advice = (
            "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure "
            "--runtime=docker && sudo systemctl restart docker"
        )
        yield Finding(name, State.FAILED, "Docker doesn't know the GPU", advice)


def disks(settings: Settings) -> Iterator[Finding]:
    """Room for state and caches."""
    for name, folder in (
        ("state", settings.state),
        ("cache", settings.cache or settings.state / "cache"),
    ):
        path = folder.resolve()
        there = next(each for each in (path, *path.parents) if each.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}: {_gib(free)} free"
        advice = "make room: a checkpoint of d12 is 2 GB, and keep_last of them stay"
        if free < LEAST_DISK_BYTES:
            yield Finding(f"disk of {name}", State.FAILED, found, advice)
        elif free < GOOD_DISK_BYTES:
            yield Finding(f"disk of {name}", State.WARNING, found, advice)
        else:
            yield Finding(f"disk of {name}", State.OK, found)


def shared_memory(_settings: Settings) -> Iterator[Finding]:
    """What Ray and NCCL share; containers have little by default."""
    size = shutil.disk_usage("/dev/shm").total
    if size < GOOD_SHM_BYTES:
        advice = "give the container more (compose: shm_size)"
        yield Finding("shared memory", State.WARNING, f"/dev/shm has {_gib(size)}", advice)
    else:
        yield Finding("shared memory", State.OK, f"/dev/shm has {_gib(size)}")


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether the configured ports are free, or our own service's."""
    facts = _service(settings)
    for name, listen in (("grpc", settings.listen), ("metrics", settings.metrics_listen)):
        host, _, port = listen.rpartition(":")
        if facts is not None:
            yield Finding(f"{name} port", State.OK, f"our service runs, pid {facts['pid']}")
        elif port == "0":
            yield Finding(f"{name} port", State.OK, "any that is free")
        elif _is_free(host, int(port)):
            yield Finding(f"{name} port", State.OK, f"{listen} is free")
        else:
            advice = f"stop what listens there, or set EVERSTEP_{name.upper()}_LISTEN"
            advice = advice.replace("GRPC_", "")
            yield Finding(f"{name} port", State.FAILED, f"{listen} is taken", advice)


def encryption(settings: Settings) -> Iterator[Finding]:
    """Whether tokens can leave this machine in the clear."""
    served_with = certificate(settings)
    if served_with is not None:
        yield Finding("encryption", State.OK, f"TLS, trusted by {served_with.authority}")
    elif settings.plaintext:
        yield Finding("encryption", State.WARNING, "none (EVERSTEP_PLAINTEXT)", "does the network?")
    else:
        yield Finding("encryption", State.OK, "none, and nobody but this machine reaches the port")


def ray_cluster(settings: Settings) -> Iterator[Finding]:
    """Whether the cluster answers, and what it has."""
    address, environment = settings.ray_address, {}
    if (parts := _embedded(settings)) is not None and address is None:
        address, environment = parts.ray_address, parts.ray_environment
    if address is None:
        yield Finding("ray", State.SKIPPED, "no cluster yet; `everstep serve --standalone` has one")
        return

    async def ask() -> str:
        cluster = RayCluster(address, environment)
        try:
            found = whole(await cluster.nodes())
        finally:
            await cluster.close()
        return f"{address}: {found.gpus} GPUs, {found.cpus} CPUs"

    try:
        yield Finding("ray", State.OK, asyncio.run(ask()))
    except ClusterAwayError as error:
        advice = "is the head up, and RAY_AUTH_TOKEN_PATH its token?"
        yield Finding("ray", State.FAILED, str(error), advice)


def store(settings: Settings) -> Iterator[Finding]:
    """What checkpoints need of the store, tried out; and its clock against ours."""
    uri = settings.storage
    if (parts := _embedded(settings)) is not None and uri is None:
        uri = f"s3://{BUCKET}"
        os.environ.update(parts.wiring.s3_environment)
    if uri is None:
        yield Finding("store", State.SKIPPED, "EVERSTEP_STORAGE is not set, and nothing embedded")
        return
    try:
        opened = open_store(uri)
        probe(opened)
        write_in_parts(opened)
        key = f"everstep-clock-{secrets.token_hex(8)}"
        opened.put(key, b"clock")
        now, info = time.time(), opened.head(key)
        opened.delete(key)
    except StoreUnsuitableError as error:
        advice = "use another store; or, where it was refused, let its keys do what it names"
        yield Finding("store", State.FAILED, str(error), advice)
        return
    except StoreError as error:
        advice = "mend what it names; keys and endpoint are the standard AWS_* variables"
        yield Finding("store", State.FAILED, str(error), advice)
        return
    abilities = "write, multipart write, ranged read, conditional write, listing, deletion"
    yield Finding("store", State.OK, f"{uri}: {abilities}")
    assert info is not None, "what was put is there"
    yield clock(now - info.modified.timestamp())


def write_in_parts(opened: ObjectStore) -> None:
    """StoreUnsuitableError unless a file so large that it goes in parts comes back as it was."""
    content = os.urandom(1 << 20) * LARGE_MIB
    key = f"everstep-parts-{secrets.token_hex(8)}"
    with tempfile.NamedTemporaryFile(prefix="everstep-doctor-") as file:
        file.write(content)
        file.flush()
        try:
            opened.put_file(key, Path(file.name))
            if b"".join(opened.stream(key)) != content:
                raise StoreUnsuitableError(f"{opened.uri}: a multipart write does not last")
        except (NotFoundError, StoreRefusedError) as error:
            raise StoreUnsuitableError(
                f"{opened.uri}: a multipart write failed: {error}"
            ) from error
        finally:
            opened.delete(key)


def clock(ahead_s: float) -> Finding:
    """Our clock against the store's, which keeps whole seconds."""
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the store's"
    advice = "synchronise the clocks (NTP): requests to S3 are signed with the time"
    if abs(ahead_s) > CLOCK_FAIL_S:
        return Finding("clock", State.FAILED, found, advice)
    if abs(ahead_s) > CLOCK_WARN_S:
        return Finding("clock", State.WARNING, found, advice)
    return Finding("clock", State.OK, "agrees with the store's")


def _torch_cuda() -> tuple[str | None, bool]:
    """torch's CUDA version, and whether it can use a GPU; asked in a process of its own."""
    done = _run(sys.executable, "-c", TORCH)
    if done.returncode != 0:
        return None, False
    found: list[Any] = json.loads(done.stdout)
    return found[0], found[1]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)


def _service(settings: Settings) -> dict[str, Any] | None:
    """What a service that runs on the state folder says of itself."""
    try:
        facts: dict[str, Any] = json.loads((settings.state / "service.json").read_text())
        os.kill(facts["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return facts


def _embedded(settings: Settings) -> Standalone | None:
    """The embedded parts of the state folder, if they were ever started and a service runs."""
    there = (settings.state / "parts" / "wiring.json").exists()
    return Standalone(settings.state) if there and _service(settings) is not None else None


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host.strip("[]"), port))
        except OSError:
            return False
        return True


def _gib(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def main() -> None:
    """Print the findings; exit status 1 if any check failed."""
    parser = argparse.ArgumentParser(prog="python -m service.doctor", description=__doc__)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        settings = Settings(state=given.state) if given.state else Settings()
    except StartError as error:
        sys.exit(f"everstep: {error}")
    found = []
    for finding in examine(settings):
        found.append(finding)
        if not given.json:
            print(f"{finding.state:<8} {finding.check}: {finding.found}", flush=True)
            if finding.advice:
                print(f"{'':<8} -> {finding.advice}", flush=True)
    if given.json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=2))
    sys.exit(any(finding.state is State.FAILED for finding in found))


if __name__ == "__main__":
    main()
