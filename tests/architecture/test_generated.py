"""What is generated from the .proto is what the .proto says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = ("everstep_pb2.py", "everstep_pb2.pyi", "everstep_pb2_grpc.py")


def test_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        str(ROOT / "proto/everstep/v1/everstep.proto"),
    ]
    subprocess.run(command, check=True)
    for name in STUBS:
        fresh = (tmp_path / "everstep/v1" / name).read_text()
        assert fresh == (ROOT / "everstep/v1" / name).read_text(), f"run `make proto`: {name}"
