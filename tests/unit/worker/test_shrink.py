# SPDX-License-Identifier: GPL-2.0-or-later
"""The shrinking task, over pressure files that a test writes and a cache that is a number.

By a clock that jumps.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
import trio.testing

from tests.support.proc import write_memory, write_psi
from zswapd.core.reclaim.pressure import Pressure
from zswapd.core.reclaim.shrinker import BATCH_S, CALM_S, GROW_S, Shrinker
from zswapd.worker.shrink import EMPTY_LOOK_S, LOOK_S, STEP_FRAMES, Shrinking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

LIMIT = 1000


class Box:
    """A machine: what is evicted is free memory once it was trimmed."""

    def __init__(self, root: Path) -> None:
        self.root, self.cached, self.surplus, self.free = root, 0, 0, 0
        self.have(5000)
        write_psi(root)
        self.pressure = Pressure(root, trio.current_time)
        self.pressure.arm()
        self.limit_frames = 0
        self.shrinker = Shrinker(
            self,
            lambda: self.cached,
            total_frames=100_000,
            limit_frames=LIMIT,
            clock=trio.current_time,
        )
        self.shrinking = Shrinking(self.pressure, self.shrinker, self._trim)

    def have(self, free: int) -> None:
        self.free = free
        write_memory(self.root, free=free, low=1000, high=1400)

    def evict(self, count: int) -> int:
        assert count > 0
        if not self.cached:
            return 0
        self.cached -= 1
        self.surplus += 1
        return 1

    async def _trim(self, *, long_only: bool) -> int:
        if long_only:
            return 0
        given, self.surplus = self.surplus, 0
        await trio.lowlevel.checkpoint()
        self.have(self.free + given)
        return given


@pytest.fixture
async def box(
    tmp_path: Path, autojump_clock: MockClock, nursery: trio.Nursery
) -> AsyncIterator[Box]:
    made = Box(tmp_path)
    made.cached = 1  # an empty cache is looked at less often
    nursery.start_soon(made.shrinking.run)
    yield made
    made.pressure.close()


async def test_a_shortage_ends_above_the_high_mark_and_costs_no_more_than_that(
    box: Box, autojump_clock: MockClock
) -> None:
    box.cached = 800
    await trio.sleep(4 * LOOK_S)
    assert box.cached == 800
    box.have(990)
    await trio.sleep(2 * LOOK_S)
    assert (box.cached, box.free) == (800 - 411, 1401)
    await trio.sleep(4 * LOOK_S)
    assert box.cached == 800 - 411


async def test_a_shortage_that_does_not_end_takes_all(box: Box, autojump_clock: MockClock) -> None:
    box.cached = 300
    box.have(100)
    await trio.sleep(2 * LOOK_S)
    assert box.cached == 0
    assert box.surplus == 0, "what was evicted was not given back"


async def test_stalls_are_seen_without_triggers(box: Box, autojump_clock: MockClock) -> None:
    box.cached = 800
    await trio.sleep(2 * LOOK_S)
    write_psi(box.root, some_total=200_000)
    await trio.sleep(1.5 * LOOK_S)
    assert box.cached == 700


async def test_the_trigger_ends_the_wait_and_a_part_of_the_cache_goes_each_time(
    box: Box, autojump_clock: MockClock
) -> None:
    """A descriptor that tells once, as the kernel's trigger does.

    Pressure's epoll, over an event instead of the PSI file.
    """
    event, waiter = os.eventfd(0, os.EFD_NONBLOCK), select.epoll()
    try:
        waiter.register(event, select.EPOLLIN | select.EPOLLET)
        box.cached = 800
        await trio.sleep(LOOK_S)
        box.pressure._waiter, box.pressure.descriptor, box.pressure.psi = (
            waiter,
            waiter.fileno(),
            "trigger",
        )
        await trio.sleep(1.5 * LOOK_S)
        assert (box.cached, box.pressure.statistics().triggers) == (800, 0), "it has not fired"
        for left, triggers in ((700, 1), (612, 2)):
            os.eventfd_write(event, 1)
            await trio.sleep(LOOK_S / 10)
            assert (box.cached, box.pressure.statistics().triggers) == (left, triggers), (
                "nobody woke at the trigger"
            )
        await trio.sleep(3 * LOOK_S)
        assert (box.cached, box.pressure.statistics().triggers) == (612, 2), "it was not taken"
    finally:
        os.close(event)


async def test_the_command_gives_back_so_many_and_says_how_many(
    box: Box, autojump_clock: MockClock
) -> None:
    box.cached = 100
    assert await box.shrinking.shrink(30) == 30
    assert (box.cached, box.surplus) == (70, 0)
    assert await box.shrinking.shrink(30_000) == 70
    assert await box.shrinking.shrink(1) == 0


async def test_after_a_calm_time_the_cache_may_grow_to_its_limit(
    box: Box, autojump_clock: MockClock
) -> None:
    box.cached = 800
    box.have(100)
    await trio.sleep(2 * LOOK_S)
    assert box.shrinker.ceiling_frames == 0
    box.have(5000)
    await trio.sleep(CALM_S - 2 * LOOK_S)
    assert box.shrinker.ceiling_frames == 0
    await trio.sleep(GROW_S + 3 * EMPTY_LOOK_S)
    assert box.shrinker.ceiling_frames == LIMIT


async def test_long_runs_go_back_while_eviction_goes_on_and_the_rest_after_it(
    tmp_path: Path,
) -> None:
    box = Box(tmp_path)
    box.cached = 10 * STEP_FRAMES
    asked: list[tuple[bool, bool]] = []
    gate = trio.Event()

    async def trim(*, long_only: bool) -> int:
        asked.append((long_only, box.cached > 0))
        if not long_only:
            return await Box._trim(box, long_only=False)
        given = box.surplus // 2
        box.surplus -= given
        await gate.wait()
        return given

    box.shrinking = Shrinking(box.pressure, box.shrinker, trim)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.shrinking.shrink, 1 << 40)
        while box.cached:
            await trio.testing.wait_all_tasks_blocked()
        assert asked == [(True, True)], "evicts on while the thread is busy"
        assert box.surplus > 5 * STEP_FRAMES
        gate.set()
    assert (box.cached, box.surplus) == (0, 0)
    assert asked[-1] == (False, False)
    box.pressure.close()


async def test_command_and_shortage_at_once_both_end_with_all_given_back(
    box: Box, autojump_clock: MockClock
) -> None:
    box.cached, box.shrinker.limit_frames = 5000, 10_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.shrinking.shrink, 3000)
        box.have(100)
    await trio.sleep(2 * LOOK_S)
    assert (box.cached, box.surplus) == (2000, 0)


async def test_shortage_that_goes_on_is_not_left_to_the_next_look(
    box: Box, autojump_clock: MockClock
) -> None:
    box.cached, box.shrinker.limit_frames = 5000, 10_000
    box.have(900)
    taken = 0
    original = box._trim

    async def trim(*, long_only: bool) -> int:
        nonlocal taken
        given = await original(long_only=long_only)
        if given and taken < 3:  # another program takes it at once
            taken += 1
            box.have(900)
        return given

    box.shrinking._trim = trim
    await trio.sleep(1.01 * LOOK_S)
    assert taken == 3
    assert box.free > 1400


async def test_requests_have_their_turn_after_every_batch(tmp_path: Path) -> None:
    # by the real clock
    box = Box(tmp_path)
    box.shrinker = Shrinker(Busy(box), lambda: box.cached, total_frames=100_000, limit_frames=LIMIT)
    box.shrinking = Shrinking(box.pressure, box.shrinker, box._trim)
    box.cached = 500
    turns = 0
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            nonlocal turns
            while box.cached:
                turns += 1
                await trio.lowlevel.checkpoint()

        nursery.start_soon(serve)
        assert await box.shrinking.shrink(1 << 40) == 500
    batches = box.shrinker.statistics().batches
    assert (
        20 < batches <= turns + 2
    )  # before the other task began, and to find that there is nothing left
    box.pressure.close()


async def test_the_command_counts_what_a_look_evicts_for_it(tmp_path: Path) -> None:
    # by the real clock: it takes many batches
    box = Box(tmp_path)
    box.shrinker = Shrinker(Busy(box), lambda: box.cached, total_frames=100_000, limit_frames=LIMIT)
    box.shrinking = Shrinking(box.pressure, box.shrinker, box._trim)
    box.cached = 500
    counts: list[int] = []

    async def command() -> None:
        counts.append(await box.shrinking.shrink(300))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(command)
        nursery.start_soon(command)
        while box.cached > 450:
            await trio.lowlevel.checkpoint()
        assert await box.shrinking._relieve(stalled=False) > 50, "it had a part in it"
    assert counts == [300, 200]
    assert box.surplus == 0
    box.pressure.close()


class Busy:
    """A cache whose every eviction takes a tenth of a batch."""

    def __init__(self, box: Box) -> None:
        self.limit_frames, self._box = 0, box

    def evict(self, count: int) -> int:
        end = time.perf_counter() + BATCH_S / 10
        while time.perf_counter() < end:
            pass
        return self._box.evict(1)
