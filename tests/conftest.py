"""How the tests are spread over pytest-xdist's workers (``make test``)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays on one worker, for its fixtures, and so do all files that ask the one running stack."""
    for item in items:
        group = "stack" if "stack" in getattr(item, "fixturenames", ()) else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
