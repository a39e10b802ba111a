# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules that keep readers safe (docs/coherency.md), each a test, over every back end.

Rule 7 comes with writeback, the cleancache half of rule 5 with cleancache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fakes import FailingCompressor
from tests.support.stack import Stack, build
from tests.support.strategies import KINDS, page
from zswapd.core import compress
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.pam.base import RejectReason
from zswapd.errors import CorruptedPageError

BACKENDS: dict[str, dict[str, Any]] = {
    "zv-zsmalloc-lz4": {"compressor": "lz4"},
    "zv-zsmalloc-lz4-python": {"compressor": "lz4", "packer": False},
    "zv-zsmalloc-lzo": {"compressor": "lzo"},
    "zv-zsmalloc-short": {
        "allocator": lambda frames: ZsPool(frames, max_zspage_frames=1),
        "checksum": False,
    },
    "zv-zbud": {"allocator": ZbudPool},
}
FRAMES = 256
TYPE = 3


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, page_size: int) -> Iterator[Callable[..., Stack]]:
    """Build a stack of this back end; everything about it is proved at the end."""
    made: list[Stack] = []

    def make_stack(**options: Any) -> Stack:
        stack = build(page_size, **{**BACKENDS[request.param], "frames": FRAMES, **options})
        stack.frontswap.init(TYPE)
        made.append(stack)
        return stack

    yield make_stack
    for stack in made:
        stack.check()
        stack.close()


@pytest.fixture
def stack(make: Callable[..., Stack]) -> Stack:
    return make()


def _store(
    stack: Stack, offset: int, kind: str, seed: int = 0, *, swap_type: int = TYPE
) -> RejectReason | None:
    return stack.frontswap.store(swap_type, offset, memoryview(page(kind, seed, stack.page_size)))


def _fill(stack: Stack) -> int:
    """Store incompressible pages until one is refused; return how many there are."""
    offset = 0
    while _store(stack, offset, "noise", offset) is None:
        offset += 1
        assert offset < 10 * FRAMES
    return offset


def _force(stack: Stack, reason: RejectReason) -> None:
    """Make the next store of a "noise" page fail for this reason.

    Also that of a page that is there already.
    """
    match reason:
        case RejectReason.FROZEN:
            stack.frontswap.freeze()
        case RejectReason.FAILED_ALLOC:
            while stack.allocator.alloc(stack.page_size):
                pass
        case RejectReason.COMPRESS_POOR:
            stack.zv.keep_poor = False
        case RejectReason.MEAN_COMPRESS_POOR:
            stack.zv.keep_poor = False
            stack.zv.max_zsize = 2 * stack.page_size
            stack.zv.max_mean_zsize = 16
        case _:
            raise ValueError(reason)


DUPLICATE_REFUSALS = (
    RejectReason.FROZEN,
    RejectReason.FAILED_ALLOC,
    RejectReason.COMPRESS_POOR,
    RejectReason.MEAN_COMPRESS_POOR,
)
"""Reasons for which a store may be refused although the page was stored before."""


@pytest.mark.parametrize("kind", KINDS)
def test_coherency_rule_1_store_then_load_gives_the_same_bytes_twice(
    stack: Stack, kind: str
) -> None:
    data = page(kind, 1, stack.page_size)
    assert _store(stack, 7, kind, 1) is None
    assert stack.load(TYPE, 7) == data
    assert stack.load(TYPE, 7) == data


def test_coherency_rule_1_holds_for_many_pages(stack: Stack) -> None:
    offsets = [0, 1, 255, 256, 257, 65535, 65536, 1 << 24, (1 << 40) - 1]
    for seed, offset in enumerate(offsets):
        assert _store(stack, offset, KINDS[seed % len(KINDS)], seed) is None
    for seed, offset in enumerate(offsets):
        assert stack.load(TYPE, offset) == page(KINDS[seed % len(KINDS)], seed, stack.page_size)


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", ["same", "words", "noise"])
def test_coherency_rule_2_duplicate_store_replaces(stack: Stack, old: str, new: str) -> None:
    assert _store(stack, 7, old, 1) is None
    assert _store(stack, 7, new, 2) is None
    assert stack.load(TYPE, 7) == page(new, 2, stack.page_size)
    stack.check()
    stack.frontswap.invalidate_page(TYPE, 7)
    assert stack.frames.used_frames == 0, "the replaced copy was not freed"


@pytest.mark.parametrize("reason", DUPLICATE_REFUSALS)
def test_coherency_rule_2_refused_duplicate_leaves_nothing_stale(
    stack: Stack, reason: RejectReason
) -> None:
    assert _store(stack, 7, "words", 1) is None
    assert _store(stack, 8, "words", 2) is None
    before = stack.tmem.statistics().put_to_flush
    _force(stack, reason)
    assert _store(stack, 7, "noise", 3) is reason
    assert stack.load(TYPE, 7) is None
    assert stack.load(TYPE, 8) == page("words", 2, stack.page_size), "its neighbour has to stay"
    if reason is not RejectReason.FROZEN:
        assert stack.tmem.statistics().put_to_flush == before + 1


def test_coherency_rule_2_a_store_that_fails_in_the_middle_leaves_nothing_stale(
    make: Callable[..., Stack],
) -> None:
    # Not a refusal but a failure: the codec raises. The caller learns of an error; the old data may
    # not come back.
    stack = make(compressor=FailingCompressor(compress.get("lz4"), "RE"))
    assert _store(stack, 7, "words", 1) is None
    with pytest.raises(MemoryError):
        _store(stack, 7, "words", 2)
    stale = stack.load(TYPE, 7) == page("words", 1, stack.page_size)
    assert not stale
    stack.check()


def test_coherency_rule_3_invalidated_page_misses(stack: Stack) -> None:
    for offset in (7, 8, 263):
        _store(stack, offset, "words", offset)
    assert stack.frontswap.invalidate_page(TYPE, 7)
    assert stack.load(TYPE, 7) is None
    assert not stack.frontswap.invalidate_page(TYPE, 7)
    assert stack.load(TYPE, 8) == page("words", 8, stack.page_size)
    assert stack.load(TYPE, 263) == page("words", 263, stack.page_size)


def test_coherency_rule_3_after_invalidate_area_every_load_of_that_type_misses(
    stack: Stack,
) -> None:
    stack.frontswap.init(TYPE + 1)
    offsets = [0, 1, 255, 256, 300, 65536, (1 << 40) - 1]
    for offset in offsets:
        _store(stack, offset, "words", offset)
        _store(stack, offset, "words", offset + 1, swap_type=TYPE + 1)
    assert stack.frontswap.invalidate_area(TYPE) == len(offsets)
    for offset in offsets:
        assert stack.load(TYPE, offset) is None
        assert stack.load(TYPE + 1, offset) == page("words", offset + 1, stack.page_size)


@pytest.mark.parametrize("second", KINDS)
def test_coherency_rule_4_put_put_get_never_gives_the_first(stack: Stack, second: str) -> None:
    # With the pool full, so that the second put may be taken or refused.
    count = _fill(stack)
    for offset in range(0, count, 3):
        outcome = _store(stack, offset, second, offset + 1000)
        expected = page(second, offset + 1000, stack.page_size) if outcome is None else None
        assert stack.load(TYPE, offset) == expected


def test_coherency_rule_4_after_a_failed_get_gets_fail_until_a_put(stack: Stack) -> None:
    assert stack.load(TYPE, 7) is None
    for offset in range(30):
        if offset != 7:
            _store(stack, offset, "words", offset)
    stack.zv.compact(lambda *_: None, 0)
    assert stack.load(TYPE, 7) is None
    assert _store(stack, 7, "words", 7) is None
    assert stack.load(TYPE, 7) == page("words", 7, stack.page_size)


def test_coherency_rule_4_damaged_page_is_an_error_every_time(make: Callable[..., Stack]) -> None:
    stack = make(checksum=True)
    _store(stack, 7, "words", 1)
    (pampd,) = stack.tmem.pampds(stack.zv)
    stack.arena.view[pampd + 40] ^= 1
    for _ in range(3):
        with pytest.raises(CorruptedPageError):
            stack.load(TYPE, 7)
    assert _store(stack, 7, "words", 2) is None
    assert stack.load(TYPE, 7) == page("words", 2, stack.page_size)


def test_coherency_rule_5_a_frontswap_load_keeps_the_page(stack: Stack) -> None:
    _store(stack, 7, "words", 1)
    used = stack.frames.used_frames
    for _ in range(3):
        assert stack.load(TYPE, 7) is not None
    assert stack.frames.used_frames == used
    assert stack.zv.statistics().curr_pages == 1
    assert stack.frontswap.statistics().loads == 3


def test_coherency_rule_6_frozen_store_is_refused_and_flushes_the_older_page(stack: Stack) -> None:
    for offset in (7, 8, 9):
        _store(stack, offset, "words", offset)
    stack.frontswap.freeze()
    assert _store(stack, 7, "words", 70) is RejectReason.FROZEN
    assert _store(stack, 100, "words", 100) is RejectReason.FROZEN
    assert stack.load(TYPE, 7) is None
    assert stack.load(TYPE, 100) is None
    # Loads and invalidates go on.
    assert stack.load(TYPE, 8) == page("words", 8, stack.page_size)
    assert stack.frontswap.invalidate_page(TYPE, 9)
    stack.frontswap.thaw()
    assert stack.load(TYPE, 7) is None
    assert _store(stack, 7, "words", 71) is None
    assert stack.load(TYPE, 7) == page("words", 71, stack.page_size)


@pytest.mark.parametrize("how", ["page by page", "range", "area", "pool"])
def test_coherency_rule_8_frames_are_none_when_all_is_invalidated(stack: Stack, how: str) -> None:
    offsets = list(range(0, 2000, 13))
    for seed, offset in enumerate(offsets):
        assert _store(stack, offset, KINDS[seed % len(KINDS)], seed) is None
        if seed % 10 == 0:
            stack.check()
    assert stack.frames.used_frames == stack.allocator.used_frames() > 0
    match how:
        case "page by page":
            for offset in offsets[::2] + offsets[1::2]:
                stack.frontswap.invalidate_page(TYPE, offset)
                assert stack.frames.used_frames == stack.allocator.used_frames()
        case "range":
            assert stack.frontswap.invalidate_range(TYPE, 0, 1 << 30) == len(offsets)
        case "area":
            assert stack.frontswap.invalidate_area(TYPE) == len(offsets)
        case "pool":
            assert stack.tmem.destroy_pool(0) == len(offsets)
    stack.check()
    assert stack.frames.used_frames == 0
    assert stack.tmem.statistics().curr_objnode_count == 0
    assert stack.tmem.statistics().curr_obj_count == 0


def test_coherency_rule_8_refused_stores_leak_nothing(stack: Stack) -> None:
    count = _fill(stack)
    used = stack.frames.used_frames
    for offset in range(count, count + 500):
        assert _store(stack, offset, "noise", offset) is not None
    assert stack.frames.used_frames <= used
    stack.check()
    stack.frontswap.invalidate_area(TYPE)
    assert stack.frames.used_frames == 0


@pytest.mark.parametrize("keep_poor", [True, False])
def test_coherency_rule_9_incompressible_page_is_stored_as_it_is_or_refused(
    make: Callable[..., Stack], keep_poor: bool
) -> None:
    stack = make(keep_poor=keep_poor)
    count = 120
    outcomes = [_store(stack, offset, "noise", offset) for offset in range(count)]
    if not keep_poor:
        assert set(outcomes) == {RejectReason.COMPRESS_POOR}
        assert stack.frames.used_frames == 0
        return
    assert set(outcomes) == {None}
    assert stack.load(TYPE, 5) == page("noise", 5, stack.page_size)
    # A frame each, and the few that hold their headers; of zbud's, half as many.
    headers = count // 2 if isinstance(stack.allocator, ZbudPool) else 16
    assert stack.frames.used_frames <= count + headers


def test_coherency_rule_10_destroying_a_pool_is_done_when_it_returns(stack: Stack) -> None:
    stored = sum(_store(stack, offset, "same", offset) is None for offset in range(4000))
    assert stored >= 500  # two a frame, where that is all that fits
    begin = time.process_time()
    assert stack.tmem.destroy_pool(0) == stored
    assert time.process_time() - begin < 2, "something waits or walks what is not there"
    assert stack.frames.used_frames == 0
    assert stack.tmem.statistics().curr_objnode_count == 0
    with pytest.raises(ValueError, match="pool 0"):
        stack.tmem.get(0, TYPE << 8, 0, memoryview(bytearray(stack.page_size)))
