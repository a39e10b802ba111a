# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounted files for the tests of this directory; all of them carry the marker `mount`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import ALLOCATORS, FileServer, serving

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mount)


@pytest.fixture(params=["memory"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileServer]:
    """A mounted file over plain memory.

    Tests whose parameter is one of ALLOCATORS get one over a core with that pair of allocators.
    """
    options = ["--allocators", request.param] if request.param in ALLOCATORS else []
    with serving(tmp_path / "mnt", *options) as running:
        yield running
