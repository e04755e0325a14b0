"""Which code runs: the versions that every checkpoint names.

Knows no jobs. The git commit is that of the working tree, or what the image was built from.

Invariant: a commit is named only where it is known to be that of the code that runs.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUILT_FROM = Path(__file__).with_name("built_from.txt")  # an image has it, a working tree has not
GIT_S = 10.0


def running_versions() -> dict[str, str]:
    """everstep, torch and python; git, with -dirty where it was edited, absent where unknown."""
    return {
        "everstep": version("everstep"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **commit(ROOT, BUILT_FROM),
    }


def commit(root: Path, built_from: Path) -> dict[str, str]:
    """The git commit of the code in root, or the one that the file names; empty if unknown."""
    if not (root / ".git").exists():  # installed: a repository around that folder isn't ours
        named = built_from.read_text().strip() if built_from.is_file() else ""
        return {"git": named} if named else {}
    words = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git": done.stdout.strip()}
