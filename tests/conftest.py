"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with launches of torchrun first: they take longest, and no process of `pytest -n` should end with one."""
    launches = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in launches)
