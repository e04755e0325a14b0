"""Metrics against what is shown and alerted on, both ways; alerts against the runbook."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
RUNBOOK = ROOT / "docs/runbook.md"
SCRAPES = ROOT / "deploy/prometheus/prometheus.yml"
# A metric of ours that is neither shown nor alerted on, and why.
UNSHOWN: dict[str, str] = {
    "everstep_stopping": "containers read it while they stop (deploy/bin/stop-last)",
}
# Series of a metric beside those of its own name.
PARTS = ("_total", "_bucket", "_count", "_sum", "_created")


def exported() -> set[str]:
    """Every metric of the service, by family: without _total, _bucket and the like."""
    registry = CollectorRegistry()
    Metrics(registry)
    return {family.name for family in registry.collect()}


def named(expression: str) -> set[str]:
    """Every family of ours that an expression names."""
    return {family(name) for name in re.findall(r"\beverstep_[a-z0-9_]+", expression)}


def family(name: str) -> str:
    for part in PARTS:
        name = name.removesuffix(part)
    return name


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def shown(path: Path) -> Iterator[str]:
    """Every query of a dashboard."""
    dashboard = json.loads(path.read_text())
    for panel in panels(dashboard):
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["expr"] for each in dashboard["annotations"]["list"] if "expr" in each)
    yield from (each["definition"] for each in dashboard["templating"]["list"])


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def used() -> set[str]:
    expressions = [each for path in DASHBOARDS for each in shown(path)]
    expressions += [rule["expr"] for rule in alerts()]
    return {name for expression in expressions for name in named(expression)}


def test_every_metric_that_is_shown_or_alerted_on_is_exported() -> None:
    assert sorted(used() - exported()) == []


def test_every_exported_metric_is_shown_or_alerted_on() -> None:
    assert sorted(exported() - used() - set(UNSHOWN)) == []
    assert sorted(set(UNSHOWN) & used()) == [], "shown after all: take it off the list"


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    entries = re.findall(r"^## (Everstep\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(rule["alert"] for rule in alerts())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_the_provisioned_source_and_fit_their_grid(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    sources = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    uid = yaml.safe_load(sources.read_text())["datasources"][0]["uid"]
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        assert panel["datasource"]["uid"] == uid
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))


def test_alerts_ask_for_jobs_that_are_scraped() -> None:
    scraped = {job["job_name"] for job in yaml.safe_load(SCRAPES.read_text())["scrape_configs"]}
    asked = set(re.findall(r'\bjob="(\w+)"', ALERTS.read_text()))
    assert asked == scraped
