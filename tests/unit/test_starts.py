"""What a start doesn't load, for each second of it is paid by every attempt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOST = """
import sys
import ray
from ray import cloudpickle
from tests.unit.test_ray_entrypoint import CONFIG
from trainer import ray_entrypoint
ray.nodes, ray_entrypoint._own_name = list, lambda: "host"
made = ray_entrypoint._trainer(ray_entrypoint.HostConfig(**CONFIG), sys.argv[1])
told = made._get_train_func(), made.run_config, made._create_default_callbacks()
cloudpickle.loads(cloudpickle.dumps(told))  # as the controller does
print("loaded", *sorted({"ray.train", "torch"} & sys.modules.keys()))
"""


def loaded(code: str, *arguments: str) -> list[str]:
    """What a process that ran this says it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


def test_host_and_controller_load_no_torch(tmp_path: Path) -> None:
    assert loaded(HOST, str(tmp_path)) == ["ray.train"]
