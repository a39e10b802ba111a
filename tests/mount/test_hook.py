# SPDX-License-Identifier: GPL-2.0-or-later
"""The hook with functions that misbehave, and with inodes that are not its own."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.blockfile import DAMAGED_PAGE, PAGE
from tests.support.misbehaving import (
    CHECKS_KEPT,
    KEEPS_SLICE,
    KEEPS_VIEW,
    NO_ERRNO,
    NO_INT,
    NOTE_SIZE,
    NOTES,
    RAISES,
    TOO_MUCH,
)
from tests.support.mounting import KEEP_SIZE, PUNCH_HOLE, FileServer, fallocate, serving
from zswapd.fuse import lowlevel, lowlevel_problem


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "mnt", "--misbehave") as running:
        yield running


@pytest.fixture
def fd(server: FileServer) -> Iterator[int]:
    descriptor = os.open(server.path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def error_of(call: Any, *args: object) -> int:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - its errno is what is looked at
        call(*args)
    assert raised.value.errno
    return raised.value.errno


@pytest.mark.parametrize("page", [RAISES, TOO_MUCH, NO_INT, NO_ERRNO])
def test_misbehaving_function_is_eio_and_the_daemon_lives(server: FileServer, page: int) -> None:
    descriptor = os.open(server.path, os.O_RDWR)
    try:
        assert error_of(os.pread, descriptor, PAGE, page * PAGE) == errno.EIO
        assert error_of(os.pwrite, descriptor, bytes(PAGE), page * PAGE) == errno.EIO
        assert error_of(os.pread, descriptor, 7, page * PAGE) == errno.EIO
        assert os.pwrite(descriptor, b"alive", 50 * PAGE) == 5
        assert os.pread(descriptor, 5, 50 * PAGE) == b"alive"
    finally:
        os.close(descriptor)
    statistics = server.stop()["statistics"]
    assert statistics["internal_errors"] == 3
    assert statistics["request_errors"] == 3
    assert server.log.count("Exception ignored in") == 3


def test_views_that_are_kept_never_dangle(server: FileServer) -> None:
    descriptor = os.open(server.path, os.O_RDWR)
    try:
        for length in (PAGE, 3 * PAGE, 100, PAGE + 1):
            for page in (KEEPS_VIEW, KEEPS_SLICE):
                os.pread(descriptor, length, page * PAGE)
                os.pwrite(descriptor, b"k" * length, page * PAGE)
        for _ in range(100):
            os.pwrite(descriptor, os.urandom(64 * PAGE), 20 * PAGE)
            os.pread(descriptor, PAGE, CHECKS_KEPT * PAGE)
    finally:
        os.close(descriptor)
    statistics = server.stop()["statistics"]
    assert server.exit_code == 0, "it looks at them once more after the session has ended"
    assert statistics["internal_errors"] == 0


@pytest.mark.parametrize("name", sorted(NOTES))
def test_other_inodes_are_left_to_pyfuse3(server: FileServer, fd: int, name: bytes) -> None:
    note = os.open(server.mountpoint / name.decode(), os.O_RDWR)
    try:
        data = os.urandom(NOTE_SIZE)
        for start in range(0, NOTE_SIZE, 1 << 20):
            assert os.pwrite(note, data[start : start + (1 << 20)], start) == 1 << 20
            assert os.pwrite(fd, b"between", 20 * PAGE) == 7
        assert os.pread(note, 100, 5) == data[5:105]
        assert b"".join(os.pread(note, 1 << 20, start) for start in (0, 1 << 20)) == data
        assert os.pread(fd, 7, 20 * PAGE) == b"between"
        assert fallocate(note, PUNCH_HOLE | KEEP_SIZE, 0, PAGE) == errno.EOPNOTSUPP
    finally:
        os.close(note)
    assert lowlevel_problem == ""


# Reading ahead for a sequential reader.


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[tuple[FileServer, int]]:
    with serving(tmp_path / "mnt", "--size", str(2 << 20)) as running:
        descriptor = os.open(running.path, os.O_RDWR)
        try:
            yield running, descriptor
        finally:
            os.close(descriptor)


def two_in_a_row(descriptor: int, length: int, start: int) -> int:
    """Read two pieces that follow upon each other, give the daemon time for the third.

    And return where that begins.
    """
    os.pread(descriptor, length, start)
    os.pread(descriptor, length, start + length)
    time.sleep(0.005)
    return start + 2 * length


@pytest.mark.parametrize("length", [PAGE, 8 * PAGE, 1000])
def test_sequential_reader_is_read_ahead_for(reader: tuple[FileServer, int], length: int) -> None:
    server, descriptor = reader
    data = os.urandom(64 * length)
    for start in range(0, len(data), length):
        os.pwrite(descriptor, data[start : start + length], start)

    read = b""
    for start in range(0, len(data), length):
        read += os.pread(descriptor, length, start)
        time.sleep(0.002)

    assert read == data
    statistics = stop(server, descriptor)
    # Nearly all of them on a quiet machine; on a busy one the reader is sometimes there first.
    assert statistics["reads_ahead_hits"] >= 31
    assert statistics["read_bytes"] == len(data)


@pytest.mark.parametrize(
    ("at", "length"),
    [(0, 8 * PAGE), (0, 1), (8 * PAGE - 1, 1), (-PAGE, 2 * PAGE), (7 * PAGE, 3 * PAGE)],
)
def test_write_to_what_was_read_ahead_is_seen(
    reader: tuple[FileServer, int], at: int, length: int
) -> None:
    server, descriptor = reader
    image = bytearray(os.urandom(64 * PAGE))
    os.pwrite(descriptor, image, 0)
    third = two_in_a_row(descriptor, 8 * PAGE, 8 * PAGE)

    new = os.urandom(length)
    os.pwrite(descriptor, new, third + at)
    image[third + at : third + at + length] = new

    assert os.pread(descriptor, 8 * PAGE, third) == image[third : third + 8 * PAGE]
    statistics = stop(server, descriptor)
    assert statistics["reads_ahead"] >= 1
    assert statistics["reads_ahead_hits"] == 0


def test_discard_of_what_was_read_ahead_is_seen(reader: tuple[FileServer, int]) -> None:
    server, descriptor = reader
    os.pwrite(descriptor, b"x" * 64 * PAGE, 0)
    third = two_in_a_row(descriptor, 8 * PAGE, 0)

    assert fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, third + 3 * PAGE, PAGE) == 0

    assert os.pread(descriptor, 8 * PAGE, third) == b"x" * 3 * PAGE + bytes(PAGE) + b"x" * 4 * PAGE
    assert stop(server, descriptor)["reads_ahead"] >= 1


def test_write_beside_what_was_read_ahead_leaves_it(reader: tuple[FileServer, int]) -> None:
    server, descriptor = reader
    os.pwrite(descriptor, b"x" * 64 * PAGE, 0)
    third = two_in_a_row(descriptor, 8 * PAGE, 0)

    os.pwrite(descriptor, b"y" * PAGE, third - PAGE)
    os.pwrite(descriptor, b"y" * PAGE, third + 8 * PAGE)

    assert os.pread(descriptor, 8 * PAGE, third) == b"x" * 8 * PAGE
    assert stop(server, descriptor)["reads_ahead_hits"] == 1


def test_nothing_is_read_ahead_past_the_end_for_random_or_long_reads(
    reader: tuple[FileServer, int],
) -> None:
    server, descriptor = reader
    two_in_a_row(descriptor, PAGE, (2 << 20) - 2 * PAGE)  # ends where the file does
    for page in (7, 3, 9, 1):
        os.pread(descriptor, PAGE, page * PAGE)
        time.sleep(0.002)
    two_in_a_row(descriptor, 64 * PAGE, 0)

    statistics = stop(server, descriptor)
    assert statistics["reads_ahead"] <= 1  # that at the end of the file, which has nothing to give
    assert statistics["reads_ahead_hits"] == 0
    assert statistics["request_errors"] == 0


def test_failure_ahead_of_a_reader_is_not_his(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", "--size", str(2 << 20)) as server:
        descriptor = os.open(server.path, os.O_RDONLY)
        try:
            damaged = two_in_a_row(descriptor, PAGE, (DAMAGED_PAGE + 1 - 4) * PAGE)
            assert (
                damaged == (DAMAGED_PAGE - 1) * PAGE
            )  # a bug, and the page behind it is the damaged one
            assert error_of(os.pread, descriptor, PAGE, damaged) == errno.EIO
            assert len(os.pread(descriptor, PAGE, damaged - PAGE)) == PAGE
        finally:
            os.close(descriptor)
        assert server.stop()["statistics"]["request_errors"] == 1


def stop(server: FileServer, descriptor: int) -> dict[str, Any]:
    """End a server whose file is still open here, and return its counters."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, descriptor)
    os.close(null)
    statistics: dict[str, Any] = server.stop()["statistics"]
    return statistics


# The module, without a session.


@pytest.fixture
def hook() -> Iterator[Any]:
    assert lowlevel is not None, lowlevel_problem
    yield lowlevel
    lowlevel.detach()


def attach(hook: Any, **changed: int) -> None:
    arguments = {"poll_us": 0, "budget_us": 0, "max_io": 1 << 20, "max_background": 1, **changed}
    hook.attach(print, print, print, **arguments)


def test_attach_twice_is_refused_and_detach_allows_it_again(hook: Any) -> None:
    attach(hook)
    with pytest.raises(RuntimeError, match="already attached"):
        attach(hook)
    hook.detach()
    hook.detach()
    attach(hook)
    assert hook.hooked() is False


@pytest.mark.parametrize(
    "changed",
    [
        {"max_io": 0},
        {"max_io": 5000},
        {"max_io": 1 << 30},
        {"max_background": 0},
        {"max_background": 1 << 16},
    ],
)
def test_attach_with_impossible_numbers_is_refused(hook: Any, changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_io|max_background"):
        attach(hook, **changed)
    attach(hook)


def test_inode_numbers_have_a_limit(hook: Any) -> None:
    hook.add_inode(65535)
    hook.remove_inode(65535)
    hook.remove_inode(1 << 40)
    with pytest.raises(ValueError, match="below 65536"):
        hook.add_inode(65536)
    for number in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            hook.add_inode(number)


def test_attach_gives_the_references_back(hook: Any) -> None:
    import sys

    def function() -> None: ...

    before = sys.getrefcount(function)
    for _ in range(3):
        hook.attach(
            function, function, function, poll_us=0, budget_us=0, max_io=1 << 20, max_background=1
        )
        assert sys.getrefcount(function) == before + 3
        hook.detach()
    assert sys.getrefcount(function) == before


def test_every_counter_is_reported(hook: Any) -> None:
    attach(hook)
    counters = hook.statistics()
    assert set(counters.values()) == {0}
    assert len(counters) == 25
    assert hook.latencies() == (((0,) * 21, 0),) * 2


def test_a_mebibyte_is_one_request(tmp_path: Path) -> None:
    """256 pages (max_pages), which takes a buffer that begins with a page.

    32 are the kernel's own limit.
    """
    with serving(tmp_path / "mnt") as running, mmap.mmap(-1, 1 << 20) as buffer:
        buffer[:] = bytes(range(256)) * 4096
        descriptor = os.open(running.path, os.O_RDWR)
        assert os.pwritev(descriptor, [buffer], 0) == 1 << 20
        assert os.preadv(descriptor, [buffer], 0) == 1 << 20
        os.close(descriptor)
        assert buffer[:] == bytes(range(256)) * 4096
        statistics = running.stop()["statistics"]
    assert (statistics["writes"], statistics["written_bytes"]) == (1, 1 << 20)
    assert (statistics["reads"], statistics["read_bytes"]) == (1, 1 << 20)


def test_one_request_in_64_is_timed(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as running:
        descriptor = os.open(running.path, os.O_RDWR)
        for number in range(64 * 3):
            os.pwrite(descriptor, bytes(PAGE), number % 50 * PAGE)
        for number in range(64 * 5):
            os.pread(descriptor, PAGE, number * 7 % 50 * PAGE)
        os.close(descriptor)
        statistics = running.stop()["statistics"]
    # which requests come before ours, through this file system or for it, does not matter by more
    # than one
    assert sum(statistics["write_latency"]["counts"]) in {3, 4}
    assert sum(statistics["read_latency"]["counts"]) in {4, 5, 6}
    for name in ("read_latency", "write_latency"):
        counts, seconds = statistics[name]["counts"], statistics[name]["seconds"]
        bounds = [1e-6 * 2**place for place in range(len(counts) - 1)]
        least = sum(count * bound / 2 for count, bound in zip(counts[1:], bounds[1:], strict=False))
        assert (
            least
            <= seconds
            <= sum(count * bound for count, bound in zip(counts, bounds, strict=False))
            + counts[-1] * 60
        )
