# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache gives its memory back to the system: a real arena, real pages, real threads.

Only the shortage is made up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.proc import write_memory, write_psi
from tests.support.stack import build
from zswapd.core.reclaim.pressure import Pressure
from zswapd.core.reclaim.shrinker import Shrinker
from zswapd.system.offload import Offload
from zswapd.worker.shrink import Shrinking

PAGE = 4096
SWAPPED = 2000
ROOM = 4096
"""Frames for what is swapped out, and a small reserve."""
PAGES = [os.urandom(700 + 13 * number).ljust(PAGE, b"\0") for number in range(80)]


class Shrunk:
    """A full cache beside some pages of swap, on a box that has run out of memory and stays so.

    Attributes:
        back_s: seconds until 90 % of the cache's frames were the system's.
        late_s: how late requests for swap were, by size.
        before_s: the same while nothing was shrunk.
    """

    def __init__(self, root: Path, mib: int, ephemeral: str) -> None:
        self.frames = mib * 256
        self.stack = build(
            PAGE, frames=self.frames + ROOM, node_reserve=20_000, ephemeral=ephemeral
        )
        self.stack.frames.reserve_target = 1024
        self._fill()
        self.cached = self.stack.frames.ephemeral_frames
        write_memory(root, free=500, low=1000, high=1 << 30)
        write_psi(root)
        self.pressure = Pressure(root)
        self.pressure.arm()
        self.shrinker = Shrinker(
            self.stack.cache.eviction,
            lambda: self.stack.frames.ephemeral_frames,
            total_frames=1 << 30,
            limit_frames=self.frames,
        )
        self._offload = Offload()
        self.shrinking = Shrinking(self.pressure, self.shrinker, self._trim)
        self.back_s = 0.0
        self.before_s: list[float] = []
        self.late_s: list[float] = []

    def _fill(self) -> None:
        front, nodes, clean = (
            self.stack.frontswap,
            self.stack.cache.nodes,
            self.stack.cache.cleancache,
        )
        front.init(1)
        for number in range(SWAPPED):
            assert front.store(1, number, memoryview(PAGES[number % 80])) is None
        pool, number = clean.init_fs(), 0
        self.stack.cache.eviction.limit_frames = self.frames
        while self.stack.frames.ephemeral_frames + 8 < self.frames:
            clean.put_page(pool, number >> 18, number & 0x3FFFF, memoryview(PAGES[number % 80]))
            number += 1
            if nodes.wants_refill():
                nodes.commit(nodes.refill(nodes.begin_refill()))

    async def _trim(self, *, long_only: bool = False) -> int:
        frames = self.stack.frames
        job = frames.begin_trim(2048, all_of_it=True, long_only=long_only)
        count = sum(count for _, count in job.runs)
        try:
            await self._offload.run(job.work, self.stack.arena)
        finally:
            frames.commit(job)
        return count

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._swap)
            await trio.sleep(0.3)
            self.before_s, self.late_s = sorted(self.late_s), []
            while await self._trim():
                pass
            began, backed = time.perf_counter(), self.stack.arena.backed_bytes()
            nursery.start_soon(self.shrinking.run)
            with trio.fail_after(60):
                while backed - self.stack.arena.backed_bytes() < 0.9 * self.cached * PAGE:
                    await trio.sleep(0.005)
            self.back_s = time.perf_counter() - began
            nursery.cancel_scope.cancel()
        self.late_s.sort()

    async def _swap(self) -> None:
        """Load a page every millisecond, as the event loop would answer a request."""
        out, number = memoryview(bytearray(PAGE)), 0
        while True:
            due = time.perf_counter() + 0.001
            await trio.sleep(0.001)
            number = (number + 7) % SWAPPED
            assert self.stack.frontswap.load(1, number, out)
            assert out == PAGES[number % 80]
            self.late_s.append(time.perf_counter() - due)

    def close(self) -> None:
        self.pressure.close()
        self.stack.close()


@pytest.fixture(params=["zbud", "zsmalloc"])
def shrunk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shrunk]:
    made = Shrunk(tmp_path, 32, request.param)
    yield made
    made.close()


@pytest.mark.slow
async def test_a_cache_gives_its_memory_back_and_swap_keeps_its_own(shrunk: Shrunk) -> None:
    assert shrunk.cached > 0.9 * shrunk.frames
    await shrunk.run()
    seen = shrunk.shrinker.statistics()
    assert seen.evicted_frames >= 0.9 * shrunk.cached
    assert seen.shrinks == {"low_memory": 1, "stalled": 0, "limit": 0, "command": 0}
    assert seen.ceiling_frames <= 0.1 * shrunk.cached
    assert seen.batches > 10
    shrunk.stack.check()
    for number in range(SWAPPED):
        assert shrunk.stack.load(1, number) == PAGES[number % 80]


@pytest.mark.bench
@pytest.mark.parametrize("mib", [256, 1024])
@pytest.mark.parametrize("ephemeral", ["zbud", "zsmalloc"])
async def test_how_long_it_takes(tmp_path: Path, mib: int, ephemeral: str) -> None:
    shrunk = Shrunk(tmp_path, mib, ephemeral)
    await shrunk.run()
    late, before, seen = shrunk.late_s, shrunk.before_s, shrunk.shrinker.statistics()
    print(
        f"{mib} MiB on {ephemeral}: 90 % back in {shrunk.back_s:.2f} s, {seen.batches} batches of"
        f" {seen.batch_seconds / seen.batches * 1e3:.2f} ms, the longest"
        f" {seen.longest_batch_s * 1e3:.1f}; requests late by {late[len(late) // 2] * 1e3:.2f} ms"
        f" (99 %: {late[len(late) * 99 // 100] * 1e3:.1f}, most: {late[-1] * 1e3:.1f}; before:"
        f" {before[len(before) // 2] * 1e3:.2f}, {before[-1] * 1e3:.1f})"
    )
    shrunk.close()
