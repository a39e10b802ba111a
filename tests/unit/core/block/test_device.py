# SPDX-License-Identifier: GPL-2.0-or-later
"""The block device: any byte range, what a refused write leaves, what a damaged page costs.

What is counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.fakes import FailingCompressor
from tests.support.stack import Stack, build
from tests.support.strategies import page
from zswapd.core import compress
from zswapd.core.block.device import Device
from zswapd.core.frontends.frontswap import MAX_OFFSET
from zswapd.core.pam.base import HEADER_BYTES, RejectReason
from zswapd.errors import CorruptedPageError, DiscardError, LostPageError

PAGES = 64


@pytest.fixture
def stack(page_size: int) -> Iterator[Stack]:
    made = build(page_size, frames=128)
    yield made
    made.check()
    made.close()


@pytest.fixture
def device(stack: Stack, page_size: int) -> Device:
    return Device("swap", PAGES * page_size, stack.frontswap, 2, page_size=page_size)


def _read(device: Device, offset: int, length: int) -> bytes:
    out = bytearray(b"\xcc") * length
    device.read_into(offset, memoryview(out))
    return bytes(out)


def _write(device: Device, offset: int, data: bytes) -> RejectReason | None:
    return device.write(offset, memoryview(data))


def _noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097, 1 << 60])
def test_impossible_size_is_refused_and_takes_no_type(stack: Stack, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Device("swap", size, stack.frontswap, 2, page_size=4096)
    stack.frontswap.init(2)  # still free


def test_largest_size_is_what_an_index_can_name(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = (MAX_OFFSET + 1) * stack.page_size
    with pytest.raises(ValueError, match=str(limit + stack.page_size)):
        Device("swap", limit + stack.page_size, stack.frontswap, 2, page_size=stack.page_size)


def test_new_device_reads_as_zeros_everywhere(device: Device, page_size: int) -> None:
    for offset, length in (
        (0, page_size),
        (5, 7),
        (page_size - 1, 2),
        ((PAGES - 2) * page_size, 2 * page_size),
    ):
        assert _read(device, offset, length) == bytes(length)
    assert device.statistics().failed_reads == 0


@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0.0, 1.0),
        (2.0, 5.0),
        (0.25, 0.5),
        (0.5, 1.0),
        (0.5, 0.5),
        (3.5, 4.0),
        (0.0, 0.001),
        (63.5, 0.5),
        (0.0, 64.0),
    ],
)
def test_written_range_reads_back_and_leaves_the_rest_alone(
    device: Device, page_size: int, start: float, length: float
) -> None:
    whole = _noise(PAGES * page_size, 7)
    if length < 60:  # a background to be left alone
        assert _write(device, 0, whole) is None
    offset, count = int(start * page_size), max(1, int(length * page_size))
    data = _noise(count, 8)
    assert _write(device, offset, data) is None
    assert _read(device, offset, count) == data
    if length < 60:
        assert (
            _read(device, 0, PAGES * page_size) == whole[:offset] + data + whole[offset + count :]
        )


def test_empty_request_does_nothing(device: Device, page_size: int) -> None:
    assert _write(device, 5, b"x" * 20) is None
    before = device.statistics()
    assert _read(device, 0, 0) == b""
    assert _write(device, page_size, b"") is None
    device.discard(5, 0)
    assert device.statistics() == before


@pytest.mark.parametrize(
    ("start", "length"),
    [(0.0, 1.0), (3.0, 10.0), (0.25, 0.5), (2.5, 1.0), (2.5, 4.25), (0.0, 64.0), (63.9, 0.1)],
)
def test_discarded_range_reads_as_zeros_and_frees_whole_pages(
    device: Device, stack: Stack, page_size: int, start: float, length: float
) -> None:
    whole = b"".join(page("words", number, page_size) for number in range(PAGES))
    assert _write(device, 0, whole) is None
    offset, count = int(start * page_size), int(length * page_size)
    device.discard(offset, count)
    assert (
        _read(device, 0, PAGES * page_size)
        == whole[:offset] + bytes(count) + whole[offset + count :]
    )
    inside = len(
        [
            n
            for n in range(PAGES)
            if offset <= n * page_size and (n + 1) * page_size <= offset + count
        ]
    )
    assert stack.zv.statistics().curr_pages == PAGES - inside
    assert device.statistics().pages_discarded == inside


def test_discard_of_what_is_not_there_stores_nothing(
    device: Device, stack: Stack, page_size: int
) -> None:
    device.discard(100, 50)
    device.discard(page_size // 2, 3 * page_size)
    assert stack.zv.statistics().curr_pages == 0
    assert stack.frames.used_frames == 0


def test_two_devices_share_the_pool_and_not_the_data(stack: Stack, page_size: int) -> None:
    one = Device("one", 8 * page_size, stack.frontswap, 0, page_size=page_size)
    two = Device("two", 8 * page_size, stack.frontswap, 1, page_size=page_size)
    _write(one, 0, page("words", 1, page_size))
    _write(two, 0, page("words", 2, page_size))
    assert _read(one, 0, page_size) == page("words", 1, page_size)
    assert one.invalidate() == 1
    assert _read(one, 0, page_size) == bytes(page_size)
    assert _read(two, 0, page_size) == page("words", 2, page_size)


# Refused writes.


def _exhaust(stack: Stack) -> list[int]:
    """Take every frame away, as another client of the pool would."""
    taken = []
    while handle := stack.allocator.alloc(stack.page_size):
        taken.append(handle)
    return taken


def test_refused_write_returns_the_reason_and_is_counted(
    device: Device, stack: Stack, page_size: int
) -> None:
    stack.frontswap.freeze()
    assert _write(device, 0, page("words", 1, page_size)) is RejectReason.FROZEN
    assert _write(device, 10, b"part") is RejectReason.FROZEN
    seen = device.statistics()
    assert (seen.refused_writes, seen.pages_written, seen.lost_pages) == (2, 0, 0)
    assert _read(device, 0, page_size) == bytes(page_size), (
        "nothing was there before, so zeros are the truth"
    )


@pytest.mark.parametrize("part", [False, True])
def test_refused_overwrite_loses_the_page_and_says_so_to_its_reader(
    device: Device, stack: Stack, page_size: int, part: bool
) -> None:
    for number in range(4):
        _write(device, number * page_size, page("words", number, page_size))
    stack.frontswap.freeze()
    data = b"part" if part else page("words", 9, page_size)
    assert _write(device, page_size, data) is RejectReason.FROZEN
    assert device.statistics().lost_pages == 1
    for offset, length in (
        (page_size, page_size),
        (page_size + 5, 1),
        (0, 2 * page_size),
        (page_size - 1, 2),
    ):
        with pytest.raises(LostPageError) as caught:
            _read(device, offset, length)
        assert "page 1 of swap" in str(caught.value)
        assert caught.value.hint
    assert device.statistics().failed_reads == 4
    assert _read(device, 0, page_size) == page("words", 0, page_size)
    assert _read(device, 2 * page_size, page_size) == page("words", 2, page_size)
    stack.frontswap.thaw()
    with pytest.raises(LostPageError):
        _write(device, page_size + 7, b"part of nothing")
    with pytest.raises(LostPageError):
        device.discard(page_size + 7, 3)
    assert device.statistics().lost_pages == 1


@pytest.mark.parametrize("how", ["write", "discard", "discard more", "discard all", "invalidate"])
def test_lost_page_is_found_again_by_writing_or_discarding_it(
    device: Device, stack: Stack, page_size: int, how: str
) -> None:
    for number in range(20):
        _write(device, number * page_size, page("words", number, page_size))
    stack.frontswap.freeze()
    for number in (3, 9, 10):
        _write(device, number * page_size, page("words", 99, page_size))
    stack.frontswap.thaw()
    assert device.statistics().lost_pages == 3
    left, content = 2, bytes(page_size)
    match how:
        case "write":
            content = page("half", 1, page_size)
            assert _write(device, 9 * page_size, content) is None
        case "discard":
            device.discard(9 * page_size, page_size)
        case "discard more":
            device.discard(8 * page_size + 1, 3 * page_size)
            left = 1
        case "discard all":
            device.discard(0, PAGES * page_size)
            left = 0
        case "invalidate":
            device.invalidate()
            left = 0
    assert device.statistics().lost_pages == left
    assert _read(device, 9 * page_size, page_size) == content


def test_write_of_many_pages_stops_at_the_one_that_is_refused(
    device: Device, stack: Stack, page_size: int
) -> None:
    old = b"".join(page("words", number, page_size) for number in range(8))
    assert _write(device, 0, old) is None
    stack.zv.keep_poor = False
    new = b"".join(
        page("noise" if number == 3 else "words", 100 + number, page_size) for number in range(8)
    )
    assert _write(device, 0, new) is RejectReason.COMPRESS_POOR
    assert _read(device, 0, 3 * page_size) == new[: 3 * page_size]
    with pytest.raises(LostPageError, match="page 3"):
        _read(device, 3 * page_size, page_size)
    assert _read(device, 4 * page_size, 4 * page_size) == old[4 * page_size :]


def test_refusal_in_the_middle_of_an_unaligned_write_ends_it_there(
    device: Device, stack: Stack, page_size: int
) -> None:
    old = b"".join(page("words", number, page_size) for number in range(4))
    assert _write(device, 0, old) is None
    stack.zv.keep_poor = False
    new = (
        page("words", 9, page_size)[:10]
        + page("noise", 9, page_size)
        + page("words", 9, page_size)[:10]
    )
    assert _write(device, page_size - 10, new) is RejectReason.COMPRESS_POOR
    assert _read(device, 0, page_size) == old[: page_size - 10] + new[:10]
    with pytest.raises(LostPageError, match="page 1"):
        _read(device, page_size, page_size)
    assert _read(device, 2 * page_size, page_size) == old[2 * page_size : 3 * page_size]


def test_full_pool_refuses_and_later_takes_again(
    device: Device, stack: Stack, page_size: int
) -> None:
    taken = _exhaust(stack)
    assert _write(device, 0, page("words", 1, page_size)) is RejectReason.POOL_LIMIT_HIT
    stack.zv.limit_frames = 1 << 30
    assert _write(device, 0, page("words", 1, page_size)) is RejectReason.FAILED_ALLOC
    for handle in taken:
        stack.allocator.free(handle)
    assert _write(device, 0, page("words", 1, page_size)) is None
    assert _read(device, 0, page_size) == page("words", 1, page_size)


def test_partial_discard_that_cannot_be_kept_is_an_error_and_loses_the_page(
    device: Device, stack: Stack, page_size: int
) -> None:
    _write(device, 0, page("words", 1, page_size))
    stack.frontswap.freeze()
    with pytest.raises(DiscardError, match="frozen"):
        device.discard(10, 10)
    stack.frontswap.thaw()
    with pytest.raises(LostPageError):
        _read(device, 0, 1)
    device.discard(0, page_size)
    assert _read(device, 0, page_size) == bytes(page_size)


@pytest.mark.parametrize("part", [False, True])
def test_overwrite_that_fails_in_the_codec_loses_the_page_instead_of_reading_as_zeros(
    part: bool,
) -> None:
    stack = build(compressor=FailingCompressor(compress.get("lz4"), "RRE"))
    device = Device("swap", PAGES * 4096, stack.frontswap, 2, page_size=4096)
    for number in range(2):
        assert _write(device, number * 4096, page("words", number, 4096)) is None
    with pytest.raises(MemoryError):
        _write(device, 4096, b"part" if part else page("words", 9, 4096))
    with pytest.raises(LostPageError):
        _read(device, 4096, 4096)
    assert _read(device, 0, 4096) == page("words", 0, 4096)
    assert device.statistics().lost_pages == 1
    assert _write(device, 4096, page("words", 9, 4096)) is None
    assert _read(device, 4096, 4096) == page("words", 9, 4096)
    stack.check()
    stack.close()


# Damage.


def _damage(stack: Stack, number: int, byte: int = HEADER_BYTES + 3) -> int:
    """Flip a bit of the stored page and return where."""
    for pampd in stack.tmem.pampds(stack.zv):
        key = stack.zv.key_of(pampd)
        if key.index << 8 | key.oid & 0xFF == number:
            stack.arena.view[pampd + byte] ^= 4
            return pampd + byte
    raise AssertionError(f"page {number} is not stored")


def test_damaged_page_fails_its_readers_until_it_is_overwritten(
    device: Device, stack: Stack, page_size: int
) -> None:
    for number in range(6):
        _write(device, number * page_size, page("words", number, page_size))
    _damage(stack, 2)
    for offset, length in ((2 * page_size, page_size), (0, 6 * page_size), (2 * page_size + 9, 9)):
        with pytest.raises(CorruptedPageError):
            _read(device, offset, length)
    assert device.statistics().failed_reads == 3
    with pytest.raises(CorruptedPageError):
        _write(device, 2 * page_size + 1, b"part")
    with pytest.raises(CorruptedPageError):
        device.discard(2 * page_size + 1, 10)
    assert _read(device, 0, 2 * page_size) == page("words", 0, page_size) + page(
        "words", 1, page_size
    )
    assert _write(device, 2 * page_size, page("half", 1, page_size)) is None
    assert _read(device, 2 * page_size, page_size) == page("half", 1, page_size)


@pytest.mark.parametrize("how", ["overwrite", "discard"])
@pytest.mark.parametrize("kind", ["words", "same", "noise"])
@pytest.mark.parametrize(
    ("byte", "value"),
    [
        *((byte, None) for byte in range(4, HEADER_BYTES + 8)),
        *((22, codec) for codec in (0, 1, 2, 3, 200)),
    ],
)
def test_page_with_a_damaged_header_can_be_got_rid_of_without_hurting_others(
    page_size: int, how: str, kind: str, byte: int, value: int | None
) -> None:
    # A damaged header must not be believed, not even to free the page: its length or its handle
    # may lead to the memory of another page.
    stack = build(page_size, frames=128)
    device = Device("swap", PAGES * page_size, stack.frontswap, 2, page_size=page_size)
    for number in range(20):
        assert (
            _write(device, number * page_size, page(("words", kind)[number % 2], number, page_size))
            is None
        )
    good = {number: _read(device, number * page_size, page_size) for number in range(20)}
    place = _damage(stack, 5, byte)
    if value is not None:
        stack.arena.view[place] ^= 4
        if stack.arena.view[place] == value:
            return  # no damage at all
        stack.arena.view[place] = value
    with pytest.raises(CorruptedPageError):
        _read(device, 5 * page_size, page_size)
    if how == "discard":
        device.discard(5 * page_size, page_size)
        good[5] = bytes(page_size)
    else:
        good[5] = page("half", 5, page_size)
        assert _write(device, 5 * page_size, good[5]) is None
    for number, data in good.items():
        assert _read(device, number * page_size, page_size) == data
    device.discard(0, PAGES * page_size)
    stack.frames.check()
    stack.allocator.check()
    stack.tmem.check()
    assert stack.frames.used_frames <= 1, "at most the body of the damaged page is beyond reach"
    stack.close()


# Counters.


def test_counters_of_a_quiet_life(device: Device, page_size: int) -> None:
    _write(device, 0, bytes(3 * page_size))
    _write(device, 3 * page_size + 1, b"x")
    _write(device, 4 * page_size + 1, bytes(2 * page_size))
    _read(device, 0, 2 * page_size)
    _read(device, 1, 1)
    _read(device, 1, 2 * page_size)
    device.discard(0, 2 * page_size)
    seen = device.statistics()
    assert (seen.name, seen.size) == ("swap", PAGES * page_size)
    assert (seen.pages_written, seen.partial_writes) == (3 + 1, 1 + 2)
    assert (seen.pages_read, seen.partial_reads) == (2 + 1, 1 + 2)
    assert seen.pages_discarded == 2
    assert (seen.refused_writes, seen.failed_reads, seen.lost_pages) == (0, 0, 0)


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("front", [0, 1, 5])
def test_failed_read_says_how_much_in_front_of_the_page_is_right(
    device: Device, page_size: int, begin: int, front: int
) -> None:
    data = _noise(PAGES * page_size)
    assert _write(device, 0, data) is None
    bad = 2 + front
    device.discard(bad * page_size, page_size)
    device._mark_lost(bad)
    out = bytearray(8 * page_size)
    offset = 2 * page_size + begin if front else bad * page_size + begin
    with pytest.raises(LostPageError) as caught:
        device.read_into(offset, memoryview(out))
    assert caught.value.filled == max(bad * page_size - offset, 0)
    assert out[: caught.value.filled] == data[offset : offset + caught.value.filled]
    assert list(device.unreadable) == [bad]
    assert device.has_unreadable()
    assert _write(device, bad * page_size, _noise(page_size)) is None
    assert not device.has_unreadable()


@pytest.mark.parametrize("edge", ["head", "tail", "both"])
def test_part_of_a_page_that_cannot_be_read_does_not_keep_the_rest_from_being_discarded(
    device: Device, page_size: int, edge: str
) -> None:
    data = _noise(PAGES * page_size)
    assert _write(device, 0, data) is None
    for number in {"head": [1], "tail": [4], "both": [1, 4]}[edge]:
        device.discard(number * page_size, page_size)
        device._mark_lost(number)
    with pytest.raises(LostPageError):
        device.discard(page_size + 7, 3 * page_size)
    assert _read(device, 2 * page_size, 2 * page_size) == bytes(2 * page_size)
    if edge == "head":
        assert (
            _read(device, 4 * page_size, page_size)
            == bytes(7) + data[4 * page_size + 7 : 5 * page_size]
        )
    if edge == "tail":
        assert _read(device, page_size, page_size) == data[page_size : page_size + 7] + bytes(
            page_size - 7
        )
