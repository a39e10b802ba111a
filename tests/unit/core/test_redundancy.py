# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands between an error and wrong data is there twice: marks of loss,
words of the slot map, the disk's key.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.backed import Files
from tests.support.stack import Stack, build
from tests.support.successor import make_config
from zswapd.core.block.device import Device, lost_bytes
from zswapd.core.block.slotmap import SlotMap, slot_map_bytes, witness_bytes
from zswapd.core.core import Core, Inherited
from zswapd.core.disk import CoreDisk
from zswapd.errors import LostPageError
from zswapd.handover.areas import backing_areas
from zswapd.handover.key import find_key, make_key
from zswapd.handover.state import SharedState

PAGES = 64


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = build(4096, frames=128)
    yield made
    made.check()
    made.close()


def bitmaps() -> tuple[memoryview, memoryview]:
    length = lost_bytes(PAGES * 4096, 4096)
    return memoryview(bytearray(length)), memoryview(bytearray(length))


def read(device: Device, number: int) -> bytes:
    out = bytearray(4096)
    device.read_into(number * 4096, memoryview(out))
    return bytes(out)


def clear_bit(bits: memoryview, number: int) -> None:
    bits[number >> 3] &= ~(1 << (number & 7))


def clear_all(bits: memoryview, _number: int) -> None:
    bits[:] = bytes(len(bits))


def change_all(bits: memoryview, _number: int) -> None:
    bits[:] = bytes(byte ^ 0xFF for byte in bits)


@pytest.mark.parametrize("damage", [clear_bit, clear_all, change_all])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("is_taken_over", [False, True])
def test_lost_page_stays_an_error_with_either_bitmap_damaged(
    stack: Stack, which: int, damage: Callable[[memoryview, int], None], is_taken_over: bool
) -> None:
    marks = bitmaps()
    device = Device(
        "swap", PAGES * 4096, stack.frontswap, 2, page_size=4096, lost=marks[0], lost_copy=marks[1]
    )
    stored = os.urandom(4096)
    assert device.write(9 * 4096, memoryview(stored)) is None
    for number in (0, 7, 8, 42, PAGES - 1):
        device._mark_lost(number)
    damage(marks[which], 42)
    if is_taken_over:
        device.adopt(distrust=False)
        assert bytes(marks[0]) == bytes(marks[1])
    with pytest.raises(LostPageError):
        read(device, 42)
    assert read(device, 9) == stored

    device.discard(42 * 4096, 4096)
    assert read(device, 42) == bytes(4096)
    assert device.write(8 * 4096, memoryview(stored)) is None
    assert read(device, 8) == stored
    device.discard(0, PAGES * 4096)
    assert not any(marks[0][: PAGES // 8])
    assert not any(marks[1][: PAGES // 8])
    device.adopt(distrust=False)
    assert device.statistics().lost_pages == 0
    stack.frontswap.invalidate_area(2)


def test_successor_of_a_program_with_one_bitmap_believes_that(stack: Stack) -> None:
    marks, _ = bitmaps()
    marks[3] = 1
    device = Device("swap", PAGES * 4096, stack.frontswap, 2, page_size=4096, lost=marks)
    device.adopt(distrust=False)
    with pytest.raises(LostPageError):
        read(device, 24)
    assert device.statistics().lost_pages == 1


@pytest.mark.parametrize("short", ["lost", "lost_copy"])
def test_bitmap_that_is_too_short_is_refused(stack: Stack, short: str) -> None:
    with pytest.raises(ValueError, match="no bitmap"):
        Device(
            "swap",
            PAGES * 4096,
            stack.frontswap,
            2,
            page_size=4096,
            **{short: memoryview(bytearray(3))},
        )


def test_mark_that_came_by_itself_does_not_take_another_along(stack: Stack) -> None:
    marks = bitmaps()
    device = Device(
        "swap", PAGES * 4096, stack.frontswap, 2, page_size=4096, lost=marks[0], lost_copy=marks[1]
    )
    device._mark_lost(42)
    marks[0][0] |= 2
    device.discard(4096, 4096)
    with pytest.raises(LostPageError):
        read(device, 42)
    assert device.statistics().lost_pages == 1


# The slot map.


def slots(pages: int = PAGES) -> tuple[SlotMap, memoryview, memoryview]:
    words = memoryview(bytearray(slot_map_bytes(pages * 4096, 4096)))
    bits = memoryview(bytearray(witness_bytes(pages * 4096, 4096)))
    return SlotMap(words, 0, bits), words, bits


def test_bits_follow_the_words() -> None:
    made, words, bits = slots(100_000)
    for number in (0, 1, 8, 4095, 4096, 65_535, 99_999):
        made.enter(number, 5)
        assert bits[number >> 3] >> (number & 7) & 1
    made.clear(1)
    made.clear_range(4000, 70_000)
    assert made.numbers() == [0, 8, 99_999]
    assert sum(map(int.bit_count, bits)) == 3
    assert SlotMap(words, 0, bits).adopt() == []
    made.clear_range(0, 99_999)
    assert not any(bits)
    assert made.count == 0


@pytest.mark.parametrize("number", [0, 1, 7, 8, 4095, 4096, 32_767, 32_768, 99_999])
def test_word_that_has_become_zero_is_found(number: int) -> None:
    made, words, bits = slots(100_000)
    for other in (0, 1, 7, 8, 4095, 4096, 32_767, 32_768, 99_999, 50_000):
        made.enter(other, 7)
    words.cast("I")[number] = 0
    assert made.has_lost_word(number)
    assert not made.has_lost_word(2)
    then = SlotMap(words, 0, bits)
    assert then.adopt() == [number]
    assert then.adopt() == []


def test_bits_of_a_program_that_had_none_are_made() -> None:
    made, words, _bits = slots()
    made.enter(5, 7)
    then = SlotMap(words, 0)
    assert then.adopt() == []
    words.cast("I")[5] = 0
    assert then.has_lost_word(5)


@pytest.mark.parametrize("death", range(3))
def test_death_between_word_and_bit_is_no_damage(death: int) -> None:
    """`enter` sets the word first, `clear` takes the bit first."""
    made, words, bits = slots()
    if death == 0:
        words.cast("I")[5] = 9
    elif death == 1:
        made.enter(5, 9)
        clear_bit(bits, 5)
    assert SlotMap(words, 0, bits).adopt() == []
    made.clear_range(0, PAGES - 1)
    assert not any(bits)


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(4096)


@pytest.fixture
def files() -> Files:
    made = Files(64)
    for number in range(16):
        assert made.put(number, noise(number)) == 4096
    assert made.device.backed_statistics().bd_count == 16
    return made


@pytest.mark.parametrize("many", [1, 16])
def test_page_whose_word_has_become_zero_is_an_error_until_it_is_written(
    files: Files, many: int, expect_log: Any
) -> None:
    expect_log("page 3 of swap cannot be found on the backing", level=logging.ERROR, count=1)
    words = files.device._slots._words
    for number in range(3, 3 + many) if many == 1 else range(16):
        words[number] = 0
    assert files.get(3) == -errno.EIO
    assert files.get(3) == -errno.EIO
    assert files.get(40) == bytes(4096)
    if many == 1:
        assert files.get(4) == noise(4)
    new = os.urandom(4096)
    assert files.put(3, new) == 4096
    assert files.get(3) == new
    files.device.discard(0, 64 * 4096)
    for number in range(16):
        assert files.get(number) == bytes(4096)


def test_page_whose_word_has_become_zero_is_lost_to_a_successor(files: Files) -> None:
    slots = files.device._slots
    slots._words[3] = 0
    backing = CoreDisk(files.transfers, {"swap": slots._words.cast("B")}, {"swap": slots._witness})
    then = Core(files.config, inherited=Inherited(files.core.arena.fd), backing=backing)
    assert then.backed[0].backed_statistics().bad_slots == 1
    assert then.devices["swap"].statistics().lost_pages == 1
    with pytest.raises(LostPageError):
        read(then.devices["swap"], 3)
    assert read(then.devices["swap"], 40) == bytes(4096)
    then.close()


# The key.


@pytest.fixture
def state() -> Iterator[SharedState]:
    config = make_config("backing.path=/dev/null", "memory.arena=memfd")
    made = SharedState.new({}, lost={}, max_io=1 << 16, kind="memfd", areas=backing_areas(config))
    make_key(made)
    yield made
    made.close()


@pytest.mark.parametrize("bit", range(0, 512, 37))
def test_key_with_a_bit_changed_is_taken_from_its_copy(
    state: SharedState, bit: int, expect_log: Any
) -> None:
    key = bytes(state.area("backing.key"))
    expect_log("its copy is used", level=logging.ERROR, count=2)
    for damaged in (
        bytes(64),
        bytes(byte ^ (1 << bit % 8) * (place == bit // 8) for place, byte in enumerate(key)),
    ):
        state.area("backing.key")[:] = damaged
        assert bytes(find_key(state)) == key
        assert bytes(state.area("backing.key")) == key


@pytest.mark.parametrize("place", [0, 40, 63, 64, 71])
def test_damaged_copy_of_the_key_is_made_again(
    state: SharedState, place: int, expect_log: Any
) -> None:
    key, copy = bytes(state.area("backing.key")), state.area("backing.key.copy")[-72:]
    copy[place] ^= 4
    assert bytes(find_key(state)) == key
    expect_log("its copy is used", level=logging.ERROR, count=1)
    state.area("backing.key")[5] ^= 1
    assert bytes(find_key(state)) == key


def test_key_and_copy_are_in_different_pages(state: SharedState) -> None:
    key, copy = state.area("backing.key"), state.area("backing.key.copy")
    key[:8], copy[-72:-64] = b"this one", b"that one"
    with mmap.mmap(state.fd, 0) as mapping:
        assert abs(mapping.find(b"this one") - mapping.find(b"that one")) >= mmap.PAGESIZE + 64


def test_key_of_a_program_that_made_no_copy_is_believed() -> None:
    state = SharedState.new({}, lost={}, max_io=1 << 16, kind="memfd", areas={"backing.key": 64})
    state.area("backing.key")[:] = bytes(range(64))
    assert bytes(find_key(state)) == bytes(range(64))
    state.close()
