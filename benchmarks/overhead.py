"""What a step costs outside its own work: `python -m benchmarks.overhead`.

Starts the embedded default (Ray, SeaweedFS, the service) in a folder of its own, trains a job, and
compares the time from one metric point to the next with what the trainer itself counts as the step.
The difference is all that the loop does between steps: agreeing on directives, reporting, logs,
checkpoints that fall due. Data wait is the trainer's own figure. Prints lines; writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from everstep import Client
from tests.stack import CORPUS, Stack

FIRST_STEP = 3  # those before make pages, caches and kernels


def main() -> None:
    """Train and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens a step")
    asked = parser.parse_args()
    spec = {
        "name": "overhead",
        "model": {"depth": asked.depth, "aspect_ratio": 64, "head_dim": 64, "max_seq_len": 512},
        "data": {"source": f"file:{CORPUS}", "tokenizer": f"file:{CORPUS / 'tokenizer'}"},
        "batch": {"device_batch_size": asked.rows, "total_batch_size": asked.rows * 512},
        "schedule": {"num_iterations": asked.steps},
        "evaluate": {"every": 0, "tokens": 512},
        "sample": {"every": 0},
        "checkpoint": {"every_steps": 0, "every_s": 0},
        "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2},
        "precision": {"compute": "fp32"},
        "compile": "off",
    }
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder) / "state")
        stack.start()
        try:
            with stack.client() as client:
                tell(client, client.submit(spec).job.id)
        finally:
            stack.stop()


def tell(client: Client, job_id: str) -> None:
    """Watch a job to its end and print medians and shares."""
    found = [each for each in client.watch(job_id) if each.HasField("point")]
    found = [each for each in found if each.point.step >= FIRST_STEP]
    between, waits, steps = [], [], []
    for last, this in pairwise(found):
        interval_s = (this.time.ToNanoseconds() - last.time.ToNanoseconds()) / 1e9
        between.append((interval_s - this.point.step_s) / interval_s)
        waits.append(this.point.data_wait_s / interval_s)
        steps.append(interval_s)
    print(f"{len(steps)} steps of {1000 * statistics.median(steps):.0f} ms (median)")
    for name, shares in (("between steps", between), ("data wait", waits)):
        print(f"{name}: {statistics.median(shares):.3%} of a step, at most {max(shares):.3%}")


if __name__ == "__main__":
    main()
