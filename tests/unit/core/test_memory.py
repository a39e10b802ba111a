# SPDX-License-Identifier: GPL-2.0-or-later
"""When a store should wait: there is too little memory for it, and a refill can bring more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.memory import StoreMemory
from zswapd.core.tmem.objnodes import Objnodes


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[PageFrames, Objnodes, StoreMemory]]]:
    arenas: list[Arena] = []

    def made(
        total: int = 4000, *, reserve: int = 1000, nodes: int = 4000
    ) -> tuple[PageFrames, Objnodes, StoreMemory]:
        arena = Arena(total, 4096, kind="memfd")
        arenas.append(arena)
        frames = PageFrames(arena, reserve_frames=reserve)
        frames.refill_now()
        objnodes = Objnodes(nodes, reserve=200)
        memory = StoreMemory(frames, objnodes, has_room=lambda _: True, is_disk_busy=None)
        return frames, objnodes, memory

    yield made
    for arena in arenas:
        arena.close()


Make = Callable[..., tuple[PageFrames, Objnodes, StoreMemory]]


def test_full_reserve_is_enough_for_the_longest_write(make: Make) -> None:
    _, _, memory = make()
    assert not memory.is_short(256)


@pytest.mark.parametrize(("pages", "needed"), [(1, 8), (10, 80), (256, 500)])
def test_short_below_what_the_pages_may_take(make: Make, pages: int, needed: int) -> None:
    """8 frames a page, at most 256 beside one for each page, at most half of the reserve."""
    frames, _, memory = make()
    while frames.table.long_frames >= needed:
        assert not memory.is_short(pages)
        assert frames.alloc(4)
    assert memory.is_short(pages)


def test_pool_at_its_limit_and_a_full_arena_are_not_short(make: Make) -> None:
    frames, _, memory = make()
    while frames.alloc(8):
        pass
    assert memory.is_short(1)
    frames.limit_frames = frames.used_frames
    assert not memory.is_short(1), "a refill does not help"
    frames.limit_frames += 1
    assert memory.is_short(1)

    frames, _, memory = make(900, reserve=900)
    while frames.alloc(8):
        pass
    assert not frames.can_grow()
    assert not memory.is_short(1)


def test_what_a_refill_under_way_has_populated_counts(make: Make) -> None:
    frames, _, memory = make()
    while frames.alloc(8):
        pass
    job = frames.begin_refill(1000)
    assert memory.is_short(1)
    job.work(frames.arena)  # in the other thread
    assert not memory.is_short(1), "although it is not committed"
    frames.commit(job)
    frames.check()


class Disk:
    """A disk whose buffers are all in use, behind a pool with room for a number of frames."""

    is_working = True
    room = 0

    def is_busy(self, _pages: int) -> bool:
        return self.is_working

    def has_room(self, frames: int) -> bool:
        return frames <= self.room

    def memory(self, frames: PageFrames, nodes: Objnodes) -> StoreMemory:
        return StoreMemory(frames, nodes, has_room=self.has_room, is_disk_busy=self.is_busy)


def test_full_pool_waits_for_the_disk_behind_it(make: Make) -> None:
    frames, nodes, _ = make()
    disk = Disk()
    memory = disk.memory(frames, nodes)
    assert memory.is_short(1)
    assert memory.waits_for_disk
    memory.await_refill()
    assert not frames.is_awaited, "no refill helps"
    disk.is_working = False
    assert not memory.is_short(1)
    assert not memory.waits_for_disk
    disk.is_working = True
    disk.room = 8
    assert not memory.is_short(1), "the pool takes it"
    assert memory.is_short(2)


def test_refill_that_was_given_up_leaves_the_disk(make: Make) -> None:
    frames, nodes, _ = make()
    disk = Disk()
    disk.room = 1000
    memory = disk.memory(frames, nodes)
    while frames.alloc(8):
        pass
    assert memory.is_short(1)
    assert not memory.waits_for_disk, "the refill comes first"
    memory.give_up()
    assert memory.is_short(1)
    assert memory.waits_for_disk
    disk.is_working = False
    assert not memory.is_short(1)
    frames.refill_now()
    while frames.alloc(8):
        pass
    assert memory.is_short(1), "memory has come since"


def test_index_nodes_can_be_short_too(make: Make) -> None:
    _, nodes, memory = make()
    while nodes.available() >= 16:
        nodes.alloc()
    assert memory.is_short(1)
    nodes.refill_now()
    assert not memory.is_short(1)


def test_index_that_is_full_does_not_wait(make: Make) -> None:
    _, nodes, memory = make(nodes=100)
    while nodes.alloc():
        pass
    assert not memory.is_short(1)
