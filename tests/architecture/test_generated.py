"""What is generated is what its source says: stubs of the .proto, the page of the metrics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.metrics_page import page

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


def test_the_page_of_metrics_is_that_of_the_code() -> None:
    described = Metrics(CollectorRegistry()).descriptions()
    written = (ROOT / "docs/metrics.md").read_text()
    assert page(described) == written, "run `make metrics-page`"


def test_the_page_leaves_no_metric_out() -> None:
    registry = CollectorRegistry()
    described = Metrics(registry).descriptions()
    assert [each.name for each in described] == sorted(each.name for each in registry.collect())


def test_every_metric_says_what_it_means_and_counters_alone_are_totals() -> None:
    for each in Metrics(CollectorRegistry()).descriptions():
        assert each.text.endswith("."), each.name
        assert "|" not in each.text, each.name
        assert not each.name.endswith("_total"), each.name
