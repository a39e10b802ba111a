# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc over pageframes against a dict of handle → bytes, compacted and trimmed meanwhile."""

from __future__ import annotations

import random
import struct

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zswapd.allocators.arena import Arena
from zswapd.allocators.pageframes import PageFrames
from zswapd.allocators.zsmalloc import ZsPool

LIFE = struct.Struct("=Q")


class ZsmallocMachine(RuleBasedStateMachine):
    """Objects never overlap, never change by themselves, and take no frame with them when they go."""

    pool: ZsPool

    @initialize(
        page_size=st.sampled_from((4096, 16384, 65536)),
        length=st.sampled_from((1, 3, 8, 16)),
        total=st.integers(20, 160),
    )
    def build(self, page_size: int, length: int, total: int) -> None:
        self.frames = PageFrames(Arena(total, page_size, kind="memfd"), reserve_frames=total // 2)
        self.frames.refill_now()
        self.pool = ZsPool(self.frames, max_zspage_frames=length)
        self.page_size = page_size
        self.objects: dict[int, bytes] = {}
        self.serial = 0
        # Few sizes, at the bounds of classes, so that zspages fill up and empty within a short run.
        edges = [c.size for c in self.pool.classes[:: max(1, len(self.pool.classes) // 9)]]
        self.sizes = [size + d for size in edges for d in (-1, 0, 1) if 16 <= size + d <= page_size] + [page_size]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for handle in list(self.objects):
            self.pool.free(handle)
        self.pool.check()
        self.frames.check()
        assert self.frames.used_frames == self.pool.used_frames() == 0
        self.frames.arena.close()

    def _store(self, size: int) -> bool:
        handle = self.pool.alloc(size)
        if not handle:
            return False
        assert LIFE.unpack_from(self.pool.memory, handle)[0] == 0
        assert handle not in self.objects
        self.serial += 1
        data = (LIFE.pack(self.serial) + random.Random(self.serial).randbytes(size))[:size]
        self.pool.view(handle, size)[:] = data
        self.objects[handle] = data
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

        before = self.pool.used_frames()
        promised = sum(row.freeable_frames for row in self.pool.statistics().classes)
        freed = self.pool.compact(moved, bound)
        assert moves <= bound
        assert before - self.pool.used_frames() == freed <= promised
        if bound == 1 << 30:
            assert freed == promised

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
        memory = self.pool.memory
        for handle, data in self.objects.items():
            assert memory[handle : handle + len(data)] == data


TestZsmalloc = ZsmallocMachine.TestCase
