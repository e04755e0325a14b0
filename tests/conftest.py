"""What holds for all tests.

Where every layer must run (EVERSTEP_ALL_LAYERS, as CI sets it) a skipped test is a failure, and
property tests take the same examples every time: what CI says of a commit stays true of it.
Anywhere else their examples are new ones. No example has a deadline: machines are shared.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

ALL_LAYERS = bool(os.environ.get("EVERSTEP_ALL_LAYERS"))

settings.register_profile("everstep", deadline=None, derandomize=ALL_LAYERS)
settings.load_profile("everstep")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Only a missing GPU may skip there."""
    report = yield
    if report.skipped and ALL_LAYERS and not _wants_gpu(item):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"
    return report


def _wants_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None
