# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that shrinks the cache.

Waits for pressure, evicts in batches, and gives the frames back to the system.

One look at the watermarks every LOOK_S (some 80 µs), at once when the kernel's PSI trigger fires,
and after every few batches.

Eviction and giving back go on side by side: what is evicted is punched by the one thread for
blocking work (system/offload.py), behind a refill that may be under way, while the next batch is
evicted here. As long as there is more to evict, only long runs of frames are: punching one frame
interrupts the processor of the page path (TLB flush) and takes 20 µs, as does punching sixteen, and
where frames were not used in their order, those beside it are likely to follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from zswapd.core.reclaim.pressure import Pressure
    from zswapd.core.reclaim.shrinker import Shrinker

LOOK_S = 0.25
"""Time between two looks: free memory falls by some 500 MiB in it at worst.

Which the kernel finds elsewhere meanwhile.
"""
EMPTY_LOOK_S = 1.0
"""The same while the cache is empty: only its ceiling may be to rise."""
STEP_FRAMES = 2048
"""Frames that are worth a trip to the other thread.

With one for each batch, the trips take longer than the work.
"""
LOOK_BATCHES = 4
"""Batches between two looks."""


class Trim(Protocol):
    """`Upkeep.trim`."""

    def __call__(self, *, long_only: bool) -> Awaitable[int]:
        """See Shrinking."""


class Shrinking:
    """The task, and what the control command asks of it.

    Args:
        pressure: the system's memory.
        shrinker: the policy.
        trim: gives some surplus frames back to the system, or some in long runs, and returns how
            many, 0 when there are none.

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
        """Shrink whenever it is called for, until cancelled."""
        while True:
            stalled = await self._wait()
            while await self._relieve(stalled=stalled):
                stalled = False

    async def _relieve(self, *, stalled: bool) -> int:
        """Look, and evict until a look says that it is enough.

        Return the frames that were evicted and given back.
        """
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
        """Evict `frames` frames, or all there are, and give them back; return how many it were.

        One command after another.
        """
        async with self._commanding:
            self.shrinker.ask(frames)
            before = (
                self.shrinker.evicted_frames
            )  # what a look has evicted meanwhile was asked for here as well
            async with trio.open_nursery() as nursery:
                while self.shrinker.evicted_frames - before < frames and await self._evict(
                    nursery, 1
                ):
                    pass
                await self._give_all_back()
            return self.shrinker.evicted_frames - before

    async def _wait(self) -> bool:
        """Return after LOOK_S, False, or when tasks had to wait for memory, True."""
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
        """Do some batches of the work there is; return the frames that were freed."""
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
        """Give back what is on the way, as far as there is any."""
        try:
            while self._on_the_way and (count := await self._trim(long_only=long_only)):
                self._on_the_way = max(0, self._on_the_way - count)
            if not long_only:
                self._on_the_way = 0  # what is left is what swap's reserve has lacked
        finally:
            self._is_giving = False
            self._given.set()
            self._given = trio.Event()
