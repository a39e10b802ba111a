# SPDX-License-Identifier: GPL-2.0-or-later
"""The C functions that populate and punch.

All of a range, in pieces, with the GIL released, through interruptions.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from array import array
from typing import TYPE_CHECKING

import pytest

from tests.support import capabilities
from zswapd.core.allocators._populate import populate, punch

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
SIZE = 64 << 20
WRITE = 23
"""MADV_POPULATE_WRITE"""


class Mapped:
    """A shared mapping of a file in memory, without any page yet."""

    def __init__(self, size: int = SIZE) -> None:
        self.fd = os.memfd_create("populate")
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def backed(self) -> int:
        return os.fstat(self.fd).st_blocks * 512


@pytest.fixture
def mapped() -> Iterator[Mapped]:
    mapped = Mapped()
    yield mapped
    os.close(mapped.fd)


def _minor_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("piece", [PAGE, 3 * PAGE, 16 * PAGE, SIZE])
def test_exactly_the_range_is_backed_whatever_the_piece(mapped: Mapped, piece: int) -> None:
    assert populate(mapped.fd, mapped.base, PAGE, 10 * PAGE, WRITE, piece, 0, 0, False)[0] == 0
    assert mapped.backed() == 10 * PAGE
    assert os.lseek(mapped.fd, 0, os.SEEK_DATA) == PAGE


def test_populated_pages_are_mapped(mapped: Mapped) -> None:
    assert populate(mapped.fd, mapped.base, 0, SIZE, WRITE, 16 * PAGE, 0, 0, False)[0] == 0
    before = _minor_faults()
    for offset in range(0, SIZE, PAGE):
        mapped.map[offset] = 1
    assert _minor_faults() - before < SIZE // PAGE // 10


def test_what_is_there_is_kept(mapped: Mapped) -> None:
    mapped.map[PAGE : PAGE + 4] = b"data"
    assert populate(mapped.fd, mapped.base, 0, 4 * PAGE, WRITE, PAGE, 0, 0, False)[0] == 0
    assert mapped.map[PAGE : PAGE + 4] == b"data"


def test_advice_that_the_kernel_does_not_know_is_good_enough(mapped: Mapped) -> None:
    assert populate(mapped.fd, mapped.base, 0, 4 * PAGE, 9999, PAGE, 0, 0, False)[0] == 0
    assert mapped.backed() == 4 * PAGE


def test_first_failure_is_returned_and_ends_it(mapped: Mapped) -> None:
    assert populate(-1, mapped.base, 0, PAGE, WRITE, PAGE, 0, 0, False) == (errno.EBADF, 0)
    # Address 0 is never mapped: the file gets its first page, the mapping of it fails, and no other
    # piece is tried.
    assert populate(mapped.fd, 0, 0, 4 * PAGE, WRITE, PAGE, 0, 0, False) == (errno.ENOMEM, 0)
    assert mapped.backed() == PAGE


def test_it_leaves_the_system_its_memory(mapped: Mapped) -> None:
    assert populate(mapped.fd, mapped.base, 0, SIZE, WRITE, PAGE, 0, 1 << 60, False) == (
        errno.EAGAIN,
        0,
    )
    assert mapped.backed() == 0
    assert populate(mapped.fd, mapped.base, 0, SIZE, WRITE, 16 * PAGE, 0, 1, False) == (0, SIZE)
    for _ in range(
        5
    ):  # other programs give memory back meanwhile, now and then more than it asks for
        large = Mapped(4 * SIZE)
        floor = os.sysconf("SC_AVPHYS_PAGES") * PAGE - SIZE
        error, done = populate(large.fd, large.base, 0, 4 * SIZE, WRITE, 16 * PAGE, 0, floor, False)
        assert large.backed() == done
        os.close(large.fd)
        if error and done:
            return
    pytest.fail("it never ended in the middle")


@capabilities.requires_root()
def test_what_is_in_no_hurry_is_an_idle_task_for_a_while_and_no_longer(mapped: Mapped) -> None:
    seen: list[tuple[float, int]] = []
    numbers: list[int] = []

    def work() -> None:
        numbers.append(threading.get_native_id())
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        assert populate(mapped.fd, mapped.base, 0, 12 * PAGE, WRITE, PAGE, 10_000, 1, True) == (
            0,
            12 * PAGE,
        )
        seen.append((time.monotonic(), os.sched_getscheduler(0)))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        if numbers:
            with contextlib.suppress(ProcessLookupError):
                seen.append((time.monotonic(), os.sched_getscheduler(numbers[0])))
        time.sleep(0.002)
    assert any(policy == os.SCHED_IDLE for _, policy in seen)
    assert all(
        policy == os.SCHED_RR for _, policy in sorted(seen)[-5:]
    )  # it ran for 0.12 s, with a look each 2 ms


def test_it_sleeps_between_two_pieces_and_not_after_the_last(mapped: Mapped) -> None:
    start = time.monotonic()
    assert populate(mapped.fd, mapped.base, 0, PAGE, WRITE, PAGE, 500_000, 0, False)[0] == 0
    assert time.monotonic() - start < 0.4
    assert populate(mapped.fd, mapped.base, 0, 3 * PAGE, WRITE, PAGE, 50_000, 0, False)[0] == 0
    assert time.monotonic() - start > 0.1


def test_other_threads_run_meanwhile(mapped: Mapped) -> None:
    thread = threading.Thread(
        target=populate, args=(mapped.fd, mapped.base, 0, 5 * PAGE, WRITE, PAGE, 100_000, 0, False)
    )
    thread.start()
    turns = 0
    while thread.is_alive() and turns < 10:
        time.sleep(0.001)
        turns += 1
    assert turns == 10
    thread.join()


def test_signals_that_interrupt_it_cost_nothing(mapped: Mapped) -> None:
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        assert populate(mapped.fd, mapped.base, 0, SIZE, WRITE, 64 * PAGE, 0, 0, False)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert mapped.backed() == SIZE


@pytest.mark.parametrize(("piece", "pause"), [(0, 0), (PAGE, 1_000_000)])
def test_senseless_arguments_are_refused(mapped: Mapped, piece: int, pause: int) -> None:
    with pytest.raises(ValueError, match="piece"):
        populate(mapped.fd, mapped.base, 0, PAGE, WRITE, piece, pause, 0, False)
    assert mapped.backed() == 0


def test_all_ranges_are_punched_and_nothing_else(mapped: Mapped) -> None:
    assert populate(mapped.fd, mapped.base, 0, 100 * PAGE, WRITE, SIZE, 0, 0, False) == (
        0,
        100 * PAGE,
    )
    for page in range(100):
        mapped.map[page * PAGE] = 1 + page
    assert punch(mapped.fd, array("q", [3 * PAGE, PAGE, 10 * PAGE, 20 * PAGE])) == 2
    assert mapped.backed() == 79 * PAGE
    holes = {3, *range(10, 30)}
    assert [mapped.map[page * PAGE] for page in range(100)] == [
        0 if page in holes else 1 + page for page in range(100)
    ]
    assert punch(mapped.fd, array("q")) == 0


def test_punching_ends_at_the_first_failure(mapped: Mapped) -> None:
    assert populate(mapped.fd, mapped.base, 0, 4 * PAGE, WRITE, SIZE, 0, 0, False) == (0, 4 * PAGE)
    assert punch(mapped.fd, array("q", [0, PAGE, -PAGE, PAGE, PAGE, PAGE])) == 1
    assert mapped.backed() == 3 * PAGE
    assert punch(-1, array("q", [0, PAGE])) == 0
    with pytest.raises(ValueError, match="a length"):
        punch(mapped.fd, array("q", [0, PAGE, PAGE]))
