# SPDX-License-Identifier: GPL-2.0-or-later
"""zbuds and its eviction: the order, the counts by name, and that only evicted pages go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.support.stack import Stack, build
from tests.support.strategies import page
from zswapd.core.allocators.frametable import EPHEMERAL, PERSISTENT
from zswapd.core.pam.base import HEADER, HEADER_BYTES, RejectReason
from zswapd.errors import CorruptedPageError, InvariantError

Make = Callable[..., Stack]
INODE = 7
TYPE = 0


@pytest.fixture
def make() -> Iterator[Make]:
    """Build stacks that are checked and closed at the end."""
    made: list[Stack] = []

    def make_stack(page_size: int = 4096, *, reserve_target: int = 0, **options: object) -> Stack:
        stack = build(page_size, **options)  # type: ignore[arg-type]
        stack.frames.reserve_target = reserve_target
        stack.frontswap.init(TYPE)
        made.append(stack)
        return stack

    yield make_stack
    for stack in made:
        stack.check()
        stack.close()


@pytest.fixture(params=["zbud", "zsmalloc"])
def stack(request: pytest.FixtureRequest, make: Make) -> Stack:
    return make(ephemeral=request.param)


def _pool(stack: Stack) -> int:
    return stack.cache.cleancache.init_fs()


def _put(
    stack: Stack, pool: int, index: int, kind: str = "half", seed: int | None = None
) -> RejectReason | None:
    data = memoryview(page(kind, index if seed is None else seed, stack.page_size))
    return stack.cache.cleancache.put_page(pool, INODE, index, data)


def _get(stack: Stack, pool: int, index: int) -> bytes | None:
    out = bytearray(stack.page_size)
    return (
        bytes(out)
        if stack.cache.cleancache.get_page(pool, INODE, index, memoryview(out), keep=True)
        else None
    )


def _pampd(stack: Stack, pool: int, index: int) -> int:
    return stack.tmem.find(pool, INODE, index)


def test_counters_follow_every_page(stack: Stack) -> None:
    pool, zbuds = _pool(stack), stack.cache.zbuds
    for index in range(20):
        assert _put(stack, pool, index) is None
    seen = zbuds.statistics()
    assert (seen.zbud_curr_zpages, seen.zbud_cumul_zpages) == (20, 20)
    assert 20 * 2048 <= seen.zbud_curr_zbytes == seen.zbud_cumul_zbytes <= 20 * 2100
    assert _put(stack, pool, 3, seed=77) is None
    assert _put(stack, pool, 99, "noise") is RejectReason.COMPRESS_POOR
    for index in range(10):
        stack.cache.cleancache.invalidate_page(pool, INODE, index)
    seen = zbuds.statistics()
    assert (seen.zbud_curr_zpages, seen.zbud_cumul_zpages, seen.compress_poor) == (10, 21, 1)
    assert 10 * 2048 <= seen.zbud_curr_zbytes <= 10 * 2100
    assert _get(stack, pool, 15) == page("half", 15, stack.page_size)
    assert zbuds.statistics().loads == 1


def test_same_filled_page_takes_a_header_and_a_word(stack: Stack) -> None:
    pool = _pool(stack)
    assert _put(stack, pool, 1, "same") is None
    assert stack.cache.zbuds.statistics().zbud_curr_zbytes == 8
    assert _get(stack, pool, 1) == page("same", 1, stack.page_size)


@pytest.mark.parametrize("where", [0, 9, 17, 22, HEADER_BYTES + 5])
def test_damaged_page_is_an_error_and_no_frame_is_lost_by_it(stack: Stack, where: int) -> None:
    pool = _pool(stack)
    _put(stack, pool, 1)
    stack.arena.view[_pampd(stack, pool, 1) + where] ^= 1
    out = memoryview(bytearray(stack.page_size))
    with pytest.raises(CorruptedPageError):
        stack.cache.zbuds.get(_pampd(stack, pool, 1), INODE, 1, out)
    assert _get(stack, pool, 1) is None
    assert stack.frames.ephemeral_frames == 0
    assert stack.cache.zbuds.statistics().damaged_pages == 1


def test_page_that_names_a_codec_for_bodies_is_damaged_without_checksums_of_data_too(
    make: Make,
) -> None:
    stack = make(checksum=False)
    pool = _pool(stack)
    _put(stack, pool, 1)
    stack.arena.view[_pampd(stack, pool, 1) + 22] = 1
    with pytest.raises(CorruptedPageError, match="checksum"):
        stack.cache.zbuds.get(
            _pampd(stack, pool, 1), INODE, 1, memoryview(bytearray(stack.page_size))
        )


def test_free_of_no_page_is_an_invariant_error(stack: Stack) -> None:
    pool = _pool(stack)
    _put(stack, pool, 1)
    _put(stack, pool, 2)
    pampd = _pampd(stack, pool, 1)
    stack.cache.cleancache.invalidate_page(pool, INODE, 1)
    with pytest.raises(InvariantError):
        stack.cache.zbuds.free(pampd)


def test_check_finds_wrong_counts(stack: Stack) -> None:
    pool, zbuds = _pool(stack), stack.cache.zbuds
    _put(stack, pool, 1)
    for name in ("_pages", "_zbytes"):
        setattr(zbuds, name, getattr(zbuds, name) + 1)
        with pytest.raises(InvariantError):
            zbuds.check(stack.tmem.pampds(zbuds))
        setattr(zbuds, name, getattr(zbuds, name) - 1)


# Eviction.


def test_least_recently_used_go_first(make: Make) -> None:
    stack = make()
    pool = _pool(stack)
    for index in range(40):
        assert (
            _put(stack, pool, index, "pointers") is None
        )  # too large for another like it in a frame
    assert stack.frames.ephemeral_frames == 40
    used = {1, 5, 17}
    for index in used:
        _get(stack, pool, index)
    assert stack.cache.eviction.evict(30) == 30
    left = {index for index in range(40) if _get(stack, pool, index) is not None}
    assert used <= left
    assert left - used == set(range(33, 40))
    seen = stack.cache.zbuds.statistics()
    assert (seen.evicted_zpages, seen.evicted_raw_pages) == (30, 30)
    assert (seen.evicted_unbuddied_pages, seen.evicted_buddied_pages) == (30, 0)


def test_both_buddies_go_with_their_frame(make: Make) -> None:
    stack = make()
    pool = _pool(stack)
    for index in range(20):
        assert _put(stack, pool, index, "words") is None
    assert stack.frames.ephemeral_frames == 10
    assert stack.cache.eviction.evict(3) == 3
    assert [index for index in range(20) if _get(stack, pool, index) is None] == list(range(6))
    seen = stack.cache.zbuds.statistics()
    assert (seen.evicted_buddied_pages, seen.evicted_unbuddied_pages, seen.evicted_zpages) == (
        3,
        0,
        6,
    )


def test_whole_zspages_go(make: Make) -> None:
    stack = make(ephemeral="zsmalloc")
    pool = _pool(stack)
    for index in range(200):
        assert _put(stack, pool, index, "words") is None
    frames = stack.frames.ephemeral_frames
    freed = stack.cache.eviction.evict(1)
    assert 1 <= freed == frames - stack.frames.ephemeral_frames <= 8
    left = [index for index in range(200) if _get(stack, pool, index) is not None]
    assert len(left) == 200 - stack.cache.zbuds.statistics().evicted_zpages < 200


def test_evicting_more_than_there_is_ends(stack: Stack) -> None:
    pool = _pool(stack)
    for index in range(30):
        _put(stack, pool, index)
    frames = stack.frames.ephemeral_frames
    assert stack.cache.eviction.evict(10_000) == frames
    assert stack.cache.eviction.evict(1) == 0
    assert stack.frames.ephemeral_frames == 0
    assert not stack.cache.eviction.evict_for_store()


def test_damaged_header_costs_nobody_a_page(make: Make) -> None:
    # It names swap's page, of the same index: only the index may say whose copy this is.
    stack = make()
    pool = _pool(stack)
    assert stack.frontswap.store(TYPE, 0, memoryview(page("half", 1, stack.page_size))) is None
    _put(stack, pool, 5)
    _put(stack, pool, 6, "poor")
    pampd = _pampd(stack, pool, 5)
    good = HEADER.unpack_from(stack.arena.view, pampd)
    HEADER.pack_into(stack.arena.view, pampd, *good[:2], 0, 0, *good[4:6], 0)
    assert stack.cache.eviction.evict(2) == 1
    assert stack.load(TYPE, 0) == page("half", 1, stack.page_size)
    assert _get(stack, pool, 6) is None
    seen = stack.cache.zbuds.statistics()
    assert seen.failed_evictions > 0
    assert seen.evicted_raw_pages == 1
    for pool_number in (200, 255):  # nor a pool that does not exist
        HEADER.pack_into(stack.arena.view, pampd, *good[:6], pool_number)
        assert stack.cache.eviction.evict(1) == 0
    HEADER.pack_into(stack.arena.view, pampd, *good)
    assert stack.cache.eviction.evict(1) == 1


def test_run_that_can_be_emptied_only_in_part_stays_with_what_the_index_names(stack: Stack) -> None:
    pool = _pool(stack)
    for index in range(2):
        _put(stack, pool, index, "sparse", 7)
    damaged = _pampd(stack, pool, 0)
    good = HEADER.unpack_from(stack.arena.view, damaged)
    HEADER.pack_into(stack.arena.view, damaged, *good[:3], good[3] + 100, *good[4:])
    assert stack.cache.eviction.evict(1) == 0
    stack.cache.allocator.check()
    assert _get(stack, pool, 1) is None
    assert _pampd(stack, pool, 0) == damaged, "its frame is somebody else's now"
    HEADER.pack_into(stack.arena.view, damaged, *good)
    assert _get(stack, pool, 0) == page("sparse", 7, stack.page_size)
    assert stack.cache.zbuds.statistics().zbud_curr_zpages == 1


# Room for a put.


def test_cache_keeps_to_its_limit_and_lives_on_its_oldest(make: Make) -> None:
    stack = make()
    pool = _pool(stack)
    stack.cache.eviction.limit_frames = 10
    for index in range(100):
        assert _put(stack, pool, index, "pointers") is None
        assert stack.frames.ephemeral_frames <= 10
    assert [index for index in range(100) if _get(stack, pool, index) is not None] == list(
        range(90, 100)
    )
    # Lowered below the use, it is reached a few frames a put.
    stack.cache.eviction.limit_frames = 2
    assert _put(stack, pool, 100, "pointers") is RejectReason.POOL_LIMIT_HIT
    assert _put(stack, pool, 101, "pointers") is RejectReason.POOL_LIMIT_HIT
    assert _put(stack, pool, 102, "pointers") is None
    assert stack.frames.ephemeral_frames == 2


def test_limit_of_nothing_refuses(stack: Stack) -> None:
    pool = _pool(stack)
    stack.cache.eviction.limit_frames = 0
    assert _put(stack, pool, 1) is RejectReason.POOL_LIMIT_HIT
    assert stack.frames.ephemeral_frames == 0


def test_half_of_the_reserve_is_left_to_swap(make: Make) -> None:
    stack = make(frames=256, reserve_target=200)
    pool = _pool(stack)
    for index in range(300):
        assert _put(stack, pool, index, "pointers") is None
    assert stack.frames.ephemeral_frames == 156
    assert stack.frames.table.free_frames == 100
    # Swap takes what is left; the cache then has what it has, and no more.
    for offset in range(60):
        assert (
            stack.frontswap.store(TYPE, offset, memoryview(page("noise", offset, stack.page_size)))
            is None
        )
    free = stack.frames.table.free_frames
    assert _put(stack, pool, 1000, "pointers") in (None, RejectReason.FAILED_ALLOC)
    assert stack.frames.table.free_frames >= free
    stack.cache.eviction.evict(1000)
    for offset in range(60, 200):
        assert (
            stack.frontswap.store(TYPE, offset, memoryview(page("noise", offset, stack.page_size)))
            is None
        )
    assert _put(stack, pool, 1001, "pointers") is RejectReason.FAILED_ALLOC
    assert stack.frames.ephemeral_frames == 0


def test_index_that_is_full_makes_the_oldest_go(make: Make) -> None:
    stack = make(node_reserve=100, ephemeral="zsmalloc")
    nodes = stack.cache.nodes
    nodes.capacity = nodes.available()
    pool = _pool(stack)
    for index in range(0, 3000 * 64, 64):  # a node for each
        assert _put(stack, pool, index, "same", 1) is None
    assert _get(stack, pool, 2999 * 64) is not None
    assert _get(stack, pool, 0) is None
    assert stack.cache.zbuds.statistics().evicted_zpages > 0
    assert stack.nodes.in_use == 0, "swap's index was used"


# What is evicted for swap.


@pytest.mark.parametrize("ephemeral", ["zbud", "zsmalloc"])
@pytest.mark.parametrize("kind", ["half", "noise", "words"])
def test_arena_full_of_ephemeral_pages_refuses_no_store(
    make: Make, ephemeral: str, kind: str
) -> None:
    stack = make(ephemeral=ephemeral)
    page_size = stack.page_size
    pool = _pool(stack)
    for index in range(20_000):
        _put(stack, pool, index, "words", index % 50)
        if stack.cache.zbuds.statistics().evicted_raw_pages:
            break
    assert stack.frames.table.free_frames < 16
    count = 200
    for offset in range(count):
        assert (
            stack.frontswap.store(TYPE, offset, memoryview(page(kind, offset, page_size))) is None
        )
    for offset in range(count):
        assert stack.load(TYPE, offset) == page(kind, offset, page_size)
    assert stack.cache.zbuds.statistics().evicted_raw_pages > 30
    stack.check()


def test_store_that_needs_frames_side_by_side_gets_them(make: Make) -> None:
    # Single frames of the cache, used in random order: evicting by age alone would free frames all
    # over the place.
    stack = make(frames=400)
    pool = _pool(stack)
    for index in range(400):
        _put(stack, pool, index, "pointers")
    assert stack.frames.table.free_frames == 0
    order = list(range(400))
    random.Random(1).shuffle(order)
    for index in order:
        _get(stack, pool, index)
    length = stack.allocator.longest_run
    assert length == 8
    assert stack.cache.eviction.evict_for_store()
    assert stack.frames.alloc(length), "no run of this length"
    assert stack.frames.ephemeral_frames >= 400 - 2 * length
    stack.frames.free(next(iter(stack.frames.used_runs(PERSISTENT))))


@pytest.mark.parametrize("ephemeral", ["zbud", "zsmalloc"])
def test_neighbours_on_the_left_are_evicted_too(make: Make, ephemeral: str) -> None:
    stack = make(frames=100, ephemeral=ephemeral)
    pool = _pool(stack)
    for index in range(400):
        _put(stack, pool, index, "pointers")
    # The oldest run is the last one of the arena: nothing is to the right of it.
    allocator = stack.cache.allocator
    runs = sorted(stack.frames.used_runs(EPHEMERAL), reverse=True)
    for first in runs:
        allocator.touch(first * stack.page_size)
    assert allocator.oldest_run() == runs[0]
    before = stack.frames.ephemeral_frames
    assert stack.cache.eviction.evict_for_store()
    assert stack.frames.alloc(8) >= runs[8]
    assert before - stack.frames.ephemeral_frames <= 8 + 2 * allocator.longest_run
    stack.frames.free(next(iter(stack.frames.used_runs(PERSISTENT))))


@pytest.mark.parametrize("damaged", [1, 7])
def test_damaged_header_of_the_oldest_refuses_no_store(make: Make, damaged: int) -> None:
    stack = make(frames=256)
    pool = _pool(stack)
    for index in range(300):
        _put(stack, pool, index, "pointers")
    assert stack.frames.table.free_frames == 0
    oldest = {_pampd(stack, pool, index): index for index in range(44, 44 + damaged)}
    for pampd, index in oldest.items():
        stack.arena.view[pampd + 16 : pampd + 20] = (index + 100_000).to_bytes(4, "little")
    assert stack.cache.zbuds.oldest_run() * stack.page_size <= _pampd(stack, pool, 44)
    assert stack.frontswap.store(TYPE, 0, memoryview(page("noise", 1, stack.page_size))) is None
    assert stack.load(TYPE, 0) == page("noise", 1, stack.page_size)
    assert stack.cache.zbuds.statistics().failed_evictions == damaged
    for pampd, index in oldest.items():
        stack.arena.view[pampd + 16 : pampd + 20] = index.to_bytes(4, "little")
        assert _get(stack, pool, index) == page("pointers", index, stack.page_size)


def test_page_for_which_no_frame_is_free_is_refused_and_counted(make: Make) -> None:
    stack = make(frames=64)
    pool = _pool(stack)
    for offset in range(200):
        if (
            stack.frontswap.store(TYPE, offset, memoryview(page("noise", offset, stack.page_size)))
            is not None
        ):
            break
    zbuds = stack.cache.zbuds
    data = memoryview(page("pointers", 1, stack.page_size))
    assert zbuds.create(pool, INODE, 1, data, replacing=False) == -RejectReason.FAILED_ALLOC
    assert zbuds.statistics().failed_get_free_pages == 1
    assert _put(stack, pool, 1, "pointers") is RejectReason.FAILED_ALLOC


def test_nothing_to_eat_is_a_refusal(make: Make) -> None:
    stack = make(frames=32)
    stack.zv.limit_frames = 1000
    offset = 0
    while (
        stack.frontswap.store(TYPE, offset, memoryview(page("noise", offset, stack.page_size)))
        is None
    ):
        offset += 1
    assert stack.frontswap.statistics().rejects == {"failed_alloc": 1}


def test_limits_of_swap_count_swaps_frames_only(make: Make) -> None:
    stack = make(frames=200)
    pool = _pool(stack)
    for index in range(100):
        assert _put(stack, pool, index, "pointers") is None
    stack.zv.limit_frames = 20
    offset = 0
    while (
        stack.frontswap.store(TYPE, offset, memoryview(page("noise", offset, stack.page_size)))
        is None
    ):
        offset += 1
    assert stack.frontswap.statistics().rejects == {"pool_limit_hit": 1}
    assert 15 <= offset <= 20
    assert stack.frames.ephemeral_frames == 100
    stack.cache.eviction.limit_frames = 110
    for index in range(100, 150):
        assert _put(stack, pool, index, "pointers") is None
    assert stack.frames.ephemeral_frames == 110
