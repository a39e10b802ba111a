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


@pytest.fixture(params=["hook", "plain"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileServer]:
    """A mounted file, with the hook and without: what a user sees is the same but for discards.

    Tests that ask for it (the parameter is one of ALLOCATORS) get one over each pair of allocators,
    too.
    """
    options = ["--no-hook"] if request.param == "plain" else []
    if request.param in ALLOCATORS:
        options = ["--allocators", request.param]
    with serving(tmp_path / "mnt", *options) as running:
        assert running.first["hook_active"] is (request.param != "plain"), running.first
        yield running


@pytest.fixture
def hooked(tmp_path: Path) -> Iterator[FileServer]:
    """A mounted file with the hook."""
    with serving(tmp_path / "mnt") as running:
        assert running.first["hook_active"], running.first
        yield running
