# SPDX-License-Identifier: GPL-2.0-or-later
"""The program of an earlier release from the repository's history, with its own C extensions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BEFORE = "0f2d3718b9269cd915ccf9b404e5643899023490"
"""Commit of the release before this one."""
LIMIT_S = 300


class MissingReleaseError(Exception):
    """The checkout lacks the history: it is an sdist or a shallow clone."""


def checkout(commit: str = BEFORE) -> Path:
    """Return a directory with the program at `commit`, ready to run as plain Python.

    The directory is beside the tests' own directories, and later runs use it again.

    Raises:
        MissingReleaseError: this checkout has no such commit.
    """
    root = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir())
    place = root / f"zswapd-release-{commit[:12]}-{sys.implementation.cache_tag}-{os.geteuid()}"
    if place.exists():
        return place
    git = ["git", "-C", str(TOP), "-c", f"safe.directory={TOP}"]
    try:
        subprocess.run(
            [*git, "cat-file", "-e", f"{commit}^{{commit}}"],
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingReleaseError(
            f"the repository's history is not here: no commit {commit[:12]}"
        ) from error
    fresh = Path(
        tempfile.mkdtemp(prefix="zswapd-release-", dir=root)
    )  # two runs may build at once; the rename is atomic
    try:
        archive = subprocess.run(
            [*git, "archive", commit], check=True, capture_output=True, timeout=LIMIT_S
        ).stdout
        subprocess.run(["tar", "-x", "-C", str(fresh)], input=archive, check=True, timeout=LIMIT_S)
        _build(fresh)
        try:
            fresh.rename(place)
        except OSError:  # another run was faster
            shutil.rmtree(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return place


def _build(tree: Path) -> None:
    """Build the C extensions in place; without mypyc, which takes minutes."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "ZSWAPD_PURE": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


class Installed:
    """A place on PYTHONPATH with the installed program, which can be exchanged.

    Args:
        link: the path, which becomes a symbolic link.
        tree: the tree that is installed at first.
    """

    def __init__(self, link: Path, tree: Path) -> None:
        self.link = link
        link.symlink_to(tree)

    def exchange(self, tree: Path) -> None:
        """Install another tree in its place, in one step."""
        fresh = self.link.with_suffix(".fresh")
        fresh.symlink_to(tree)
        fresh.replace(self.link)


@pytest.fixture(scope="session")
def release_before() -> Path:
    """Return the tree of the release before; skip the test if the history is missing."""
    try:
        return checkout()
    except MissingReleaseError as error:
        pytest.skip(str(error))
