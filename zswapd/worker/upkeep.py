# SPDX-License-Identifier: GPL-2.0-or-later
"""The upkeep of a worker's memory, off the page path.

One task refills reserves ahead of demand. Another keeps house while no requests come: it trims,
compacts and collects garbage. A third one compresses old pages again.

All are tasks of the event loop. Blocking work runs in another thread (system/offload.py), and long
work is done in steps.
"""

from __future__ import annotations

import logging
import mmap
import os
from typing import TYPE_CHECKING

import trio

from zswapd import system
from zswapd.core.allocators.jobs import at_the_watermarks
from zswapd.core.reclaim.pressure import spare_pages
from zswapd.errors import ArenaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.allocators.jobs import Job
    from zswapd.core.core import Core
    from zswapd.host.cgroups import Limits
    from zswapd.system.offload import Offload

log = logging.getLogger(__name__)

REFILL_FRAMES_BYTES = 8 << 20
"""Memory that one refill job populates: some milliseconds of zeroing in another thread."""
URGENT_BYTES = 1 << 20
"""The same for an urgent refill: the reserve is nearly empty, and pages keep coming.

An urgent refill ignores the watermarks. A small one leaves memory for tasks that wait in the kernel
for a few pages. If no request comes, these tasks may hold the requests (supervisor/ballast.py).
"""
RETRY_S = 0.25
"""Pause, s, after a refill that found no memory."""
IDLE_S = 1.0
"""Time between two looks of housekeeping, s. It works only if no request came since the last."""
BOUND_FRAMES = 256
"""Step, in frames, of the pool's bound by a memory limit.

To apply a bound takes time, and the use of memory below the limit always changes.
"""
PLENTY_BYTES = 512 << 20
"""Spare memory above which small heaps are grown, where requests may wait for a disk.

It is also the free memory above which an urgent refill takes REFILL_FRAMES_BYTES. URGENT_BYTES for
each turn of the event loop is less than a fast fill of the pool takes.
"""


def free_bytes() -> int:
    """Return the system's free memory, including that below the watermarks.

    The system call allocates no memory; `spare_pages` does.
    """
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE


class Upkeep:
    """The tasks of upkeep, for one core.

    Args:
        core: the core.
        offload: the thread for blocking work.
        yields: that thread gives way to the swapping program, although the event loop does not.
        has_small_heaps: the heaps of this process can still grow: it is a successor, or needed no
            large heaps at its start.
        needs_large_heaps: says whether the heaps should grow; called when no requests come.
        limits: limits of the memory cgroups above this process; None for no limits.
    """

    def __init__(
        self,
        core: Core,
        offload: Offload,
        *,
        yields: bool,
        has_small_heaps: bool,
        needs_large_heaps: Callable[[], bool],
        limits: Limits | None = None,
    ) -> None:
        self._core = core
        self._offload = offload
        self._yields = yields
        self._has_small_heaps = has_small_heaps
        self._needs_large_heaps = needs_large_heaps
        self._limits = limits
        self._reserve_frames = core.frames.reserve_target
        self._is_bound = False
        self._refilled_for = -1
        self._has_leisure = False
        self._refill_wanted = trio.Event()
        core.frames.when_low = self._wake_refill
        for nodes in core.all_nodes:
            nodes.when_low = self._wake_refill
        self._bytes_to_take()
        self._wake_refill()  # a recovered core has only the reserve that the dead worker left

    def _wake_refill(self) -> None:
        """Wake the refill. The page path calls it when a reserve is low, and when nearly empty."""
        self._refill_wanted.set()
        frames = self._core.frames
        if self._has_leisure and (
            frames.is_awaited or frames.table.long_frames < frames.urgent_mark
        ):
            self._has_leisure = False
            frames.hurry()
            self._offload.hurry()

    async def refill(self) -> None:
        """Populate frames and index nodes when a reserve is low; never return."""
        while True:
            await self._refill_wanted.wait()
            self._refill_wanted = trio.Event()
            while self._core.frames.wants_refill() or any(
                nodes.wants_refill() for nodes in self._core.all_nodes
            ):
                most = self._bytes_to_take()
                if most < self._core.frames.page_size:
                    await self._pause()
                    continue
                try:
                    await self._refill_nodes()
                    await self._refill_frames(most)
                except ArenaError as error:
                    log.warning(
                        "the reserve cannot be refilled: %s", error, extra={"rate_limit": 10}
                    )
                    await self._pause()
            # A failed refill has armed the calls, the page path has called, and then frames became
            # free without a refill. So the calls are armed again.
            self._core.frames.rearm()
            for nodes in self._core.all_nodes:
                nodes.rearm()

    async def _pause(self) -> None:
        """Wait for memory after a refill without success, or for the next store that needs it."""
        self._refill_wanted = trio.Event()
        with trio.move_on_after(RETRY_S):
            await self._refill_wanted.wait()

    async def _refill_nodes(self) -> None:
        for nodes in self._core.all_nodes:
            if not nodes.wants_refill():
                continue
            nodes.commit(await self._offload.run(nodes.refill, nodes.begin_refill()))

    def _bytes_to_take(self) -> int:
        """Return the bytes that the limits leave for the reserve, and bound the pool by the limits.

        The pool's bound is its used frames, its free frames, and the room below the limit, less the
        reserve. So the reserve is still full when the pool is full. A store is then refused because
        the pool is full, long before the kernel finds no memory.
        """
        room = self._limits.room() if self._limits else None
        frames = self._core.frames
        if room is None:
            self._core.bound(1 << 62)
            frames_left = 1 << 50
        else:
            frames_left = room.spare // frames.page_size
            held = frames.used_frames + frames.table.free_frames
            ceiling = max(held + frames_left - self._reserve_frames, 0)
            self._core.bound(ceiling - ceiling % BOUND_FRAMES)
            self._say_bound(room.file, is_bound=frames_left <= 0)
        # If other processes take more than the room, the reserve shrinks first.
        target = max(
            min(self._reserve_frames, self._reserve_frames + frames_left), self._reserve_frames // 8
        )
        if target != frames.reserve_target and (frames_left < 0 or target == self._reserve_frames):
            frames.reserve_target = target
        return max(frames_left, 0) * frames.page_size

    def _say_bound(self, file: str, *, is_bound: bool) -> None:
        if is_bound and not self._is_bound:
            log.warning(
                "%s leaves no more memory: the reserve is not refilled",
                file,
                extra={"rate_limit": 60},
            )
        self._is_bound = is_bound

    async def _refill_frames(self, most: int) -> None:
        frames = self._core.frames
        requests = self._requests()
        is_low = frames.table.long_frames < frames.urgent_mark
        is_urgent = frames.is_awaited or (is_low and requests != self._refilled_for)
        self._refilled_for, frames.is_awaited = requests, False
        is_little = is_urgent and free_bytes() < PLENTY_BYTES
        job = frames.begin_refill(
            min(URGENT_BYTES if is_little else REFILL_FRAMES_BYTES, most) // frames.page_size
        )
        if not job.runs:
            return
        self._has_leisure = not is_urgent
        try:
            await self._offload.run(self._work, job, is_urgent)
        finally:
            self._has_leisure = False
            frames.commit(job)

    def _work(self, job: Job, urgent: bool) -> None:  # noqa: FBT001 - positional through to_thread
        """Do a job in another thread; only an urgent one takes memory below the watermarks."""
        if self._yields:
            system.set_nice(needed=urgent)
        floor = 0
        if not urgent:
            spare = spare_pages() * mmap.PAGESIZE
            if spare < REFILL_FRAMES_BYTES:
                raise at_the_watermarks()
            floor = free_bytes() - spare
        job.work(self._core.arena, floor)

    async def recompress(self) -> None:
        """Compress old pages again, a few at a time; never return."""
        job = self._core.recompression
        while True:  # by the clock, because no event tells that a page has become old
            job.look()
            if job.is_running and not job.is_prepared:
                try:
                    await self._offload.run(job.prepare)
                except ArenaError as error:
                    log.warning(
                        "pages are not compressed again: %s", error, extra={"rate_limit": 60}
                    )
                    job.abandon()
            await trio.sleep(job.step() if job.is_running else IDLE_S)

    async def keep_house(self, look: Callable[[], None]) -> None:
        """Trim; and while no requests come, compact and collect garbage; never return.

        Args:
            look: called every IDLE_S, whether requests come or not.
        """
        core = self._core
        seen = -1
        garbage_due = False
        while True:  # by the clock, because no event tells that no request has come
            await trio.sleep(IDLE_S)
            look()
            self._bytes_to_take()
            requests = self._requests()
            idle, seen = requests == seen, requests
            garbage_due = garbage_due or not idle or system.has_garbage()
            if core.frames.wants_trim():
                while await self.trim():
                    pass
            if not idle:
                continue
            while core.wants_compaction() and core.compact_step() and self._requests() == seen:
                await trio.lowlevel.checkpoint()
            if (
                self._has_small_heaps
                and self._needs_large_heaps()
                and spare_pages() * core.frames.page_size > PLENTY_BYTES
            ):
                self._has_small_heaps = False
                system.grow_heaps()
            if garbage_due:
                system.collect_garbage()
                garbage_due = False

    def _requests(self) -> int:
        """Return a number that changes with every page that is read, written or discarded."""
        front = self._core.frontswap.statistics()
        return (
            front.succ_stores
            + front.failed_stores
            + front.loads
            + front.failed_loads
            + front.invalidates
        )

    async def trim(self, *, all_of_it: bool = False, long_only: bool = False) -> int:
        """Give surplus frames back to the system; return their number (`PageFrames.begin_trim`).

        The result is 0 if there are none.
        """
        frames = self._core.frames
        job = frames.begin_trim(
            REFILL_FRAMES_BYTES // frames.page_size, all_of_it=all_of_it, long_only=long_only
        )
        count = sum(count for _, count in job.runs)
        if count:
            try:
                await self._offload.run(job.work, self._core.arena)
            finally:
                frames.commit(job)
        return count
