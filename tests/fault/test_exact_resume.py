"""kill -9 of a bare trainer at any moment: what it leads to is the undisturbed run, to the bit.

Without Ray and service: a process a second or two, so that 38 kills fit into a test. One thread
each, so that two cases run side by side; most of a compiled one is the C++ compiler's time.
`make chaos` plays every case EVERSTEP_CHAOS_ROUNDS times, each with moments of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.attempts import Bucket, differing, small_corpus
from tests.fakes.control_plane import TINY, changed
from tests.fault.seeds import drawn

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("EVERSTEP_CHAOS_ROUNDS", "1"))
LONGEST_S = 0.05  # from the step that is said to the kill
# What compiles soonest.
ONE_LAYER = {"depth": 1, "aspect_ratio": 32}


def start(bucket: Bucket, job_id: str, spec: Path | None) -> subprocess.Popen[str]:
    """An attempt of a job; with spec of one that is not stored yet."""
    words = ["--storage", bucket.uri, "--job", job_id, "--threads", "1"]
    words += ["--cache", str(bucket.folder / "cache")]
    words += ["--spec", str(spec)] if spec else []
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )


def run(
    bucket: Bucket, job_id: str, spec: Path | None, kill_at: int | None, delay_s: float = 0.0
) -> int:
    """One attempt to its end, or to kill -9 soon after it says that step; the last step it said."""
    step = 0
    with start(bucket, job_id, spec) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                step = int(line.split()[1])
            if kill_at is not None and step >= kill_at:
                # Into the next step, a checkpoint's upload, or the end itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(delay_s)
                process.kill()
                break
        process.stdout.read()
    assert process.returncode == 0 or (kill_at is not None and step >= kill_at)
    return step


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize(
    ("compute", "compiled", "kills", "steps"),  # of a corpus whose epoch has two or three
    [
        # The longest first, so that two processes end together.
        ("fp32", "off", 18, 100),
        ("bf16", "off", 18, 100),
        ("bf16", "on", 1, 10),
        ("fp32", "on", 1, 10),
    ],
)
def test_kills_at_any_step_cost_recompute_alone(
    tmp_path: Path, compute: str, compiled: str, kills: int, steps: int, round_: int
) -> None:
    draw = drawn(f"round {round_}")
    bucket = Bucket(tmp_path)
    data = small_corpus(tmp_path / "data")
    spec = tmp_path / "spec.json"
    spec.write_text(
        json.dumps(
            changed(
                TINY,
                data=data,
                model=ONE_LAYER if compiled == "on" else {},
                schedule={"num_iterations": steps},
                precision={"compute": compute},
                checkpoint={"every_steps": 3},
                compile=compiled,
            )
        )
    )
    assert run(bucket, "WHOLE", spec, None) == steps
    position = bucket.checkpoint("WHOLE", steps)[0].state["position"]
    assert position["epoch"] >= steps // 4  # type: ignore[index, operator, call-overload]
    reached, first = 0, spec
    for _ in range(kills):
        # Each attempt goes a little further than the one before: over all epochs, at any step.
        reached += draw.randint(2, (steps - 4) // kills)
        run(bucket, "KILLED", spec if first else None, reached, draw.uniform(0.0, LONGEST_S))
        first = None
    assert run(bucket, "KILLED", None, None) == steps
    assert len(bucket.repository("KILLED").claims()) == kills + 1
    (one, weights), (other, resumed) = (bucket.checkpoint(j, steps) for j in ("WHOLE", "KILLED"))
    assert differing(weights, resumed) == []
    assert one.state == other.state
    repository = bucket.repository("KILLED")
    current = repository.current()
    assert len({ref.step for ref in current}) == len(current), "one checkpoint a step"
    for ref in current:
        assert repository.verify(ref) == ()
    assert left_behind(bucket) == []


def left_behind(bucket: Bucket) -> list[str]:
    """Copies and checkpoints on their way that nobody will come back for."""
    cache = bucket.folder / "cache"
    return [
        str(path.relative_to(cache))
        for folder in ("spool", "restore")
        for path in (cache / folder).rglob("*")
        if path.is_file()
    ]
