"""What the doctor says of this machine, and of machines that aren't at hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import doctor
from service.doctor import Finding, State, clock, driver_fits, free_memory
from service.settings import Settings
from tests.fakes.memory_store import MemoryObjectStore
from tests.fakes.unsuitable_stores import (
    ForgetfulStore,
    KeepingStore,
    PartlessStore,
    RangelessStore,
    StaleListStore,
    TornStore,
    UnconditionalStore,
    UndeletingStore,
)

GIB = 1 << 30


def run(state: Path, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The command; its exit status, and findings by check."""
    done = subprocess.run(
        [sys.executable, "-m", "everstep.cli", "doctor", "--state", str(state), "-o", "json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)["findings"]
    return done.returncode, {each["check"]: each for each in found}


def test_a_sound_store_passes_and_is_left_empty(tmp_path: Path) -> None:
    status, found = run(tmp_path / "state", EVERSTEP_STORAGE=f"file:{tmp_path}/bucket")
    assert status == 0, found
    assert found["versions"]["state"] == "ok"
    assert "ray 2.60" in found["versions"]["found"]
    for check in ("store", "clock", "grpc port", "encryption"):
        assert found[check]["state"] == "ok", found[check]
    assert found["ray"]["state"] == "skipped"
    assert [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == []
    assert not (tmp_path / "state").exists(), "looking changes nothing"


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, found = run(
            tmp_path / "state",
            EVERSTEP_STORAGE=f"file:{tmp_path}/file",
            EVERSTEP_LISTEN=f"127.0.0.1:{port}",
            EVERSTEP_TLS=str(tmp_path / "nowhere"),
        )
    assert status == 1
    assert found["store"]["state"] == "failed"
    assert found["grpc port"]["found"] == f"127.0.0.1:{port} is taken"
    assert "EVERSTEP_LISTEN" in found["grpc port"]["advice"]
    assert "server.crt can't be read" in found["encryption"]["found"]
    assert found["metrics port"]["state"] == "ok"


@pytest.mark.parametrize(
    ("driver_cuda", "wheel", "usable", "state", "words"),
    [
        ((13, 0), "13.0", True, State.OK, ""),
        ((13, 0), "12.8", True, State.OK, ""),
        ((12, 4), "12.8", True, State.OK, ""),
        ((12, 4), "13.0", False, State.FAILED, "update the NVIDIA driver"),
        ((13, 0), None, False, State.FAILED, "a build for the CPU"),
        ((13, 0), "13.0", False, State.FAILED, "can't use the GPU"),
    ],
)
def test_driver_against_the_cuda_of_torch(
    driver_cuda: tuple[int, int], wheel: str | None, usable: bool, state: State, words: str
) -> None:
    found = driver_fits("580.65", driver_cuda, wheel, usable)
    assert found.state is state
    assert words in found.advice


def test_a_desktop_that_holds_memory_is_warned_of() -> None:
    assert free_memory(0, "RTX 4070", int(11.2 * GIB), 12 * GIB).state is State.OK
    full = free_memory(0, "RTX 4070", 8 * GIB, 12 * GIB)
    assert full.state is State.WARNING
    assert "nvidia-smi" in full.advice
    assert free_memory(0, "small", 5 * GIB, 5 * GIB).state is State.OK


def test_clocks_that_differ_are_told_from_those_that_agree() -> None:
    states = [clock(seconds).state for seconds in (0.9, -1.5, 30, -30, 400)]
    assert states == [State.OK, State.OK, State.WARNING, State.WARNING, State.FAILED]
    assert "30 s ahead of" in clock(30).found
    assert "30 s behind" in clock(-30).found


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_size: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(doctor.shutil, "disk_usage", broken)
    found = [*doctor.examine(Settings(state=tmp_path))]
    assert Finding("disks", State.FAILED, "OSError: no such device") in found
    assert any(each.check == "grpc port" for each in found), "the others went on"


def command(folder: Path, name: str, script: str) -> None:
    """A program of that name, found first."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("docker", "state", "words"),
    [
        ('echo \'{"nvidia": {}, "runc": {}}\'', State.OK, "knows"),
        ("echo '{\"runc\": {}}'", State.FAILED, "nvidia-ctk runtime configure"),
        ("exit 1", State.WARNING, "start it"),
    ],
)
def test_whether_docker_can_hand_out_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker: str, state: State, words: str
) -> None:
    command(tmp_path, "nvidia-smi", "exit 0")
    command(tmp_path, "docker", docker)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = doctor.container_toolkit(Settings())
    assert finding.state is state
    assert words in finding.found + finding.advice


@pytest.mark.parametrize(
    ("free", "state"), [(1 * GIB, State.FAILED), (10 * GIB, State.WARNING), (99 * GIB, State.OK)]
)
def test_whether_the_disks_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: State
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = list(doctor.disks(Settings(state=tmp_path)))
    assert [each.state for each in found] == [state, state]
    assert all(f"{free // GIB}.0 GiB free" in each.found for each in found)


def test_each_gpu_is_told_with_what_it_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    cards = [("RTX 4070", 12, 11), ("RTX 3060", 12, 2)]
    memory = [SimpleNamespace(free=free * GIB, total=of * GIB) for _, of, free in cards]
    fakes: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda index: memory[index],
        "nvmlDeviceGetName": lambda index: cards[index][0],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: ("13.0", True))
    found = list(doctor.gpus(Settings()))
    assert [(each.check, each.state) for each in found] == [
        ("gpu driver", State.OK),
        ("gpu 0", State.OK),
        ("gpu 1", State.WARNING),
    ]
    assert found[2].found == "RTX 3060: 2.0 GiB free of 12.0 GiB"


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (ForgetfulStore(), "a conditional write (PUT if-none-match) does not work"),
        (UnconditionalStore(), "a conditional write (PUT if-none-match) failed: NotImplemented"),
        (RangelessStore(), "a ranged read does not work"),
        (StaleListStore(), "a listing right after the write does not work"),
        (UndeletingStore(), "a deletion failed: AccessDenied"),
        (KeepingStore(), "a deletion does not work"),
        (PartlessStore(), "a multipart write failed: NotImplemented"),
        (TornStore(), "a multipart write does not last"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MemoryObjectStore) else "",
)
def test_a_store_that_lacks_something_is_refused_by_its_name(
    store: MemoryObjectStore, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "open_store", lambda _uri: store)
    found = list(doctor.store(Settings(state=tmp_path, storage="s3://bucket")))
    assert [(each.check, each.state) for each in found] == [("store", State.FAILED)]
    assert words in found[0].found
    assert "let its keys do what it names" in found[0].advice
    if not isinstance(store, UndeletingStore | KeepingStore):
        assert store.snapshot() == {}, "the probe leaves nothing"
