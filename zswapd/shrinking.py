# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that shrinks the cache: waits for pressure, evicts in batches, and gives the frames back to the system.

One look at the watermarks every LOOK_S (some 80 µs), at once when the kernel's PSI trigger fires, and after every batch.

Limits: what is evicted is given back by the one thread for blocking work (offload.py), behind a refill that may be under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from zswapd.reclaim.pressure import Pressure
    from zswapd.reclaim.shrinker import Shrinker

LOOK_S = 0.25
"""Time between two looks: free memory falls by some 500 MiB in it at worst, which the kernel finds elsewhere meanwhile."""
EMPTY_LOOK_S = 1.0
"""The same while the cache is empty: only its ceiling may be to rise."""
STEP_FRAMES = 2048
"""Frames that are given back at once: with one trip to the other thread for each batch, the trips take longer than the work."""


class Shrinking:
    """The task, and what the control command asks of it.

    Args:
        pressure: the system's memory.
        shrinker: the policy.
        trim: gives surplus frames back to the system, all of them.

    Attributes:
        shrinker: as above.
    """

    def __init__(self, pressure: Pressure, shrinker: Shrinker, trim: Callable[[], Awaitable[None]]) -> None:
        self._pressure, self.shrinker, self._trim = pressure, shrinker, trim
        self._on_the_way = 0

    async def run(self) -> None:
        """Shrink whenever it is called for, until cancelled."""
        while True:
            stalled = await self._wait()
            marks = self._pressure.marks()
            if marks is None:
                continue
            self.shrinker.look(marks, stalled=stalled)
            while self.shrinker.has_work and await self._batch():
                self.shrinker.look(self._pressure.marks() or marks, on_the_way=self._on_the_way)
            await self._give_back()

    async def shrink(self, frames: int) -> int:
        """Evict `frames` frames, or all there are, and give them back; return how many it were."""
        self.shrinker.ask(frames)
        freed = 0
        while self.shrinker.has_work and freed < frames and (done := await self._batch()):
            freed += done
        await self._give_back()
        return freed

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

    async def _batch(self) -> int:
        freed = self.shrinker.batch()
        self._on_the_way += freed
        await trio.lowlevel.checkpoint()  # requests first
        if self._on_the_way >= STEP_FRAMES:
            await self._give_back()
        return freed

    async def _give_back(self) -> None:
        if self._on_the_way:
            self._on_the_way = 0
            await self._trim()
