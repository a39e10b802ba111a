# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that changes by itself before a takeover: each page reads as its data or as an error,
and damage is counted.

One bit, or one 32-bit word, is changed anywhere that a successor reads: words of the frame table,
of used runs and of free ones; headers, live words and data; bodies. No page may read as zeros
then, nor as another page.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.strategies import KINDS, page
from tests.support.successor import check_all, fill, make_config, read, shared_lost, succeed
from zswapd.config import Config
from zswapd.core import crashpoints
from zswapd.core.allocators.arena import CHANGING_LAYOUT, LAYOUT_VERSION
from zswapd.core.allocators.base import DEAD
from zswapd.core.allocators.frametable import (
    EPHEMERAL,
    MARKED,
    PERSISTENT,
    STATE_MASK,
    TAKEN,
    USED,
    mark,
)
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.block.device import ADOPTED_PAGES
from zswapd.core.compress.base import RAW
from zswapd.core.core import Core, Inherited
from zswapd.core.pam.base import HEADER, HEADER_BYTES
from zswapd.errors import CorruptedPageError, LostPageError

pytestmark = pytest.mark.slow

PAGES = 90
ALLOCATORS = ("zsmalloc", "zbud")
LAYOUT_WORD = 2


def _config(allocator: str, size: int = 4096, *settings: str) -> Config:
    small = (f"swap.size={128 * size}", f"memory.reserve={128 * size}", "cache.limit=")
    return make_config(
        "memory.arena=memfd", *small, f"pool.allocator={allocator}", *settings, page_size=size
    )


def _fill_with_holes(core: Core) -> dict[int, bytes]:
    """Store pages of all kinds, with free objects and free frames among them."""
    expected = fill(core, PAGES)
    for number in range(3, PAGES, 9):
        core.devices["swap"].discard(number * core.frames.page_size, core.frames.page_size)
        del expected[number]
    return expected


def _pampd(core: Core, number: int) -> int:
    return core.frontswap.find_page(0, number & 0xFF, number >> 8)


def _run_of(core: Core, number: int) -> int:
    """Return the first frame of the run with a page's header."""
    return core.frames.table.first_of(_pampd(core, number) // core.frames.page_size)


def _table_word(core: Core, frame: int, word: int) -> int:
    return core.frames.page_size // 4 + frame * 4 + word


def _targets(core: Core, expected: dict[int, bytes], kind: str) -> list[int]:
    """Return places of 32-bit words of the arena that are of a kind."""
    frames, size = core.frames, core.frames.page_size
    if kind in ("seal", "links", "tails", "free"):
        first = list(frames.used_runs(PERSISTENT))
        if kind == "seal":
            return [_table_word(core, frame, word) for frame in first for word in (0, 1)]
        if kind == "links":
            return [_table_word(core, frame, word) for frame in first for word in (2, 3)]
        begin = set(range(frames.first_frame, frames.end_frame)) - set(first)
        words = frames.table.words
        is_tail = {
            frame
            for frame in begin
            if frames.table.first_of(frame) in first and words[frame * 4] & STATE_MASK == 4
        }
        chosen = is_tail if kind == "tails" else begin - is_tail
        return [_table_word(core, frame, word) for frame in sorted(chosen) for word in range(4)]
    pampds = [_pampd(core, number) for number in expected]
    if kind == "life":
        return [pampd // 4 + word for pampd in pampds for word in (0, 1)]
    if kind == "header":
        return [pampd // 4 + word for pampd in pampds for word in range(2, 6)]
    if kind == "data":
        return [(pampd + HEADER_BYTES) // 4 + at for pampd in pampds for at in range(2)]
    raw = [pampd for pampd in pampds if HEADER.unpack_from(core.arena.view, pampd)[5] == RAW]
    bodies = [
        int.from_bytes(core.arena.view[p + HEADER_BYTES : p + HEADER_BYTES + 5], "little")
        for p in raw
    ]
    return [(body + at) // 4 for body in bodies for at in (0, 8, size - 4)]


KINDS_OF_WORDS = ("seal", "links", "tails", "free", "life", "header", "data", "body")
CHANGES: dict[str, Callable[[int], int]] = {
    **{f"bit {bit}": lambda word, bit=bit: word ^ 1 << bit for bit in range(32)},  # type: ignore[misc]
    "lost": lambda word: 0,
    "ones": lambda word: 0xFFFFFFFF,
    "shifted": lambda word: word << 8 & 0xFFFFFFFF,
    "truncated": lambda word: word & 0xFFFF,
    "other": lambda word: word * 0x9E3779B1 + 0x7F4A7C15 & 0xFFFFFFFF,
}


def _look(core: Core, expected: dict[int, bytes]) -> int:
    """Prove that each page is its data or an error;
    return the number of errors of pages that were stored.
    """
    size, errors = core.frames.page_size, 0
    for number in range(core.devices["swap"].size // size):
        try:
            found = read(core, number)
        except (CorruptedPageError, LostPageError):
            errors += number in expected
        else:
            assert found == expected.get(number, bytes(size)), f"page {number} is wrong"
    return errors


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    allocator=st.sampled_from(ALLOCATORS),
    size=st.sampled_from((4096, 4096, 16384, 65536)),
    kind=st.sampled_from(KINDS_OF_WORDS),
    change=st.sampled_from(sorted(CHANGES)),
    where=st.integers(0, 1 << 30),
    checksum=st.sampled_from((True, True, False)),
)
def test_page_is_its_data_or_an_error_whatever_word_has_changed(
    allocator: str, size: int, kind: str, change: str, where: int, checksum: bool
) -> None:
    config = _config(allocator, size, f"pool.checksum={str(checksum).lower()}")
    core = Core(config)
    try:
        expected = _fill_with_holes(core)
        places = _targets(core, expected, kind)
        if not places:
            assert (allocator, kind) == ("zbud", "tails")
            return
        place = places[where % len(places)]
        before = core.arena.words32[place]
        core.arena.words32[place] = after = CHANGES[change](before)
        core = succeed(core, config)
        damaged = core.statistics().recovery.damaged
        core.check()
        if not checksum and kind in ("data", "body"):
            return  # nothing says what was there
        errors = _look(core, expected)
        assert damaged or not errors or kind == "body"
        if kind in ("life", "header", "data") and before != after:
            assert damaged == 1
            assert errors == 1
    finally:
        core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("word", [0, 1])
def test_each_bit_of_a_seal_is_noticed(allocator: str, word: int) -> None:
    config = _config(allocator)
    core = Core(config)
    expected = _fill_with_holes(core)
    runs = sorted({_run_of(core, number) for number in (0, 1, 2, 4)})
    body = next(
        frame for frame in core.frames.used_runs(PERSISTENT) if core.allocator.is_body(frame)
    )
    image = bytes(core.arena.view)
    for frame in (*runs[:2], body):
        for change in (*(1 << bit for bit in range(32)), None):
            place = _table_word(core, frame, word)
            if (
                allocator == "zsmalloc"
                and change
                and (change >> 16 if word == 0 else change >> 8 & 0xFFFF)
            ):
                continue  # use and free list, which are made again; below
            core.arena.view[:] = image
            core.arena.words32[place] = core.arena.words32[place] ^ change if change else 0
            fd = os.dup(core.arena.fd)
            successor = Core(config, inherited=Inherited(fd))
            os.close(fd)
            assert successor.statistics().recovery.damaged >= 1, f"frame {frame}, change {change}"
            assert _look(successor, expected) >= 1
            successor.close()
    core.close()


def test_use_that_does_not_fit_the_living_is_noticed() -> None:
    config = _config("zsmalloc")
    core = Core(config)
    expected = _fill_with_holes(core)
    first = _run_of(core, 0)
    core.frames.table.words[first * 4] += 2 << 16
    core = succeed(core, config)
    assert core.statistics().recovery.damaged == 1
    assert _look(core, expected) == 0
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_object_that_dies_by_itself_is_noticed_unless_a_death_may_have_done_it(
    allocator: str,
) -> None:
    config = _config(allocator)
    for dead in (1, 2):
        core = Core(config)
        expected = _fill_with_holes(core)
        for number in (0, 10)[:dead]:
            core.arena.words64[_pampd(core, number) >> 3] = DEAD
        core = succeed(core, config)
        assert (core.statistics().recovery.damaged > 0) == (dead > 1)
        if dead > 1:
            assert _look(core, expected) == 2
        core.close()


def test_mark_differs_in_two_bits_at_least() -> None:
    lengths = range(1, 17)
    words = [
        (state, length, mark(state, length))
        for state in (11, 11 | 3 << 14, 11 | 77 << 4)
        for length in lengths
    ]
    for state, length, seen in words:
        assert seen & MARKED
        for bit in range(16):
            assert (mark(state ^ 1 << bit, length) ^ seen).bit_count() >= 1
            for other in range(bit):
                assert mark(state ^ 1 << bit ^ 1 << other, length) != seen
        for bit in range(8):
            assert (mark(state, length ^ 1 << bit) ^ seen).bit_count() >= 1


# Arenas of the layout before.


def _make_older(core: Core) -> None:
    """Turn an arena into one of layout 3, as 0.x programs wrote it: no mark,
    dead objects with a live word of 0.
    """
    words, lives, size = core.frames.table.words, core.arena.words64, core.frames.page_size
    for first in [*core.frames.used_runs(PERSISTENT), *core.frames.used_runs(EPHEMERAL)]:
        words[first * 4 + 1] &= 0x00FFFFFF if isinstance(core.allocator, ZsPool) else 0xFF
        if isinstance(core.allocator, ZsPool) and not core.allocator.is_body(first):
            size_class = core.allocator.classes[words[first * 4] >> 4 & 0x3FF]
            for number in range(size_class.objects):
                place = first * size + number * size_class.size >> 3
                if lives[place] == DEAD:
                    lives[place] = 0
    core.arena.words32[LAYOUT_WORD] = 3


@pytest.mark.parametrize("size", [4096, 65536])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("layout", [2, 3])
def test_arena_of_an_older_layout_is_adopted_and_is_strict_from_then_on(
    allocator: str, layout: int, size: int
) -> None:
    config = _config(allocator, size)
    core = Core(config)
    expected = _fill_with_holes(core)
    _make_older(core)
    core.arena.words32[LAYOUT_WORD] = layout
    for _ in range(2):
        core = succeed(core, config)
        assert core.statistics().recovery.damaged == 0
        assert core.arena.words32[LAYOUT_WORD] == LAYOUT_VERSION
        check_all(core, expected)
    core.frames.table.words[_run_of(core, 0) * 4 + 1] &= 0x00FFFFFF
    core = succeed(core, config)
    assert core.statistics().recovery.damaged == 1, (
        "a seal without a mark is right in older arenas only"
    )
    assert _look(core, expected) >= 1
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_objects_without_a_checksum_of_an_older_arena_get_one(allocator: str) -> None:
    config = _config(allocator)
    core = Core(config)
    expected = _fill_with_holes(core)
    for number in expected:
        core.arena.words32[_pampd(core, number) >> 2] = 0
    _make_older(core)
    for _ in range(2):
        core = succeed(core, config)
        assert core.statistics().recovery.damaged == 0
        check_all(core, expected)
    assert all(core.arena.words32[_pampd(core, number) >> 2] for number in expected)
    core.arena.words32[_pampd(core, 1) >> 2] = 0
    core = succeed(core, config)
    assert core.statistics().recovery.damaged == 1
    assert _look(core, expected) == 1
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_older_arena_with_a_store_cut_short_is_whole(allocator: str) -> None:
    # Dead between taking frames and sealing them, or between an object's last two words.
    config = _config(allocator)
    core = Core(config)
    expected = _fill_with_holes(core)
    taken = core.frames.alloc(1)
    assert core.frames.table.words[taken * 4] == TAKEN
    torn = core.allocator.alloc(200)
    HEADER.pack_into(core.arena.view, torn, 77, 0, 5, 0, 100, 2, 0)
    _make_older(core)
    core.frames.table.words[taken * 4] = USED
    core = succeed(core, config)
    seen = core.statistics().recovery
    assert (seen.damaged, seen.recovered_torn) == (0, 1)
    check_all(core, expected)
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_lost_seal_of_an_older_arena_is_noticed(allocator: str) -> None:
    config = _config(allocator)
    core = Core(config)
    expected = _fill_with_holes(core)
    first = _run_of(core, 10)
    _make_older(core)
    core.frames.table.words[first * 4] ^= 8
    core = succeed(core, config)
    assert core.statistics().recovery.damaged >= 1
    assert _look(core, expected) >= 1
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(
    "point",
    [
        "takeover_run",
        "takeover_zspage",
        "takeover_zspages",
        "takeover_page",
        "takeover_indexed",
        "takeover_rewritten",
    ],
)
def test_death_while_an_older_arena_is_rewritten(allocator: str, point: str) -> None:
    config = _config(allocator)
    lost = shared_lost(config)
    core = Core(config)
    expected = _fill_with_holes(core)
    for number in list(expected)[::2]:
        core.arena.words32[_pampd(core, number) >> 2] = 0
    _make_older(core)
    for nth in (1, 5):
        pid = os.fork()
        if not pid:
            crashpoints.arm(point, nth)
            Core(config, inherited=Inherited(core.arena.fd, lost))
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or nth > 1
        if nth == 1:
            assert core.arena.words32[LAYOUT_WORD] == CHANGING_LAYOUT
    core = succeed(core, config, lost)
    assert core.statistics().recovery.damaged == 0
    assert core.arena.words32[LAYOUT_WORD] == LAYOUT_VERSION
    check_all(core, expected)
    core.close()


# Signs of life.


@pytest.mark.parametrize("distrust", [True, False])
def test_marks_of_loss_are_gone_through_with_signs_of_life(distrust: bool) -> None:
    config = make_config("swap.size=4G", "memory.reserve=1M", "memory.arena=memfd", "cache.limit=")
    core = Core(config)
    seen: list[int] = []
    device = core.devices["swap"]
    device.adopt(distrust=distrust, alive=lambda: seen.append(1))
    assert len(seen) >= device.pages // ADOPTED_PAGES >= 32
    assert ADOPTED_PAGES <= 1 << 15, "tens of milliseconds between two signs"
    assert core.statistics().devices[0].lost_pages == (device.pages if distrust else 0)
    core.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_frames_that_are_given_back_come_with_signs_of_life(allocator: str) -> None:
    # All objects dead: each run is given back. All bodies without a header: likewise.
    config = make_config(
        "swap.size=16M",
        "memory.reserve=16M",
        "memory.arena=memfd",
        "cache.limit=",
        f"pool.allocator={allocator}",
    )
    size = config.context.page_size
    core = Core(config)
    for number in range(2000):
        kind = "noise" if number % 2 else KINDS[number % len(KINDS)]
        assert (
            core.devices["swap"].write(number * size, memoryview(page(kind, number, size))) is None
        )
    for number in range(2000):
        core.arena.words64[_pampd(core, number) >> 3] = DEAD
    seen: list[int] = []
    fd = os.dup(core.arena.fd)
    core.close()
    successor = Core.__new__(Core)
    successor.__init__(  # type: ignore[misc] - so that it can be looked at meanwhile
        config, inherited=Inherited(fd, alive=lambda: seen.append(successor.frames.used_frames))
    )
    os.close(fd)
    assert successor.frames.used_frames == 0
    falls = [before - after for before, after in itertools.pairwise(seen)]
    assert max(falls) <= 512 * 8, "frames given back between two signs"
    assert sum(fall > 0 for fall in falls) >= 3
    successor.close()
