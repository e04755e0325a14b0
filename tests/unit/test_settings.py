"""Settings that can't be used: refused by name, value and bound, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import StartError
from service.settings import Settings

GOOD = {"EVERSTEP_SECRET": "ab" * 32, "EVERSTEP_ADMIN_TOKEN": "sixteen-or-more!"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("STALL_FLOOR_S", "-1", "'-1': Input should be greater than 0"),
        ("STOP_GRACE_S", "600", "'600': Input should be less than or equal to 120"),
        ("RAY_CPUS", "many", "'many': Input should be a valid integer"),
        ("SECRET", "hunter2-hunter2", "must be 32 bytes in hex"),
        ("SECRET", "ab" * 31, "must be 32 bytes in hex"),
        ("ADMIN_TOKEN", "hunter2", "should have at least 16"),
    ],
)
def test_a_setting_is_refused_with_its_name_and_bound(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"EVERSTEP_{name}", value)
    with pytest.raises(StartError, match=f"EVERSTEP_{name}: ") as caught:
        Settings()
    assert said in str(caught.value)
    assert (value in str(caught.value)) == (name not in ("SECRET", "ADMIN_TOKEN"))


def test_what_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    made = Settings()
    assert made.secret is not None
    assert made.secret.get_secret_value() == GOOD["EVERSTEP_SECRET"]
    monkeypatch.setenv("EVERSTEP_SECRET", "")
    assert Settings().secret is None


@pytest.mark.parametrize("program", ["service", "service.doctor"])
def test_programs_say_it_in_a_line(tmp_path: Path, program: str) -> None:
    wrong = {"EVERSTEP_STALL_FLOOR_S": "0", "EVERSTEP_SECRET": "hunter2-hunter2"}
    done = subprocess.run(
        [sys.executable, "-m", program, "--state", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **wrong},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("everstep: EVERSTEP_")
    assert "EVERSTEP_STALL_FLOOR_S: '0': " in line
    assert "hunter2" not in line
