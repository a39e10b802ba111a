# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package of this checkout, built once a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import capabilities, compiled
from tools.deb.build import build


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package, and a second one that differs by a later revision."""
    missing = capabilities.packaging().missing
    if missing or compiled.WANTS_PURE:
        pytest.skip(missing or "the package is built from compiled modules")
    directory = tmp_path_factory.mktemp("packages")
    build(directory / "first")
    build(directory / "second", revision="2")
    return directory
