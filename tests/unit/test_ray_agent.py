"""The agent's words on a host: dead only where Ray says so, and one odd host hides no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from service.ray_cluster import Agent

KNOWN = {"job_id": "JOB1", "host_number": 2}
SILENT = {**KNOWN, "answered": False, "finished": False, "results": []}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (exceptions.GetTimeoutError("no answer yet"), SILENT),
        (exceptions.ActorUnavailableError("out of reach for a moment", None), SILENT),
        (exceptions.RayTaskError("status", "traceback", KeyError("another version")), SILENT),
        (exceptions.ActorDiedError(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_host_is_gone_only_where_ray_says_that_it_is_dead(
    error: Exception, status: dict[str, Any] | None
) -> None:
    def get(_answer: object, timeout: float) -> None:
        raise error

    agent = object.__new__(Agent)
    agent._ray = SimpleNamespace(get=get, exceptions=exceptions)
    assert agent._status("host-JOB1-2", None) == status
