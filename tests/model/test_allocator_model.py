# SPDX-License-Identifier: GPL-2.0-or-later
"""Each allocator over pageframes against a dict of handle → bytes, compacted.

Trimmed and taken over meanwhile.
"""

from __future__ import annotations

import contextlib
import random
import struct

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.base import DEAD
from zswapd.core.allocators.frametable import EPHEMERAL, PERSISTENT
from zswapd.core.allocators.lru import Lru
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.allocators.zbud import NCHUNKS, ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool

LIFE = struct.Struct("=Q")


class AllocatorMachine(RuleBasedStateMachine):
    """Objects never overlap or change by themselves, and a freed object leaks no frame."""

    pool: ZsPool | ZbudPool
    sizes: list[int]

    def make(self, frames: PageFrames, half: int, lru: Lru | None) -> None:
        """Make the pool and choose few sizes, at the bounds of classes.

        So that runs fill up and empty in a short run.
        """
        raise NotImplementedError

    @initialize(
        page_size=st.sampled_from((4096, 16384, 65536)),
        length=st.sampled_from((1, 3, 8, 16)),
        total=st.integers(20, 160),
        half=st.sampled_from((PERSISTENT, EPHEMERAL)),
        ordered=st.booleans(),
    )
    def build(self, page_size: int, length: int, total: int, half: int, ordered: bool) -> None:
        self.frames = PageFrames(Arena(total, page_size, kind="memfd"), reserve_frames=total // 2)
        self.half, self.page_size, self.length = half, page_size, length
        self.order: list[int] | None = [] if ordered else None
        self._equip()
        self.frames.refill_now()
        self.objects: dict[int, bytes] = {}
        self.serial = 0

    def _equip(self) -> None:
        lru = Lru(self.frames.end_frame) if self.order is not None else None
        if lru is not None:
            self.frames.accompany(lru.populate)
        self.make(self.frames, self.half, lru)

    def _run_of(self, handle: int) -> int:
        return self.frames.table.first_of(handle // self.page_size)

    def _used(self, handle: int) -> None:
        """Follow the order of use; bodies are not in it."""
        if self.order is None or self.pool.is_body(self._run_of(handle)):
            return
        run = self._run_of(handle)
        if run in self.order:
            self.order.remove(run)
        self.order.append(run)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        with contextlib.closing(self.frames.arena):
            for handle in list(self.objects):
                self.pool.free(handle)
            self.pool.check()
            self.frames.check()
            assert (
                self.frames.used_frames
                == self.frames.ephemeral_frames
                == self.pool.used_frames()
                == 0
            )

    def _store(self, size: int) -> bool:
        handle = self.pool.alloc(size)
        if not handle:
            return False
        assert LIFE.unpack_from(self.pool.memory, handle)[0] == DEAD
        assert handle not in self.objects
        self.serial += 1
        data = (LIFE.pack(self.serial) + random.Random(self.serial).randbytes(size))[:size]
        self.pool.view(handle, size)[:] = data
        self.objects[handle] = data
        self._used(handle)
        return True

    @rule(which=st.integers(0, 40), count=st.integers(1, 25))
    def store(self, which: int, count: int) -> None:
        for _ in range(count):
            if not self._store(self.sizes[which % len(self.sizes)]):
                return

    @rule(share=st.floats(0.0, 1.0))
    def store_any_size(self, share: float) -> None:
        self._store(max(16, int(share * self.page_size)))

    @precondition(lambda self: self.objects)
    @rule(seed=st.integers(0, 1 << 16), share=st.sampled_from((0.02, 0.3, 0.9, 1.0)))
    def free(self, seed: int, share: float) -> None:
        handles = sorted(self.objects)
        for handle in random.Random(seed).sample(handles, max(1, int(len(handles) * share))):
            data = self.objects.pop(handle)
            assert bytes(self.pool.view(handle, len(data))) == data
            self.pool.free(handle)
            self._forget_empty_runs()

    def _forget_empty_runs(self) -> None:
        if self.order is not None:
            kept = {self._run_of(handle) for handle in self.objects}
            self.order = [run for run in self.order if run in kept]

    @precondition(lambda self: self.objects)
    @rule(seed=st.integers(0, 1 << 16))
    def touch(self, seed: int) -> None:
        handle = random.Random(seed).choice(sorted(self.objects))
        if not self.pool.is_body(self._run_of(handle)):
            self.pool.touch(handle)
            self._used(handle)

    @precondition(lambda self: self.order)
    @rule(at_once=st.booleans())
    def evict_oldest(self, at_once: bool) -> None:
        assert self.order
        run = self.order[0]
        assert self.pool.oldest_run() == run
        handles = self.pool.objects_of(run)
        assert sorted(handles) == sorted(h for h in self.objects if self._run_of(h) == run)
        for handle in handles:
            del self.objects[handle]
            if not at_once:
                self.pool.free(handle)
        if at_once:
            self.pool.free_run(run)
        del self.order[0]

    @rule()
    def take_over(self) -> None:
        for handle in [handle for handle, data in self.objects.items() if len(data) < 8]:
            self.pool.free(handle)
            del self.objects[handle]
        frames = PageFrames(self.frames.arena, reserve_frames=self.frames.reserve_target)
        self.frames = frames
        assert frames.adopt() == 0
        if self.half == EPHEMERAL:
            self.objects.clear()
        self._equip()
        assert self.pool.adopt() == 0
        if self.order is not None:
            self.order = sorted(
                {
                    self._run_of(handle)
                    for handle in self.objects
                    if not self.pool.is_body(self._run_of(handle))
                }
            )
        claimed = [handle for handle in self.objects if self.pool.claim(handle)]
        assert not any(self.pool.claim(handle) for handle in claimed)
        found: dict[int, int] = {}
        self.pool.each_object(found.__setitem__)
        assert {*found, *claimed} == set(self.objects)
        assert all(
            found[handle] >= len(data) for handle, data in self.objects.items() if handle in found
        )
        assert self.pool.free_unclaimed() == 0

    @precondition(lambda self: self.objects)
    @rule(seed=st.integers(0, 1 << 16))
    def overwrite(self, seed: int) -> None:
        handle = random.Random(seed).choice(sorted(self.objects))
        self.serial += 1
        size = len(self.objects[handle])
        data = (LIFE.pack(self.serial) + random.Random(self.serial).randbytes(size))[:size]
        self.pool.view(handle, size)[:] = data
        self.objects[handle] = data

    @rule(bound=st.sampled_from((1, 4, 30, 1 << 30)))
    def compact(self, bound: int) -> None:
        moves = 0

        def moved(old: int, new: int) -> None:
            nonlocal moves
            moves += 1
            assert new not in self.objects
            self.objects[new] = self.objects.pop(old)
            self._used(new)

        before = self.pool.used_frames()
        promised = self.pool.freeable_frames()
        freed = self.pool.compact(moved, bound)
        assert moves <= bound
        assert before - self.pool.used_frames() == freed <= promised
        if bound == 1 << 30:
            assert freed == promised
        self._forget_empty_runs()

    @rule()
    def refill(self) -> None:
        self.frames.refill_now()

    @rule()
    def trim(self) -> None:
        backed = self.frames.arena.backed_bytes()
        given = self.frames.trim_now()
        assert backed - self.frames.arena.backed_bytes() == given * self.page_size

    @rule(share=st.sampled_from((0.0, 0.2, 1.0)))
    def set_reserve(self, share: float) -> None:
        self.frames.reserve_target = int(self.frames.statistics().total_frames * share)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        self.frames.check()
        seen = self.pool.statistics()
        assert seen.objects == len(self.objects)
        assert seen.used_frames == self.pool.used_frames() == self.frames.used_frames
        assert self.frames.ephemeral_frames == (
            self.frames.used_frames if self.half == EPHEMERAL else 0
        )
        memory = self.pool.memory
        for handle, data in self.objects.items():
            assert memory[handle : handle + len(data)] == data


class ZsmallocMachine(AllocatorMachine):
    """Of zsmalloc."""

    def make(self, frames: PageFrames, half: int, lru: Lru | None) -> None:
        self.pool = ZsPool(frames, half, lru, max_zspage_frames=self.length)
        edges = [c.size for c in self.pool.classes[:: max(1, len(self.pool.classes) // 9)]]
        self.sizes = [n + d for n in edges for d in (-1, 0, 1) if 16 <= n + d <= self.page_size] + [
            self.page_size
        ]


class ZbudMachine(AllocatorMachine):
    """Of zbud."""

    def make(self, frames: PageFrames, half: int, lru: Lru | None) -> None:
        self.pool = ZbudPool(frames, half, lru)
        chunk = self.page_size // NCHUNKS
        self.sizes = [
            n * chunk + d
            for n in (1, 20, 31, 32, 33, 44, 63, 64)
            for d in (-1, 0, 1)
            if n * chunk + d <= self.page_size
        ]


TestZsmalloc = ZsmallocMachine.TestCase
TestZbud = ZbudMachine.TestCase
