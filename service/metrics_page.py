"""`python -m service.metrics_page`: docs/metrics.md, written from the metrics themselves.

Invariant: the page says nothing that the code doesn't; tests/architecture compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.metrics import FORGET_AFTER_S, JOB, Description, Metrics

# By the end of the name, _total left out; the longer one first.
UNITS = {
    "timestamp_seconds": "seconds since the epoch", "seconds": "seconds", "bytes": "bytes",
    "per_second": "1/second", "ratio": "0 to 1", "watts": "watts", "celsius": "degrees Celsius",
    "joules": "joules", "tokens": "tokens", "loss": "nats a token", "smoothed": "nats a token",
    "per_byte": "bits per byte",
}  # fmt: skip
HEAD = f"""# Metrics

Written by `make metrics-page` from `service/metrics.py`; a test fails where the two differ. The
service serves them at its `/metrics`.

Series of a job carry `job_id` and `job_name`. They are there from the first value until
{FORGET_AFTER_S:.0f} seconds after the job's end, so their number is bounded by the jobs that are
not final and those that ended within that time. After a restart of the service, what "goes on"
shows what it showed before, from the database; a gauge shows the latest value that is stored, or
waits for the next; what is "from 0" counts anew, as `rate()` and `increase()` expect.

| name | type | unit | labels | meaning | after a restart |
|---|---|---|---|---|---|
"""


def page(described: Iterable[Description]) -> str:
    """The whole page."""
    return HEAD + "".join(map(_row, described))


def _row(each: Description) -> str:
    name = each.name + ("_total" if each.type == "counter" else "")
    unit = next((unit for end, unit in UNITS.items() if each.name.endswith(end)), "")
    again = "goes on" if each.kept else "from 0" if each.type != "gauge" else "latest, or next"
    labels = ", ".join(f"`{label}`" for label in each.labels if label not in JOB)
    of_job = "of a job" if each.labels[: len(JOB)] == JOB else ""
    told = " and ".join(filter(None, (of_job, labels)))
    return f"| `{name}` | {each.type} | {unit} | {told} | {each.text} | {again} |\n"


def main() -> None:
    """Write the page to the file named."""
    Path(sys.argv[1]).write_text(page(Metrics(CollectorRegistry()).descriptions()))


if __name__ == "__main__":
    main()
