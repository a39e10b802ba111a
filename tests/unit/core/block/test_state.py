# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each page is, page by page: every state, every page once, in steps that end."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.backed import Files
from tests.support.stack import Stack, build
from tests.support.strategies import page
from zswapd.core import compress
from zswapd.core.block.device import Device
from zswapd.core.block.state import PageState
from zswapd.errors import LostPageError
from zswapd.worker import page_states
from zswapd.worker.page_states import batches

PAGES = 64


@pytest.fixture
def stack(page_size: int) -> Iterator[Stack]:
    made = build(page_size, frames=128)
    yield made
    made.check()
    made.close()


def write(device: Device, number: int, data: bytes) -> None:
    device.write(number * len(data), memoryview(data))


def test_every_state_of_a_page_in_the_pool(stack: Stack, page_size: int) -> None:
    device = Device("swap", PAGES * page_size, stack.frontswap, 2, page_size=page_size)
    write(device, 3, page("words", 1, page_size))
    write(device, 5, b"same fil" * (page_size // 8))
    write(device, 7, random.Random(1).randbytes(page_size))
    write(device, 9, page("words", 2, page_size))
    stack.frontswap.freeze()
    write(device, 9, page("words", 3, page_size))
    lz4 = compress.get("lz4").codec
    size = len(compress.get("lz4").compress(memoryview(page("words", 1, page_size))))
    before = device.statistics()
    (rows,) = batches(device, PAGES)
    assert rows == [
        (3, PageState("compressed", lz4, size)),
        (5, PageState("same-filled", 0, 8)),
        (7, PageState("raw", 0, page_size)),
        (9, PageState("lost")),
    ]
    assert device.statistics() == before  # looking is no use
    with pytest.raises(LostPageError):
        device.read_into(9 * page_size, memoryview(bytearray(page_size)))


def test_states_of_pages_with_a_disk_and_when_they_were_used() -> None:
    files = Files(PAGES)
    for number in range(4):
        files.put(number, page("words", number, 4096))
    files.device.epoch = 7
    files.get(2)
    files.write_back([0, 1])
    files.settle()
    files.core.frontswap.freeze()
    request = files.write(10 * 4096, page("words", 10, 4096))
    (rows,) = batches(files.device, PAGES)
    assert [(number, state.state, state.epoch) for number, state in rows] == [
        (0, "disk", 0),
        (1, "disk", 0),
        (2, "compressed", 7),
        (3, "compressed", 2),
        (10, "writing", 0),
    ]
    files.settle()
    assert request in files.answers
    files.close()


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 1000, 5000])
def test_each_page_is_told_once_in_pieces_of_bounded_length(
    stack: Stack, page_size: int, pages: int
) -> None:
    device = Device("swap", pages * page_size, stack.frontswap, 2, page_size=page_size)
    written = sorted({0, pages // 2, pages - 1, *range(0, pages, 3)})
    for number in written:
        write(device, number, bytes([number % 256, 1, 2, 3, 4, 5, 6, 7]) * (page_size // 8))
    told = list(batches(device, pages))
    assert max(map(len, told)) <= page_states.ROWS
    assert [number for rows in told for number, _state in rows] == written


def test_a_step_ends_when_its_time_is_up_but_never_without_a_look(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("swap", 1000 * stack.page_size, stack.frontswap, 2, page_size=stack.page_size)
    assert len(list(batches(device, 1000))) < 16
    monkeypatch.setattr(page_states, "STEP_S", 0.0)
    assert list(batches(device, 1000)) == [[]] * 16  # 64 pages in each
