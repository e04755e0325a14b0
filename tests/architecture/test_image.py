"""What the image is made of: exact releases, and layers that a change of our code leaves alone."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
# What torch 2.13.0 of the package index wants beside what its build for the CPU wants, as pip
# resolves it (`python -m benchmarks.image_size` asks again).
CUDA = [
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "nvidia-cufft",
    "nvidia-cufile",
    "nvidia-curand",
    "nvidia-cusolver",
    "nvidia-cusparse",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13",
    "nvidia-nvtx",
    "triton",
]
OUR_CODE = {"README.md", "everstep", "trainer", "service"}


def stages() -> dict[str, list[str]]:
    """A stage's instructions, by its name."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    found: dict[str, list[str]] = {}
    for line in joined.splitlines():
        if began := re.match(r"FROM \S+ AS (\w+)", line):
            found[began[1]] = []
        elif re.match(r"[A-Z]+ ", line):
            found[next(reversed(found))].append(" ".join(line.split()))
    return found


def copied(instruction: str) -> set[str]:
    """The sources of a COPY from the clone."""
    words = instruction.split()
    return set(words[1:-1]) if words[0] == "COPY" and "--from=" not in instruction else set()


def test_cuda_and_what_builds_is_pinned_exactly() -> None:
    assert sorted(set(CUDA) - set(PINS)) == []
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == [f"setuptools=={PINS['setuptools']}"]
    assert "pip" in PINS
    installs = re.findall(r"pip install [^&|]*", re.sub(r"\\\n", " ", DOCKERFILE))
    assert installs
    for command in installs:
        assert "-c constraints.txt" in command or "--no-index" in command, command


def test_dependencies_are_installed_before_any_of_our_code_is_there() -> None:
    first = stages()["dependencies"]
    assert any("pip install" in each for each in first)
    assert {source for each in first for source in copied(each)} == {
        "pyproject.toml",
        "constraints.txt",
        "deploy/bin/requirements.py",
    }
    assert not any(re.search(r"pip (install|download)", each) for each in stages()["code"])


def test_what_changes_most_comes_last_in_the_image() -> None:
    last = stages()["everstep"]
    code = next(i for i, each in enumerate(last) if "--from=code" in each)
    for heavy in ("apt-get", "--from=dependencies"):
        assert next(i for i, each in enumerate(last) if heavy in each) < code
    assert not any(copied(each) & OUR_CODE for each in last), "the code comes as a wheel"
