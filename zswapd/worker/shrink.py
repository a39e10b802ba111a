# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that shrinks the cache: under pressure, it evicts frames and gives them to the system.

It looks at the watermarks every LOOK_S, when the kernel's PSI trigger fires, and after every
LOOK_BATCHES batches. A look takes about 80 µs.

Eviction and punching run at the same time. The one thread for blocking work (system/offload.py)
punches evicted frames, after a refill that may be under way, while the next batch is evicted here.
While there is more to evict, only long runs of frames are punched. To punch one frame takes 20 µs
and interrupts the processor of the page path (TLB flush). To punch sixteen takes no longer. Where
frames were not used in their order, the frames beside an evicted one are likely to follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from zswapd.core.reclaim.pressure import Pressure
    from zswapd.core.reclaim.shrinker import Shrinker

LOOK_S = 0.25
"""Time between two looks, s.

In this time, free memory falls by 500 MiB at worst. The kernel reclaims this memory elsewhere.
"""
EMPTY_LOOK_S = 1.0
"""The same, s, while the cache is empty: a look can then only raise its ceiling."""
STEP_FRAMES = 2048
"""Number of evicted frames for which one job of the other thread is worth its cost.

With a job for each batch, the switches between threads take longer than the work.
"""
LOOK_BATCHES = 4
"""Batches between two looks."""


class Trim(Protocol):
    """`Upkeep.trim`."""

    def __call__(self, *, long_only: bool) -> Awaitable[int]:
        """Give surplus frames back to the system; see `Shrinking`."""


class Shrinking:
    """The task that shrinks the cache, and the work of `zswapctl shrink`.

    Args:
        pressure: tells how short the system's memory is.
        shrinker: the policy.
        trim: gives surplus frames back to the system, with `long_only` only those in long runs, and
            returns their number. It returns 0 if there are none.

    Attributes:
        shrinker: as above.
    """

    def __init__(self, pressure: Pressure, shrinker: Shrinker, trim: Trim) -> None:
        self._pressure, self.shrinker, self._trim = pressure, shrinker, trim
        self._on_the_way = 0
        self._is_giving = False
        self._given = trio.Event()
        self._commanding = trio.Lock()

    async def run(self) -> None:
        """Shrink the cache when memory is short; never return."""
        while True:
            stalled = await self._wait()
            while await self._relieve(stalled=stalled):
                stalled = False

    async def _relieve(self, *, stalled: bool) -> int:
        """Look and evict until a look asks for no more; return the number of evicted frames."""
        freed = 0
        async with trio.open_nursery() as nursery:
            while marks := self._pressure.marks():
                self.shrinker.look(marks, stalled=stalled, on_the_way=self._on_the_way)
                stalled = False
                done = await self._evict(nursery, LOOK_BATCHES)
                freed += done
                if not done:
                    break
            await self._give_all_back()
        return freed

    async def shrink(self, frames: int) -> int:
        """Evict `frames` frames, or all if there are fewer, and give them back; return the number.

        Commands run one after another.
        """
        async with self._commanding:
            self.shrinker.ask(frames)
            # Frames that a look evicts from here on count for this command too.
            before = self.shrinker.evicted_frames
            async with trio.open_nursery() as nursery:
                while self.shrinker.evicted_frames - before < frames and await self._evict(
                    nursery, 1
                ):
                    pass
                await self._give_all_back()
            return self.shrinker.evicted_frames - before

    async def _wait(self) -> bool:
        """Wait for LOOK_S or the PSI trigger; return whether tasks had to wait for memory."""
        descriptor = self._pressure.descriptor
        pause = LOOK_S if self.shrinker.has_frames else EMPTY_LOOK_S
        if descriptor < 0:
            await trio.sleep(pause)
            return self._pressure.has_stalled()
        with trio.move_on_after(pause):
            await trio.lowlevel.wait_readable(descriptor)
            self._pressure.take_trigger()
            return True
        return False

    async def _evict(self, nursery: trio.Nursery, batches: int) -> int:
        """Evict up to `batches` batches; return the number of evicted frames."""
        freed = 0
        for _ in range(batches):
            if not self.shrinker.has_work:
                break
            done = self.shrinker.batch()
            freed += done
            self._on_the_way += done
            if self._on_the_way >= STEP_FRAMES and not self._is_giving:
                self._is_giving = True
                nursery.start_soon(self._give_back)
            await trio.lowlevel.checkpoint()  # requests first
        return freed

    async def _give_all_back(self) -> None:
        while self._is_giving:
            await self._given.wait()
        self._is_giving = True
        await self._give_back(long_only=False)

    async def _give_back(self, *, long_only: bool = True) -> None:
        """Give back the evicted frames that are not yet given back."""
        try:
            while self._on_the_way and (count := await self._trim(long_only=long_only)):
                self._on_the_way = max(0, self._on_the_way - count)
            if not long_only:
                self._on_the_way = 0  # swap's reserve was not full, and has taken the rest
        finally:
            self._is_giving = False
            self._given.set()
            self._given = trio.Event()
