"""Run one attempt of a job without Ray or service: `python -m trainer --storage URI --job ID`.

For a job whose spec.json lies in storage. With --spec, the spec is bound to its data and stored
first, as the service would. Ctrl-C and SIGTERM stop at the next step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from trainer.attempt import AttemptContext, run_attempt
from trainer.contract.outcome import EXIT_CODES
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError
from trainer.distributed import World
from trainer.report import PrintingReporter
from trainer.storage.binding import BindingError, bind
from trainer.storage.manifest import JobDocument
from trainer.storage.object_store import StoreError, open_store
from trainer.storage.repository import CheckpointRepository

USAGE_ERROR = 2


def main() -> int:
    """The exit status: see trainer.contract.outcome."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--storage", required=True, help="s3://bucket/prefix or file:/folder")
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--spec", type=Path, help="JSON spec of a job that is not stored yet")
    parser.add_argument("--cache", type=Path, default=Path(".everstep/cache"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    faulthandler.enable()
    try:
        if options.spec is not None:
            _store(options.storage, options.job, json.loads(options.spec.read_text()))
    except (SpecError, BindingError, StoreError, ValueError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return USAGE_ERROR
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    result = run_attempt(
        AttemptContext(
            job_id=options.job,
            storage_uri=options.storage,
            cache_dir=str(options.cache.resolve()),
            host=f"{socket.gethostname()}:{os.getpid()}",
            threads=options.threads,
            reporter=PrintingReporter(lambda line: print(line, flush=True), stop),
            on_stall=lambda result: print(f"{result.outcome}: {result.message}", flush=True),
        ),
        World(),
    )
    print(f"{result.outcome}: {result.message}")
    return EXIT_CODES[result.outcome]


def _store(storage: str, job_id: str, data: dict[str, object]) -> None:
    """Bind a spec to its data and write the job's document, once."""
    spec = JobSpec.parse(data)
    if spec.start.from_ is not None:
        raise ValueError("start.from: a bare run starts fresh or resumes itself")
    binding = bind(spec.data.source, spec.data.tokenizer, spec.data.validation)
    repository = CheckpointRepository(open_store(storage), job_id)
    repository.save_document(JobDocument(job_id=job_id, spec=spec.to_dict(), binding=binding))


if __name__ == "__main__":
    sys.exit(main())
