# SPDX-License-Identifier: GPL-2.0-or-later
"""A page that cannot be read, as readers of the swap file see it: system calls,
and a private mapping of the file.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.test_integrity import damage
from tests.support.swap import Stage, stage, wait_for
from tests.support.swapped import PAGE, content
from tools.bench.harness.daemon import Daemon

__all__ = ["stage"]
pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

PAGES = 64
BAD = 20


@pytest.fixture
def damaged(stage: Stage) -> Iterator[tuple[Daemon, int]]:
    """A daemon, and its file with a page that cannot be read."""
    daemon = stage.daemon(size="16M")
    descriptor = os.open(daemon.file, os.O_RDWR)
    try:
        for number in range(PAGES):
            os.pwrite(descriptor, content(number), number * PAGE)
        damage(daemon, content(BAD))
        yield daemon, descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("front", [0, 1, 7, 19])
def test_read_ends_in_front_of_it(damaged: tuple[Daemon, int], front: int) -> None:
    daemon, descriptor = damaged
    first = BAD - front
    if front:
        assert os.pread(descriptor, 32 * PAGE, first * PAGE) == b"".join(
            map(content, range(first, BAD))
        )
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(descriptor, 32 * PAGE, BAD * PAGE)
    behind = os.pread(descriptor, 32 * PAGE, (BAD + 1) * PAGE)
    assert behind == b"".join(map(content, range(BAD + 1, BAD + 33)))
    wait_for(lambda: "is damaged" in daemon.log_text(), "the log does not say so")


def test_private_mapping_does_not_take_it_for_the_end_of_the_file(
    damaged: tuple[Daemon, int], tmp_path: Path
) -> None:
    """The page cache takes a short answer for the file's end;
    the loop device could read nothing behind it any more.
    """
    _daemon, descriptor = damaged
    size = os.lseek(descriptor, 0, os.SEEK_END)
    with (tmp_path / "copy").open("wb", buffering=0) as copy, contextlib.ExitStack() as undo:
        mapping = undo.enter_context(
            mmap.mmap(descriptor, PAGES * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
        )
        view = undo.enter_context(memoryview(mapping))
        failed = []
        for number in range(PAGES):
            try:  # a system call gets an error where the program would get SIGBUS
                os.pwrite(copy.fileno(), view[number * PAGE : (number + 1) * PAGE], number * PAGE)
            except OSError as error:
                failed.append((number, error.errno))
    assert failed == [(BAD, errno.EFAULT)]
    assert os.lseek(descriptor, 0, os.SEEK_END) == size
    copied = (tmp_path / "copy").read_bytes()
    assert all(
        copied[number * PAGE : (number + 1) * PAGE] == content(number)
        for number in range(PAGES)
        if number != BAD
    )
