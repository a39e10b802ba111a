# SPDX-License-Identifier: GPL-2.0-or-later
"""zbud beyond the allocators' contract.

The tests are about the choice of buddies, compaction by pairs, adoption and check().
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.base import DEAD
from zswapd.core.allocators.frametable import EPHEMERAL, PERSISTENT
from zswapd.core.allocators.lru import Lru
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.allocators.zbud import NCHUNKS, ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.errors import InvariantError

MakePool = Callable[..., ZbudPool]
dead: list[ZbudPool] = []
"""Pools whose arena another has taken over."""


@pytest.fixture
def make() -> Iterator[MakePool]:
    """Make a pool over fresh frames, all of them populated."""
    made: list[tuple[ZbudPool, PageFrames]] = []

    def make_pool(page_size: int = 4096, frames: int = 256, half: int = PERSISTENT) -> ZbudPool:
        pages = PageFrames(Arena(frames, page_size, kind="memfd"), reserve_frames=frames)
        pages.refill_now()
        lru = Lru(pages.end_frame)
        pages.accompany(lru.populate)
        pool = ZbudPool(pages, half, lru if half else None)
        made.append((pool, pages))
        return pool

    yield make_pool
    for pool, pages in made:
        if pool not in dead:
            pool.check()
            pages.check()
            assert pool.used_frames() == pages.used_frames
        pages.arena.close()
    dead.clear()


def _chunks(pool: ZbudPool, chunks: int) -> int:
    """Allocate an object of `chunks` chunks and make it live."""
    handle = pool.alloc(chunks * pool.max_size // NCHUNKS)
    if handle:
        pool.view(handle, 8)[:] = b"\1" * 8
    return handle


def _frame(pool: ZbudPool, handle: int) -> int:
    return handle // pool.max_size


def test_buddies_are_at_both_ends_of_a_frame(make: MakePool, page_size: int) -> None:
    pool = make(page_size)
    chunk = page_size // NCHUNKS
    first, last = _chunks(pool, 40), _chunks(pool, 10)
    assert first % page_size == 0
    assert last == first + page_size - 10 * chunk
    seen = pool.statistics()
    assert (seen.objects, seen.used_frames, seen.zbud_buddied_count) == (2, 1, 1)
    assert seen.zbud_cumul_chunk_counts[39] == seen.zbud_cumul_chunk_counts[9] == 1


@pytest.mark.parametrize("goes", ["first", "last"])
def test_either_buddy_may_go_and_be_replaced(make: MakePool, goes: str) -> None:
    pool = make()
    both = {"first": _chunks(pool, 30), "last": _chunks(pool, 34)}
    stays = both["last" if goes == "first" else "first"]
    pool.view(stays, 8)[:] = b"stays..."
    pool.free(both[goes])
    # As large as before fits again, at the same end; a chunk more does not.
    room = 30 if goes == "first" else 34
    larger = _chunks(pool, room + 1)
    assert _frame(pool, larger) != _frame(pool, stays)
    again = _chunks(pool, room)
    assert again == both[goes]
    assert bytes(pool.view(stays, 8)) == b"stays..."


def test_new_object_goes_where_it_fits_best(make: MakePool) -> None:
    pool = make()
    # Free: 44, 34, 24, 14 chunks. None of them fits beside another.
    alone = [_chunks(pool, chunks) for chunks in (40, 50)]
    alone += [_chunks(pool, chunks) for chunks in (33, 36)]
    frames = {
        chunks: _frame(pool, handle) for chunks, handle in zip((40, 50, 33, 36), alone, strict=True)
    }
    assert len(set(frames.values())) == 4
    assert _frame(pool, _chunks(pool, 14)) == frames[50]
    assert _frame(pool, _chunks(pool, 25)) == frames[36]
    assert _frame(pool, _chunks(pool, 24)) == frames[40]
    assert _frame(pool, _chunks(pool, 31)) == frames[33]
    assert pool.statistics().zbud_buddied_count == 4


def test_page_is_a_body_and_has_no_buddy(make: MakePool, page_size: int) -> None:
    pool = make(page_size)
    assert pool.max_shared == page_size - page_size // NCHUNKS
    body, shared = pool.alloc(pool.max_shared + 1), pool.alloc(pool.max_shared)
    small = _chunks(pool, 1)
    assert pool.is_body(_frame(pool, body))
    assert not pool.is_body(_frame(pool, shared))
    assert _frame(pool, small) == _frame(pool, shared)
    assert pool.statistics().bodies == 1
    assert pool.statistics().objects == 3
    pool.free(body)
    assert pool.statistics().bodies == 0


def test_statistics_count_frames_by_their_chunks(make: MakePool) -> None:
    pool = make()
    handles = [_chunks(pool, chunks) for chunks in (63, 63, 40, 1)]
    seen = pool.statistics()
    assert seen.zbud_unbuddied_list_counts[62] == 1
    assert seen.zbud_unbuddied_list_counts[39] == 1
    assert sum(seen.zbud_unbuddied_list_counts) == 2
    assert seen.zbud_buddied_count == 1
    pool.free(handles[0])
    pool.free(handles[1])
    assert sum(pool.statistics().zbud_cumul_chunk_counts) == 4


def test_frames_are_counted_by_zcache_s_names_and_none_is_kept_empty(make: MakePool) -> None:
    pool = make()
    handles = [_chunks(pool, chunks) for chunks in (63, 40, 1)]
    handles.append(pool.alloc(pool.max_size))
    for left in (3, 2, 2, 1, 0):
        seen = pool.statistics()
        assert (seen.zbud_curr_raw_pages, seen.used_frames, seen.zbpg_unused_list_count) == (
            left,
            left,
            0,
        )
        if handles:
            pool.free(handles.pop())


def _most_pairs(sizes: list[int]) -> int:
    """Return by trying all pairings how many pairs of objects fit a frame each."""
    if len(sizes) < 2:
        return 0
    first, rest = sizes[0], sizes[1:]
    best = _most_pairs(rest)
    for number, other in enumerate(rest):
        if first + other <= NCHUNKS:
            best = max(best, 1 + _most_pairs(rest[:number] + rest[number + 1 :]))
    return best


def test_compaction_frees_as_many_frames_as_any_pairing(make: MakePool) -> None:
    rng = random.Random(2)
    for _ in range(40):
        pool = make(frames=32)
        sizes = [rng.choice((1, 8, 20, 30, 31, 32, 33, 40, 56, 63)) for _ in range(7)]
        # Each alone in its frame: the other half is freed afterwards.
        held, fillers = [], []
        for size in sizes:
            held.append(_chunks(pool, size))
            fillers.append(_chunks(pool, NCHUNKS - size))
        assert len({_frame(pool, handle) for handle in held}) == 7
        for filler in fillers:
            pool.free(filler)
        promised = pool.freeable_frames()
        assert promised == _most_pairs(sizes)
        moves: list[tuple[int, int]] = []
        assert (
            pool.compact(lambda old, new, moves=moves: moves.append((old, new)))
            == promised
            == len(moves)
        )
        assert pool.freeable_frames() == 0
        seen = pool.statistics()
        assert (seen.pages_compacted, seen.objects_moved, seen.used_frames) == (
            promised,
            promised,
            7 - promised,
        )
        pool.check()


def test_compaction_leaves_an_object_that_is_not_alive_yet(make: MakePool) -> None:
    pool = make()
    pairs = [(_chunks(pool, 20), _chunks(pool, 44)) for _ in range(3)]
    for first, _last in pairs:
        pool.free(first)
    unborn = pool.alloc(1280)
    pool.free(pairs[-1][1])
    pool.compact(lambda old, new: pytest.fail("moved it") if unborn in (old, new) else None)
    pool.check()


def test_oldest_frame_names_both_buddies(make: MakePool) -> None:
    pool = make(half=EPHEMERAL)
    assert pool.oldest_run() == 0
    first = [_chunks(pool, 32), _chunks(pool, 32)]
    second = [_chunks(pool, 40)]
    third = [_chunks(pool, 60)]
    assert sorted(pool.objects_of(pool.oldest_run())) == sorted(first)
    pool.touch(first[1])
    assert pool.objects_of(pool.oldest_run()) == second
    second.append(_chunks(pool, 24))  # a new buddy is a use
    assert pool.objects_of(pool.oldest_run()) == third
    pool.free(third[0])
    assert sorted(pool.objects_of(pool.oldest_run())) == sorted(first)
    body = pool.alloc(pool.max_size)
    assert pool.objects_of(_frame(pool, body)) == []
    pool.check()


def test_pool_without_an_order_has_no_oldest_run(make: MakePool) -> None:
    pool = make()
    pool.touch(_chunks(pool, 3))
    assert pool.oldest_run() == 0


def _take_over(pool: ZbudPool) -> PageFrames:
    dead.append(pool)
    frames = PageFrames(pool._frames.arena, reserve_frames=64)
    assert frames.adopt() == 0
    return frames


@pytest.mark.parametrize("dead", [(), (0,), (1,), (0, 1)])
def test_successor_finds_the_buddies_that_live(
    make: MakePool, page_size: int, dead: tuple[int, ...]
) -> None:
    pool = make(page_size)
    handles = [_chunks(pool, 20), _chunks(pool, 33)]
    for number in dead:
        pool._live_words[handles[number] >> 3] = DEAD
    successor = ZbudPool(_take_over(pool))
    assert successor.adopt() == (len(dead) > 1), (
        "a death leaves one store or free that was cut short"
    )
    successor.check()
    found: dict[int, int] = {}
    successor.each_object(found.__setitem__)
    alive = [number for number in (0, 1) if number not in dead]
    assert found == {handles[number]: (20, 33)[number] * page_size // NCHUNKS for number in alive}
    assert successor.used_frames() == successor._frames.used_frames == (1 if alive else 0)


def test_successor_of_the_other_half_sees_nothing(make: MakePool) -> None:
    pool = make(half=EPHEMERAL)
    _chunks(pool, 20)
    frames = _take_over(pool)
    other = ZbudPool(frames, EPHEMERAL)
    assert other.adopt() == 0
    assert frames.used_frames == other.used_frames() == 0


@pytest.mark.parametrize("flip", [1 << 4, 1 << 13, 64 << 16, 1 << 31, 127 << 24])
def test_seal_whose_chunks_make_no_sense_is_damage(make: MakePool, flip: int) -> None:
    pool = make()
    handle = _chunks(pool, 40)
    word = _frame(pool, handle) * 4
    good = pool._words[word]
    pool._words[word] = good ^ flip
    dead.append(pool)
    frames = PageFrames(pool._frames.arena, reserve_frames=64)
    wrong = frames.adopt()
    successor = ZbudPool(frames)
    assert wrong + successor.adopt() == 1
    assert frames.arena.distrusted
    successor.check()
    assert frames.used_frames == 0


def test_run_of_zsmalloc_is_damage(make: MakePool) -> None:
    pool = make()
    other = ZsPool(pool._frames)
    assert other.alloc(100)
    assert other.alloc(1000)
    assert ZbudPool(_take_over(pool)).adopt() == 2


def test_check_finds_damage(make: MakePool) -> None:
    pool = make(half=EPHEMERAL)
    handles = [_chunks(pool, chunks) for chunks in (40, 10, 50, 45)]
    words = pool._words
    for handle, bit in (
        (handles[0], 20),
        (handles[0], 4),
        (handles[2], 16),
        (handles[2], 24),
        (handles[2], 4),
    ):
        frame = _frame(pool, handle)
        good = words[frame * 4]
        words[frame * 4] = good ^ 1 << bit
        with pytest.raises(InvariantError):
            pool.check()
        words[frame * 4] = good
    for place in (2, 3):
        good = words[_frame(pool, handles[2]) * 4 + place]
        words[_frame(pool, handles[2]) * 4 + place] = good ^ 1
        with pytest.raises(InvariantError):
            pool.check()
        words[_frame(pool, handles[2]) * 4 + place] = good
    for name in ("_bodies", "_mask"):
        good = getattr(pool, name)
        setattr(pool, name, good ^ 2)
        with pytest.raises(InvariantError):
            pool.check()
        setattr(pool, name, good)
    pool._counts[0] += 1
    with pytest.raises(InvariantError):
        pool.check()
    pool._counts[0] -= 1
    lru = pool._lru
    assert lru is not None
    lru.remove(_frame(pool, handles[0]))
    with pytest.raises(InvariantError, match="order of use"):
        pool.check()
    lru.add(_frame(pool, handles[0]))
