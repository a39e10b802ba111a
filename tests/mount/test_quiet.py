# SPDX-License-Identifier: GPL-2.0-or-later
"""The log says nothing per page.

Not of pages that are stored, and not of thousands that are refused or fail.
"""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.support.swap import Stage, stage
from tools.bench.harness.daemon import Daemon

__all__ = ["stage"]
pytestmark = pytest.mark.mount

PAGES = 2000


@pytest.fixture
def daemon(stage: Stage) -> Daemon:
    return stage.daemon("64M", memory__reserve="8M", log__level="debug")


def lines(daemon: Daemon) -> int:
    return len(daemon.log_text().splitlines())


def use(daemon: Daemon, first: int) -> int:
    """Write and read many pages; return how many writes were refused."""
    refused, numbers = 0, range(first, first + PAGES)
    with daemon.file.open("r+b", buffering=0) as file:
        for number in numbers:
            try:
                os.pwrite(
                    file.fileno(), os.urandom(500) + bytes([number % 256]) * 3596, number * 4096
                )
            except OSError:
                refused += 1
        for number in numbers:
            with contextlib.suppress(OSError):
                os.pread(file.fileno(), 4096, number * 4096)
    return refused


@pytest.mark.parametrize("why", ["", "frozen", "full"])
def test_pages_are_not_worth_a_line_each(daemon: Daemon, why: str) -> None:
    assert use(daemon, 0) == 0
    if why == "frozen":
        daemon.ctl("freeze")
    elif why == "full":
        daemon.ctl("set", "pool.limit=1M")
    before = lines(daemon)
    assert (use(daemon, PAGES) > PAGES / 2) == bool(why)
    assert lines(daemon) - before <= 3, daemon.log_text()
