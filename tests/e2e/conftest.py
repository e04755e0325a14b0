"""A Docker engine, and the stack of docker-compose.yml on it, from a fresh clone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import Box

ROOT = Path(__file__).parents[2]
# Where no engine runs: a disposable one that some workplaces of this project have beside the clone.
ENGINE = Path(
    os.environ.get("EVERSTEP_CONTAINER_ENGINE", ROOT.parent / "shared/tools/container-engine")
)


@pytest.fixture(scope="session")
def engine() -> dict[str, str]:
    """What points docker at an engine that works."""
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return {}
    if not ENGINE.exists():
        pytest.skip("needs a Docker engine with compose v2")
    subprocess.run([ENGINE, "up"], check=True)
    printed = subprocess.run([ENGINE, "env"], check=True, capture_output=True, text=True).stdout
    pairs = printed.removeprefix("export").split()
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture(scope="module")
def box(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The stack in its CPU form, healthy. Whatever a test did to it, nothing is left afterwards."""
    clone = tmp_path_factory.mktemp("box") / "everstep"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", clone], check=True)
    box = Box(clone, engine)
    try:
        box.up()
        yield box
    finally:
        box.compose("--profile", "*", "down", "--volumes", "--timeout", "1")
