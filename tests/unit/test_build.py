"""What a node says that it runs, and what keeps one out of use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.contract import build
from trainer.contract.build import PREFIX, difference, labels


def test_this_machine_names_what_it_runs_in_labels_that_ray_takes() -> None:
    found = labels()
    assert {PREFIX + name for name in ("python", "everstep", "torch", "ray")} <= found.keys()
    for value in found.values():
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", value)
    told = subprocess.run(
        [sys.executable, "-m", "trainer.contract.build"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert dict(pair.split("=") for pair in told.split(",")) == found


def test_an_image_names_the_commit_that_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILT_FROM", tmp_path / "built_from.txt")
    assert PREFIX + "commit" not in labels()
    (tmp_path / "built_from.txt").write_text("0123abc-dirty\n")
    assert labels()[PREFIX + "commit"] == "0123abc-dirty"


def test_equal_and_silent_nodes_are_taken_and_others_are_told_why_not() -> None:
    ours = {PREFIX + "everstep": "2.0", PREFIX + "torch": "2.13.0_cu128"}
    assert difference(ours, ours) == ""
    assert difference({}, ours) == ""
    other = {**ours, PREFIX + "torch": "2.12.0", "ray.io/accelerator-type": "H100"}
    assert difference(other, ours) == "it runs torch 2.12.0 instead of 2.13.0_cu128"
