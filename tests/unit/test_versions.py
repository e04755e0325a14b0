"""The commit that checkpoints name: of a working tree, of an image, or none."""

from __future__ import annotations

import subprocess
from pathlib import Path

from trainer.versions import commit, running_versions


def git(folder: Path, *words: str) -> str:
    told = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *told, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_working_tree_names_its_commit_and_whether_it_was_edited(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    built_from = tmp_path / "built_from.txt"
    built_from.write_text("of an image\n")
    (tmp_path / ".git" / "info" / "exclude").write_text("built_from.txt\n")
    assert commit(tmp_path, built_from) == {"git": head}, "the tree itself, not what was left there"
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path, built_from) == {"git": f"{head}-dirty"}


def test_an_image_names_what_it_was_built_from(tmp_path: Path) -> None:
    built_from = tmp_path / "built_from.txt"
    assert commit(tmp_path, built_from) == {}
    built_from.write_text("")
    assert commit(tmp_path, built_from) == {}
    built_from.write_text("0123abc-dirty\n")
    assert commit(tmp_path, built_from) == {"git": "0123abc-dirty"}


def test_every_version_is_named() -> None:
    assert {"everstep", "torch", "python"} <= running_versions().keys()
