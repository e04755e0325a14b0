"""Prometheus's own tool on what we give Prometheus: configuration, alerts, and their tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

PROMETHEUS = Path(__file__).parents[2] / "deploy/prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def promtool(*words: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool, of the package prometheus")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_is_valid(tmp_path: Path) -> None:
    # As in its container, where rules lie at an absolute path.
    text = (PROMETHEUS / "prometheus.yml").read_text()
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/", f"{PROMETHEUS}/"))
    promtool("check", "config", config)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_must_and_only_then(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_is_tested_to_fire_and_to_keep_quiet() -> None:
    text = (PROMETHEUS / "alerts.yml").read_text()
    alerts = set(re.findall(r"- alert: (\w+)", text))
    cases = [
        case
        for path in TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts
