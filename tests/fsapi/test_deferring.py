# SPDX-License-Identifier: GPL-2.0-or-later
"""What requests of the kernel become at the disk: neighbours go together, and who wants the same shares it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.backed import Files
from tests.support.strategies import page

PAGE = 4096
MANY = 16
"""Pages in the longest request."""


@pytest.fixture
def files() -> Iterator[Files]:
    """A swap file whose pool takes nothing."""
    made = Files(4 * MANY)
    made.core.zv.limit_frames = 0
    yield made
    made.close()


def data(first: int, count: int) -> bytes:
    return b"".join(page("noise", number, PAGE) for number in range(first, first + count))


def test_pages_of_one_write_that_the_pool_refuses_go_out_in_one_request(files: Files) -> None:
    request = files.write(8 * PAGE, data(8, MANY))
    assert len(files.disk.waiting) == 1
    assert request not in files.answers
    files.settle()
    assert files.disk.writes == [(8, MANY)]
    assert files.answers[request] == MANY * PAGE


def test_neighbours_are_read_in_one_request_which_their_readers_share(files: Files) -> None:
    files.write(0, data(0, MANY))
    files.settle()
    requests = [files.read(0, MANY * PAGE), files.read(3 * PAGE, 4 * PAGE), files.read(0, MANY * PAGE)]
    assert len(files.disk.waiting) == 1
    files.settle()
    assert [files.answers[request] for request in requests] == [data(0, MANY), data(3, 4), data(0, MANY)]
    assert files.transfers.statistics().bd_reads == MANY
