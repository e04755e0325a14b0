"""Fixtures of the integration tests: one stack a module, which its tests may break and mend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep import Client
from tests.stack import Stack, running_stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The embedded default, running."""
    with running_stack(Path(tmp_path_factory.mktemp("stack"))) as started:
        yield started


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """A client of it."""
    with stack.client() as connected:
        yield connected
