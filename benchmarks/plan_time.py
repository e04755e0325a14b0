"""Predicted against measured seconds a step: `python -m benchmarks.plan_time`.

A short job is trained; from its rate alone jobs of other sizes are planned, then trained: what the
plan says of them stands beside what they take. The machine may be shared, so the sizes take turns,
and each run counts by the median of its steps. Each size is told twice: by the median of its runs,
and by its quickest, which other work disturbed least. Prints lines; writes nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from everstep.specs import merged
from tests.fakes.attempts import Bucket
from tests.fakes.corpus import CORPUS, TOKENIZER
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.speed import Measured, estimate_time, work_of

ROUNDS = 3
STEPS = 5
VOCABULARY = 768  # of the tokenizer below
UNCOUNTED_STEPS = 1  # the first makes pages and caches
GOAL = 0.25
BASE: dict[str, Any] = {
    "model": {"depth": 4, "aspect_ratio": 64, "head_dim": 64, "max_seq_len": 256},
    "data": {"source": f"file:{CORPUS}", "tokenizer": f"file:{TOKENIZER}"},
    "batch": {"device_batch_size": 2, "total_batch_size": 1024},
    "schedule": {"num_iterations": STEPS},
    "evaluate": {"every": 0, "tokens": 512},
    "checkpoint": {"every_steps": 0, "every_s": 0},
    "resources": {"gpus_per_worker": 0, "cpus_per_worker": 1},
    "precision": {"compute": "fp32"},
    "compile": "off",
}
OTHERS: dict[str, dict[str, Any]] = {
    "depth 8, as wide": {"model": {"depth": 8, "aspect_ratio": 32}},
    "depth 6, wider": {"model": {"depth": 6}},
    "depth 2, narrower": {"model": {"depth": 2}},
    "twice the batch": {"batch": {"total_batch_size": 2048}},
    "half the batch": {"batch": {"device_batch_size": 2, "total_batch_size": 512}},
    "rows twice as long": {"model": {"max_seq_len": 512}},
    # Nothing in the plan was fitted to these two.
    "depth 3, narrower": {"model": {"depth": 3}},
    "depth 10, wider": {"model": {"depth": 10, "aspect_ratio": 32}},
}


def main() -> None:
    """Train all sizes in turns, then compare."""
    sizes = {"the measured job": BASE} | {name: merged(BASE, each) for name, each in OTHERS.items()}
    measured: dict[str, list[float]] = {name: [] for name in sizes}
    with tempfile.TemporaryDirectory() as folder:
        bucket = Bucket(Path(folder))
        for turn in range(ROUNDS):
            for number, (name, data) in enumerate(sizes.items()):
                measured[name].append(train(bucket, f"JOB{turn}x{number}", data))
    for name, runs in measured.items():
        print(f"{name}: runs {', '.join(f'{each:.3f}' for each in runs)} s a step")
    for what, summary in (("median", statistics.median), ("quickest", min)):
        compare(what, {name: summary(runs) for name, runs in measured.items()}, sizes)


def compare(what: str, step_s: dict[str, float], sizes: dict[str, dict[str, Any]]) -> None:
    """Print what the plan says of each size from the first one's seconds a step."""
    first = next(iter(sizes))
    known = Measured(first, step_s[first], work_of(*planned(sizes[first]), 1))
    for name in OTHERS:
        estimate = estimate_time(*planned(sizes[name]), None, [known])
        assert estimate is not None
        error = estimate.step_s / step_s[name] - 1
        print(
            f"{what}, {name}: predicted {estimate.step_s:.3f} s, measured {step_s[name]:.3f} s "
            f"({error:+.0%}{'' if abs(error) <= GOAL else ', beyond the goal'})"
        )


def planned(data: dict[str, Any]) -> tuple[JobSpec, ModelShape]:
    """What a plan works from."""
    spec = JobSpec.parse(data)
    return spec, ModelShape.of(spec.model, VOCABULARY)


def train(bucket: Bucket, job_id: str, data: dict[str, Any]) -> float:
    """Seconds a step of a whole attempt, data left out as the service does; the median."""
    bucket.add(job_id, **data)
    result, told = bucket.run(job_id)
    assert len(told.points) == STEPS, result.message
    points = told.points[UNCOUNTED_STEPS:]
    return statistics.median(point.step_s - point.data_wait_s for point in points)


if __name__ == "__main__":
    main()
