"""A Docker engine, and the stack of docker-compose.yml on it, from a fresh clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.box import PROJECT, Box

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests/data/corpus"
# Where no engine runs: a disposable one that some workplaces of this project have beside the clone.
ENGINE = Path(
    os.environ.get("EVERSTEP_CONTAINER_ENGINE", ROOT.parent / "shared/tools/container-engine")
)


@pytest.fixture(scope="session")
def engine() -> Iterator[dict[str, str]]:
    """What points docker at an engine that works; one that was started here ends again."""
    if _answers():
        remove_stale_stacks(dict(os.environ))
        yield {}
        return
    if not ENGINE.exists():
        pytest.skip("needs a Docker engine with compose v2")
    # A folder of its own: an engine that was killed leaves process ids that keep the next one from
    # starting. A short path: sockets lie in it.
    state = Path(tempfile.mkdtemp(prefix="engine-"))
    environment = {**os.environ, "CONTAINER_ENGINE_DIR": str(state)}
    try:
        if subprocess.run([ENGINE, "up"], env=environment, check=False).returncode:
            logged = "".join(log.read_text()[-5_000:] for log in sorted(state.glob("*.log")))
            pytest.fail(f"the engine did not start\n{logged}")
        printed = subprocess.check_output([ENGINE, "env"], env=environment, text=True)
        yield dict(pair.split("=", 1) for pair in printed.removeprefix("export").split())
    finally:
        subprocess.run([ENGINE, "down"], env=environment, check=True)
        shutil.rmtree(state, ignore_errors=True)


def _answers() -> bool:
    if shutil.which("docker") is None:
        return False
    done = subprocess.run(["docker", "version"], capture_output=True, check=False)
    return done.returncode == 0


def remove_stale_stacks(environment: dict[str, str]) -> None:
    """End stacks of test runs that were killed: an engine starts them again with itself."""
    listed = ["docker", "compose", "ls", "--all", "--format", "json"]
    printed = subprocess.run(
        listed, env=environment, check=True, capture_output=True, text=True
    ).stdout
    for project in json.loads(printed):
        name, pid = project["Name"], project["Name"].removeprefix(PROJECT)
        if pid.isdigit() and name.startswith(PROJECT) and not psutil.pid_exists(int(pid)):
            words = ["docker", "compose", "--project-name", name, "down", "--volumes"]
            subprocess.run(words, env=environment, check=True)


def nanochat_folder(base: Path) -> Path:
    """nanochat's base folder, as its own scripts leave it; the containers' user may read it."""
    (base / "base_data_climbmix").mkdir()
    (base / "tokenizer").mkdir()
    for shard in CORPUS.glob("*.parquet"):
        shutil.copyfile(shard, base / "base_data_climbmix" / shard.name)
    shutil.copyfile(CORPUS / "tokenizer/tokenizer.pkl", base / "tokenizer/tokenizer.pkl")
    for path in (base, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return base


def clone(folders: pytest.TempPathFactory) -> Path:
    """A fresh one."""
    made = folders.mktemp("box") / "everstep"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", made], check=True)
    return made


@pytest.fixture(scope="module")
def box(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The stack in its CPU form, healthy. Whatever a test did to it, nothing is left afterwards."""
    data = nanochat_folder(tmp_path_factory.mktemp("data"))
    box = Box(clone(tmp_path_factory), engine, data)
    try:
        box.follow_readme()
        yield box
    finally:
        box.remove()
