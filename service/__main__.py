"""Composition root of the service: reads settings, builds everything, serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from service import standalone
from service.access import Keyring
from service.cluster import Cluster
from service.deletions import Deletions
from service.errors import StartError, StorageAwayError
from service.interceptors import Gate
from service.jobs import Job
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.parts import PartFailedError
from service.ray_cluster import RayCluster
from service.readiness import look_after
from service.reconciler import Reconciler
from service.reports import RunServicer
from service.sampling import Sampler
from service.server import Server
from service.servicer import TrainingServicer
from service.settings import Settings
from service.signs import Signs
from service.storage import Storage
from service.store import (
    Database,
    DeletionStore,
    DrainStore,
    JobStore,
    RecordStore,
    Thinning,
    TokenStore,
)
from service.tls import Certificate, certificate, require_data_roots
from service.tokens import Tokens
from service.transfers import Transfers
from service.updates import Updates
from service.upkeep import Upkeep
from service.uploads import Uploads
from trainer.contract.credential import host_key
from trainer.storage.object_store import ObjectStore, StoreError, StoreKeyError, open_store, probe

ANY_ADDRESS = ("0.0.0.0", "[::]", "")
PROBE_S = 30.0  # a store that has just come up may need a moment
log = logging.getLogger("everstep")


def main() -> None:
    """`python -m service`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("alembic", "botocore", "boto3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = _settings()
        with _sole_owner(settings.state):
            asyncio.run(_serve(settings))
    except (StartError, PartFailedError, StoreError, StorageAwayError) as error:
        print(f"everstep: {error}", file=sys.stderr)
        sys.exit(1)


def _settings() -> Settings:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("--standalone", action="store_true", default=None)
    parser.add_argument("--state", type=Path)
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    return Settings(**given)


@contextlib.contextmanager
def _sole_owner(state: Path) -> Iterator[None]:
    """One service a state folder; the lock goes with the process."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"another service runs on {state}; see {state}/service.json") from None
        yield


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not settings.standalone:
        await _run(settings, None, stop)
        return
    parts = standalone.Standalone(settings.state, settings.ray_cpus, settings.ray_gpus)
    settings = _wired(settings, parts)
    os.environ.update(parts.wiring.s3_environment)
    adopted = False
    try:
        adopted = await parts.start(log.info)
        await _run(settings, parts, stop)
    finally:
        # A service that fails leaves running what it found running: jobs may be at work there.
        if stop.is_set() or not adopted:
            log.info("taking Ray and SeaweedFS down")
            await parts.end()


def _wired(settings: Settings, parts: standalone.Standalone) -> Settings:
    """What the embedded default decides, where the user didn't."""
    wiring = parts.wiring
    defaults: dict[str, Any] = {
        "listen": f"127.0.0.1:{wiring.grpc_port}",
        "metrics_listen": f"127.0.0.1:{wiring.metrics_port}",
        "storage": f"s3://{standalone.BUCKET}",
        "ray_address": parts.ray_address,
        "admin_token": wiring.admin_token,
        "secret": wiring.secret,
        "suspend_on_stop": True,  # Ray goes down with us
    }
    given = settings.model_fields_set
    return settings.model_copy(
        update={
            key: Settings.model_validate({key: value}).model_dump()[key]
            for key, value in defaults.items()
            if key not in given
        }
    )


async def _run(
    settings: Settings, parts: standalone.Standalone | None, stop: asyncio.Event
) -> None:
    """Serve until stop is set."""
    if settings.storage is None or settings.ray_address is None:
        raise StartError("set EVERSTEP_STORAGE and EVERSTEP_RAY_ADDRESS, or use --standalone")
    if settings.admin_token is None or settings.secret is None:
        raise StartError("set EVERSTEP_ADMIN_TOKEN and EVERSTEP_SECRET (32 bytes in hex)")
    served_with = certificate(settings)
    require_data_roots(settings)
    store = open_store(settings.storage)
    await _probe(store)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    cluster = RayCluster(settings.ray_address, parts.ray_environment if parts else {})
    async with contextlib.AsyncExitStack() as cleanup:
        database = await Database.open(settings.state / "everstep.db")
        cleanup.push_async_callback(database.close)
        cleanup.push_async_callback(cluster.close)
        server, reconciler, deletions = await _compose(
            settings, served_with, store, database, cluster, metrics
        )
        cleanup.push_async_callback(deletions.close)
        address = await _listen(server, settings)
        cleanup.push_async_callback(server.stop)
        metrics_url = _serve_metrics(settings.metrics_listen, registry)
        jobs = JobStore(database)
        for job in await jobs.unfinished():
            if view := await jobs.view(job.id):
                metrics.restore(view)
        background = [
            reconciler.run(),
            deletions.run(),
            Thinning(database).run(),
        ]
        if parts is not None:
            background.append(parts.supervise(cluster.close))
        tasks = [asyncio.create_task(each) for each in background]
        looking = look_after(database, jobs, metrics, server, tasks[0])
        tasks.append(asyncio.create_task(looking))
        # Going through what was imported, which stays, would hold up every call for 50 ms.
        gc.freeze()
        cleanup.push_async_callback(_cancel, tasks)
        _announce(settings, served_with, parts, address, metrics_url)
        cleanup.callback((settings.state / "service.json").unlink, missing_ok=True)
        await stop.wait()
        metrics.stopping.set(1)
        await server.leave()
        log.info("stopping")
        if settings.suspend_on_stop:
            log.info("checkpointing what runs")
            await reconciler.suspend()


async def _compose(
    settings: Settings,
    served_with: Certificate | None,
    store: ObjectStore,
    database: Database,
    cluster: RayCluster,
    metrics: Metrics,
) -> tuple[Server, Reconciler, Deletions]:
    """Every part of the service, each handed what it needs."""
    assert settings.admin_token is not None
    assert settings.secret is not None
    secret = bytes.fromhex(settings.secret.get_secret_value())
    cache = (settings.cache or settings.state / "cache").resolve()

    def host_config(job: Job) -> dict[str, Any]:
        resources = job.spec.resources
        return {
            "job_id": job.id,
            "host_number": job.host_number,
            "storage_uri": settings.storage,
            "cache_dir": str(cache),
            "service_address": settings.advertise or _local(settings.listen),
            "service_ca": served_with.authority.read_text() if served_with else None,
            "host_key": host_key(secret, job.id, job.host_number),
            "stall_floor_s": settings.stall_floor_s,
            "placement": job.placement,
            "gpus_per_worker": resources.gpus_per_worker,
            "cpus_per_worker": resources.cpus_per_worker,
        }

    keyring = Keyring(settings.admin_token.get_secret_value())
    tokens = Tokens(TokenStore(database), keyring)
    await tokens.load()
    jobs, records = JobStore(database), RecordStore(database)
    upkeep = Upkeep(DrainStore(database))
    await upkeep.load()
    signs = Signs(settings.stop_grace_s)
    reconciler = Reconciler(jobs, cluster, metrics, host_config, upkeep.mark, signs)
    storage = Storage(store, settings.data_roots)
    lifecycle = Lifecycle(
        database, storage, lambda: reconciler.nodes, reconciler.wake, reconciler.explained
    )
    deletions = Deletions(lifecycle, jobs, DeletionStore(database), storage, metrics)
    server = Server(
        Gate(keyring, secret, metrics),
        TrainingServicer(
            lifecycle,
            storage,
            Uploads(storage, settings.state / "uploads"),
            Sampler(lifecycle, storage.uri),
            Transfers(lifecycle, storage, records),
            tokens,
            Updates(lifecycle, jobs, storage, reconciler.wake),
            deletions,
            Cluster(
                jobs,
                records,
                lambda: reconciler.nodes,
                lambda: reconciler.seen_at,
                metrics.samples,
                upkeep,
                reconciler.wake,
                reconciler.explained,
            ),
        ),
        RunServicer(jobs, records, metrics, reconciler.directive),
        served_with.credentials() if served_with else None,
    )
    return server, reconciler, deletions


async def _listen(server: Server, settings: Settings) -> str:
    """Start the server; the address that clients on this machine use."""
    try:
        port = await server.start(settings.listen)
    except RuntimeError as error:
        raise StartError(f"{settings.listen} can't be listened on; is it taken? {error}") from error
    return _local(f"{settings.listen.rpartition(':')[0]}:{port}")


def _local(listen: str) -> str:
    """The address by which this machine reaches what listens on it."""
    host, _, port = listen.rpartition(":")
    return f"127.0.0.1:{port}" if host in ANY_ADDRESS else listen


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _probe(store: Any) -> None:
    """Refuse a store that can't do what checkpoints need, before anything relies on it."""
    deadline = time.monotonic() + PROBE_S
    while True:
        try:
            return await asyncio.to_thread(probe, store)
        except StoreError as error:
            if isinstance(error, StoreKeyError) or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def _serve_metrics(listen: str, registry: CollectorRegistry) -> str:
    host, _, port = listen.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host, registry)
    except OSError as error:
        raise StartError(f"{listen} can't be listened on for /metrics: {error}") from error
    return f"http://{host}:{server.server_port}/metrics"


def _announce(
    settings: Settings,
    served_with: Certificate | None,
    parts: standalone.Standalone | None,
    address: str,
    metrics_url: str,
) -> None:
    assert settings.admin_token is not None
    standalone.write_secret(
        settings.state / "token", settings.admin_token.get_secret_value() + "\n"
    )
    standalone.write_service_file(
        settings.state / "service.json",
        {
            "address": address,
            "ca_cert": str(served_with.authority.resolve()) if served_with else None,
            "metrics_url": metrics_url,
            "s3_endpoint": parts.wiring.s3_endpoint
            if parts
            else os.environ.get("AWS_ENDPOINT_URL_S3"),
            "bucket": standalone.BUCKET if parts else settings.storage,
            "pid": os.getpid(),
        },
    )
    print(f"everstep: ready at {address}, metrics at {metrics_url}", flush=True)


if __name__ == "__main__":
    main()
