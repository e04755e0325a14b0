"""Which software a machine has, as labels that its Ray node carries, and how two differ.

`python -m trainer.contract.build` prints the labels as `ray start --labels` takes them. Imports
nothing of what it names.

Invariant: nodes whose labels are equal run the same everstep, from the same commit where that is
known, on the same torch, Ray and Python.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PREFIX = "everstep/"
PACKAGES = ("everstep", "torch", "ray")
BUILT_FROM = Path(__file__).parents[1] / "built_from.txt"  # an image has it, a working tree has not
LABEL_LENGTH = 63  # of Ray's values, which begin and end with a letter or digit


def labels() -> dict[str, str]:
    """Of this machine; what isn't installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if BUILT_FROM.is_file():
        found["commit"] = BUILT_FROM.read_text().strip()
    plain = {name: re.sub(r"[^A-Za-z0-9.-]", "_", text) for name, text in found.items()}
    return {PREFIX + name: text[:LABEL_LENGTH].strip("._-") for name, text in plain.items() if text}


def difference(node: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """How a node's software differs from ours, in words; empty: it doesn't, as far as it says."""
    told = [
        f"{name.removeprefix(PREFIX)} {node[name]} instead of {value}"
        for name, value in ours.items()
        if node.get(name, value) != value
    ]
    return f"it runs {', '.join(told)}" if told else ""


if __name__ == "__main__":
    print(",".join(f"{name}={value}" for name, value in labels().items()))
