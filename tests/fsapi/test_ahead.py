# SPDX-License-Identifier: GPL-2.0-or-later
"""Slots that are read ahead: which readers cause it, how many slots, and when they are let go."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.support.backed import SWAP, Files
from tests.support.strategies import page
from zswapd.core.backing.readahead import READS, AheadStatistics

PAGE = 4096
PAGES = 128
WINDOW = 16
AT_ONCE = 4
"""Pages of a request."""


@pytest.fixture
def files() -> Iterator[Files]:
    """A swap file that is on the disk."""
    made = Files(PAGES, buffers=96, ahead=WINDOW)
    made.core.zv.limit_frames = 0
    for first in range(0, PAGES, WINDOW):
        made.write(first * PAGE, data(first, WINDOW))
        made.settle()
    yield made
    made.close()


def data(first: int, count: int) -> bytes:
    return b"".join(page("noise", number, PAGE) for number in range(first, first + count))


def statistics(files: Files) -> AheadStatistics:
    return files.operations.aheads[SWAP].statistics()


def read(files: Files, first: int, count: int = AT_ONCE) -> bool:
    """Read some pages, which have to be right; return whether they were there at once."""
    request = files.read(first * PAGE, count * PAGE)
    at_once = request in files.answers
    files.settle()
    assert files.answers[request] == data(first, count)
    return at_once


def start(files: Files) -> int:
    """Read in order until something is read ahead; return the next page."""
    for number in range(READS):
        assert not read(files, number * AT_ONCE)
    assert statistics(files).held == 1
    return READS * AT_ONCE


def test_reader_in_order_finds_what_he_asks_for(files: Files) -> None:
    first = start(files)
    before = files.transfers.statistics()
    assert all(read(files, number) for number in range(first, PAGES, AT_ONCE))
    after = files.transfers.statistics()
    assert after.bd_reads == PAGES, "each page once"
    assert after.read_requests - before.read_requests <= (PAGES - first) // WINDOW
    assert statistics(files).pages == PAGES - first
    assert statistics(files).let_go == 0


def test_who_reads_here_and_there_has_nothing_read_for_him(files: Files) -> None:
    for number in (5, 70, 9, 40, 41, 3, 90, 20):
        read(files, number, 1)
    assert statistics(files) == AheadStatistics(0, 0, 0, 0)
    assert files.transfers.statistics().bd_reads == 8
    start(files)
    read(files, 100)
    assert statistics(files).held == 0
    assert files.transfers.is_idle()


def test_hook_that_asks_ahead_and_finds_nothing_is_no_reader(files: Files) -> None:
    first = start(files)
    files.unique, kept = 0, files.unique
    assert (
        files.operations.serve_read(SWAP, 90 * PAGE, memoryview(bytearray(PAGE))) == -errno.EAGAIN
    )
    files.unique = kept
    assert read(files, first), "he is still followed"


def test_what_is_written_meanwhile_is_what_is_read(files: Files) -> None:
    first = start(files)
    new = page("noise", 999, PAGE)
    request = files.write((first + 1) * PAGE, new)
    assert statistics(files) == AheadStatistics(1, WINDOW, 1, 0), "its slot is free to be written"
    files.settle()
    assert files.answers[request] == PAGE
    assert files.get(first + 1) == new
    assert files.get(first) == data(first, 1)


def test_write_waits_for_a_window_that_is_still_being_read(files: Files) -> None:
    for number in range(READS - 1):
        read(files, number * AT_ONCE)
    last = files.read((READS - 1) * AT_ONCE * PAGE, AT_ONCE * PAGE)
    own, window = files.disk.waiting
    new = page("noise", 999, PAGE)
    number = READS * AT_ONCE + 1
    files.disk.waiting[:] = [own]
    files.disk.finish_all()
    assert last in files.answers, "nobody waits for what is read ahead"
    request = files.write(number * PAGE, new)
    assert not files.disk.waiting, "a slot is not written while it is read"
    reader = files.read(number * PAGE, PAGE)
    assert files.answers[reader] == new
    files.disk.waiting.append(window)
    files.settle()
    assert files.answers[request] == PAGE
    assert files.get(number) == new
    assert files.disk.slots[number] == new
    assert files.transfers.is_idle()


def test_discarded_page_is_zeros(files: Files) -> None:
    first = start(files)
    files.discard(first * PAGE, PAGE)
    assert files.get(first) == bytes(PAGE)


def test_bad_sector_is_an_error_for_its_own_reader_only(
    files: Files, expect_log: Callable[..., None]
) -> None:
    bad = READS * AT_ONCE + 6
    expect_log(f"page {bad} of swap cannot be read", level=logging.ERROR)
    files.disk.bad = {bad}
    for number in range(READS):
        read(files, number * AT_ONCE)
    for number in range(READS * AT_ONCE, PAGES):
        if number == bad:
            assert files.get(number) == -errno.EIO
        else:
            read(files, number, 1)
    assert files.transfers.trouble == ""


def test_what_could_not_be_read_ahead_is_read_again(files: Files) -> None:
    files.disk.bad = {READS * AT_ONCE + 6}
    for number in range(READS):
        read(files, number * AT_ONCE)
    files.disk.bad = set()
    assert all(isinstance(files.get(number), bytes) for number in range(READS * AT_ONCE, PAGES))


def test_window_is_let_go_of_when_its_reader_comes_no_more(files: Files) -> None:
    start(files)
    files.operations.look()
    assert statistics(files).held == 1
    files.operations.look()
    assert statistics(files).held == 0
    assert files.transfers.is_idle()
    assert files.transfers.statistics().free_buffers == files.transfers.buffers


def test_others_have_half_of_the_buffers() -> None:
    files = Files(PAGES, buffers=2 * WINDOW - 2, ahead=WINDOW)
    files.core.zv.limit_frames = 0
    for number in range(0, PAGES, AT_ONCE):
        files.write(number * PAGE, data(number, AT_ONCE))
        files.settle()
    assert not any(read(files, number) for number in range(0, PAGES // 2, AT_ONCE))
    assert statistics(files).windows == 0
    files.close()


def test_nothing_is_read_ahead_of_a_device_in_trouble(files: Files) -> None:
    for number in range(READS - 1):
        read(files, number * AT_ONCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(files.transfers), "trouble", "it burns")
        assert not read(files, (READS - 1) * AT_ONCE)
    assert statistics(files).windows == 0
