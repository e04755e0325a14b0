"""The same stack as the integration tests' one, broken harder."""

from tests.integration.conftest import client, stack

__all__ = ["client", "stack"]
