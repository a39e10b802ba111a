# SPDX-License-Identifier: GPL-2.0-or-later
"""What every allocator over page frames promises (core/allocators/base.py).

One body, all implementations.

A new allocator joins by a line in ALLOCATORS.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest

from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.base import DEAD, Allocator
from zswapd.core.allocators.frametable import EPHEMERAL
from zswapd.core.allocators.lru import Lru
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.errors import InvariantError

ALLOCATORS: dict[str, Callable[[PageFrames], Allocator]] = {
    "zsmalloc": ZsPool,
    "zsmalloc-1": lambda frames: ZsPool(frames, max_zspage_frames=1),
    "zsmalloc-16": lambda frames: ZsPool(frames, max_zspage_frames=16),
    "zbud": ZbudPool,
    "zsmalloc-ephemeral": lambda frames: ZsPool(frames, EPHEMERAL, _order(frames)),
    "zbud-ephemeral": lambda frames: ZbudPool(frames, EPHEMERAL, _order(frames)),
}


def _order(frames: PageFrames) -> Lru:
    lru = Lru(frames.end_frame)
    frames.accompany(lru.populate)
    return lru


FRAMES = 600
LIFE = struct.Struct("=Q")


@pytest.fixture
def frames(page_size: int) -> Iterator[PageFrames]:
    made = PageFrames(Arena(FRAMES, page_size, kind="memfd"), reserve_frames=FRAMES)
    made.refill_now()
    yield made
    made.check()
    made.arena.close()


@pytest.fixture(params=ALLOCATORS)
def pool(request: pytest.FixtureRequest, frames: PageFrames) -> Iterator[Allocator]:
    made = ALLOCATORS[request.param](frames)
    yield made
    made.check()


def _sizes(page_size: int) -> list[int]:
    edges = {1, 8, 16, 31, 32, 33, page_size // 2, page_size - 1, page_size}
    return sorted(edges | {page_size * n // 16 + d for n in range(1, 16) for d in (-1, 0, 1)})


def _fill(pool: Allocator, handle: int, size: int, seed: int) -> None:
    """Write data that follows from `seed`, with a living first word."""
    data = LIFE.pack(seed + 1) + random.Random(seed).randbytes(size)
    pool.view(handle, size)[:] = data[:size]


def _intact(pool: Allocator, handle: int, size: int, seed: int) -> bool:
    data = LIFE.pack(seed + 1) + random.Random(seed).randbytes(size)
    return bytes(pool.view(handle, size)) == data[:size]


def _fill_up(pool: Allocator, size: int) -> list[int]:
    handles = []
    while handle := pool.alloc(size):
        handles.append(handle)
        _fill(pool, handle, size, len(handles))
    return handles


def test_objects_of_all_sizes_keep_their_data(pool: Allocator, page_size: int) -> None:
    held = {}
    for seed, size in enumerate(_sizes(page_size)):
        handle = pool.alloc(size)
        assert handle > 0
        assert handle not in held
        _fill(pool, handle, size, seed)
        held[handle] = size, seed
    pool.check()
    assert all(_intact(pool, handle, *what) for handle, what in held.items())


@pytest.mark.parametrize("size", [0, -1, None])
def test_size_out_of_range_is_refused(pool: Allocator, page_size: int, size: int | None) -> None:
    with pytest.raises(ValueError, match=str(page_size)):
        pool.alloc(page_size + 1 if size is None else size)
    assert pool.used_frames() == 0


def test_largest_object_is_a_page(pool: Allocator, page_size: int) -> None:
    assert pool.max_size == page_size
    assert pool.alloc(pool.max_size)


def test_new_object_is_not_alive(pool: Allocator, page_size: int) -> None:
    # Also not when its memory held a living object before.
    size = page_size // 3
    for _ in range(3):
        handles = _fill_up(pool, size)
        for handle in handles:
            pool.free(handle)
        again = [pool.alloc(size) for _ in range(20)]
        assert {LIFE.unpack_from(pool.memory, handle)[0] for handle in again} == {DEAD}
        for handle in again:
            pool.free(handle)


def test_freed_object_is_dead(pool: Allocator, page_size: int) -> None:
    size = page_size // 9
    handles = [pool.alloc(size) for _ in range(3)]
    for handle in handles:
        _fill(pool, handle, size, 1)
    pool.free(handles[1])
    assert LIFE.unpack_from(pool.memory, handles[1])[0] == DEAD
    assert (
        LIFE.unpack_from(pool.memory, handles[0])[0]
        == LIFE.unpack_from(pool.memory, handles[2])[0]
        == 2
    )


def test_view_is_the_memory_itself(pool: Allocator, page_size: int) -> None:
    handle = pool.alloc(page_size)
    pool.view(handle, page_size)[page_size - 1] = 0x5A
    assert pool.memory[handle + page_size - 1] == 0x5A
    assert len(pool.view(handle, 100)) == 100


@pytest.mark.parametrize("share", [40, 7, 1])
def test_full_pool_refuses_until_something_is_freed(
    pool: Allocator, frames: PageFrames, page_size: int, share: int
) -> None:
    size = page_size // share
    handles = _fill_up(pool, size)
    assert pool.alloc(size) == 0
    assert pool.alloc(size) == 0
    pool.check()
    assert pool.used_frames() == frames.used_frames <= FRAMES
    pool.free(handles[-1])
    assert pool.alloc(size) == handles[-1]
    assert pool.alloc(size) == 0
    assert all(_intact(pool, handle, size, seed + 1) for seed, handle in enumerate(handles[:-1]))


@pytest.mark.parametrize("order", ["same", "reverse", "random"])
def test_frames_in_use_are_none_when_all_is_freed(
    pool: Allocator, frames: PageFrames, page_size: int, order: str
) -> None:
    handles = [
        handle
        for size in _sizes(page_size)
        for handle in (pool.alloc(size), pool.alloc(size))
        if handle
    ]
    assert pool.used_frames() == frames.used_frames > 0
    if order == "reverse":
        handles.reverse()
    elif order == "random":
        random.Random(1).shuffle(handles)
    for handle in handles:
        pool.free(handle)
        pool.check()
        assert pool.used_frames() == frames.used_frames
    assert frames.used_frames == 0


def test_free_of_what_was_never_allocated_is_an_invariant_error(
    pool: Allocator, page_size: int
) -> None:
    handle = pool.alloc(page_size // 2)
    for wrong in (handle + 8, (FRAMES - 1) * page_size):
        with pytest.raises(InvariantError):
            pool.free(wrong)
    pool.check()
    pool.free(handle)


def test_compaction_frees_frames_and_keeps_every_object(
    pool: Allocator, frames: PageFrames, page_size: int
) -> None:
    size = page_size // 7
    handles = _fill_up(pool, size)
    held = {handle: seed + 1 for seed, handle in enumerate(handles)}
    for handle in handles:
        if held[handle] % 10:
            pool.free(handle)
            del held[handle]
    before = pool.used_frames()

    def moved(old: int, new: int) -> None:
        assert old in held, "a dead object was moved"
        assert new not in held
        assert _intact(pool, old, size, held[old]), (
            "the old copy has to live until the call returns"
        )
        held[new] = held.pop(old)

    freed = pool.compact(moved, 1 << 30)
    pool.check()
    assert before - pool.used_frames() == freed
    assert pool.used_frames() == frames.used_frames
    assert all(_intact(pool, handle, size, seed) for handle, seed in held.items())
    # What is left is as dense as the allocator can be: no more than one run of slack.
    per_frame = 2 if isinstance(pool, ZbudPool) else 7 / 1.3
    assert pool.used_frames() <= len(held) / per_frame + 16
    assert pool.compact(moved, 1 << 30) == 0, "a second run finds nothing to do"


def test_compaction_stops_at_the_bound(pool: Allocator, page_size: int) -> None:
    size = page_size // 9
    handles = _fill_up(pool, size)
    live = set(handles[::10])
    for handle in handles:
        if handle not in live:
            pool.free(handle)
    seen = []

    def moved(old: int, new: int) -> None:
        seen.append(old)
        live.remove(old)
        live.add(new)

    rounds = 0
    while True:
        before = len(seen)
        freed = pool.compact(moved, 3)
        pool.check()
        assert len(seen) - before <= 3
        rounds += 1
        if len(seen) == before and not freed:
            break
        assert rounds < 10_000
    assert rounds > 1


def test_compaction_of_a_dense_pool_moves_nothing(pool: Allocator, page_size: int) -> None:
    for seed in range(50):
        handle = pool.alloc(page_size // 5)
        _fill(pool, handle, page_size // 5, seed)

    def moved(old: int, new: int) -> None:
        pytest.fail("moved although nothing is to be had")

    assert pool.compact(moved, 1 << 30) == 0


def test_run_goes_back_with_all_its_objects(
    pool: Allocator, frames: PageFrames, page_size: int
) -> None:
    handles: dict[int, tuple[int, int]] = {}
    for seed, size in enumerate([page_size // 16, page_size // 3, page_size // 2] * 20):
        handle = pool.alloc(size)
        _fill(pool, handle, size, seed)
        handles[handle] = size, seed
    while handles:
        run = frames.table.first_of(next(iter(handles)) // page_size)
        length = frames.table.words[run * 4 + 1] & 255
        inside = pool.objects_of(run)
        before = pool.used_frames()
        pool.free_run(run)
        assert before - pool.used_frames() == length
        pool.check()
        frames.check()
        for handle in inside:
            del handles[handle]
        assert all(_intact(pool, handle, *what) for handle, what in handles.items())
    assert pool.used_frames() == frames.used_frames == 0


def test_what_begins_no_run_of_objects_cannot_go_as_one(
    pool: Allocator, frames: PageFrames, page_size: int
) -> None:
    body = pool.alloc(page_size)
    free = frames.alloc(1)
    for first in (body // page_size, free):
        with pytest.raises(InvariantError, match="begins no run"):
            pool.free_run(first)
    frames.free(free)
