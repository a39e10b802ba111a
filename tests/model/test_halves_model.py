# SPDX-License-Identifier: GPL-2.0-or-later
"""Both halves over one arena that is too small for them.

The cache may lose pages and never shows an old one, swap loses none.

A store is refused only if there is nothing ephemeral left, or nothing that lies side by side.
"""

from __future__ import annotations

import contextlib
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.stack import MakeAllocator, Stack, build
from tests.support.strategies import KINDS, contents, page
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.pam.base import RejectReason

TYPE = 1


class HalvesMachine(RuleBasedStateMachine):
    """Two dicts: what swap holds, all of which must be there, and what was last put, which may."""

    stack: Stack

    @initialize(
        page_size=st.sampled_from((4096, 4096, 4096, 16384)),
        allocator=st.sampled_from((ZsPool, ZbudPool)),
        ephemeral=st.sampled_from(("zbud", "zsmalloc")),
        frames=st.integers(24, 90),
    )
    def build(self, page_size: int, allocator: MakeAllocator, ephemeral: str, frames: int) -> None:
        self.stack = build(
            page_size, frames=frames, allocator=allocator, ephemeral=ephemeral, node_reserve=300
        )
        self.stack.frames.reserve_target = 0
        self.stack.frontswap.init(TYPE)
        self.total = frames
        self.pools = [self.stack.cache.cleancache.init_fs() for _ in range(2)]
        self.swap: dict[int, bytes] = {}
        self.cached: dict[tuple[int, int], bytes] = {}

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with contextlib.closing(self.stack):
            self.stack.frontswap.invalidate_area(TYPE)
            for pool in self.pools:
                self.stack.cache.cleancache.invalidate_fs(pool)
            self.stack.check()
            assert self.stack.frames.used_frames == 0
            assert self.stack.tmem.statistics().curr_objnode_count == 0

    @rule(first=st.integers(0, 300), count=st.integers(1, 60), content=contents())
    def store(self, first: int, count: int, content: tuple[str, int]) -> None:
        kind, seed = content
        for offset in range(first, first + count):
            data = page(kind, seed + offset % 7, self.stack.page_size)
            reason = self.stack.frontswap.store(TYPE, offset, memoryview(data))
            if reason is None:
                self.swap[offset] = data
                continue
            self.swap.pop(offset, None)
            if reason is not RejectReason.POOL_LIMIT_HIT:
                assert reason is RejectReason.FAILED_ALLOC
                # All of it was evicted; what is left of free frames lies between swap's own.
                assert self.stack.frames.ephemeral_frames == 0

    @rule(first=st.integers(0, 300), count=st.integers(1, 60))
    def invalidate(self, first: int, count: int) -> None:
        held = [offset for offset in self.swap if first <= offset < first + count]
        assert self.stack.frontswap.invalidate_range(TYPE, first, first + count - 1) == len(held)
        for offset in held:
            del self.swap[offset]

    @rule(
        which=st.integers(0, 1),
        first=st.integers(0, 200),
        count=st.integers(1, 80),
        kind=st.sampled_from((*KINDS, "words")),
    )
    def put(self, which: int, first: int, count: int, kind: str) -> None:
        for index in range(first, first + count):
            data = page(kind, index % 40, self.stack.page_size)
            if (
                self.stack.cache.cleancache.put_page(self.pools[which], 9, index, memoryview(data))
                is None
            ):
                self.cached[which, index] = data
            else:
                self.cached.pop((which, index), None)

    @rule(
        which=st.integers(0, 1),
        first=st.integers(0, 200),
        count=st.integers(1, 80),
        keep=st.booleans(),
    )
    def get(self, which: int, first: int, count: int, keep: bool) -> None:
        out = bytearray(self.stack.page_size)
        for index in range(first, first + count):
            if self.stack.cache.cleancache.get_page(
                self.pools[which], 9, index, memoryview(out), keep=keep
            ):
                assert out == self.cached.get((which, index)), (
                    "a page that was never put, or an old one"
                )
            else:
                keep = False
            if not keep:
                self.cached.pop((which, index), None)

    @rule(which=st.integers(0, 1), index=st.integers(0, 200))
    def forget(self, which: int, index: int) -> None:
        self.stack.cache.cleancache.invalidate_page(self.pools[which], 9, index)
        self.cached.pop((which, index), None)

    @rule(share=st.sampled_from((0.05, 0.5, 1.0)))
    def evict(self, share: float) -> None:
        before = self.stack.frames.ephemeral_frames
        wanted = int(share * before)
        freed = self.stack.cache.eviction.evict(wanted)
        assert wanted <= freed == before - self.stack.frames.ephemeral_frames

    @rule(share=st.sampled_from((0.1, 0.5, 2.0)))
    def limit(self, share: float) -> None:
        self.stack.cache.eviction.limit_frames = int(share * self.total)

    @rule(share=st.sampled_from((0.0, 0.0, 0.5)))
    def reserve(self, share: float) -> None:
        self.stack.frames.reserve_target = int(share * self.total)

    @rule(half=st.booleans(), bound=st.sampled_from((3, 1 << 30)))
    def compact(self, half: bool, bound: int) -> None:
        before = self.stack.frames.used_frames
        freed = self.stack.tmem.compact(self.stack.cache.zbuds if half else self.stack.zv, bound)
        assert before - self.stack.frames.used_frames == freed

    @rule(seed=st.integers(0, 1 << 16))
    def swap_is_as_it_was(self, seed: int) -> None:
        for offset in random.Random(seed).sample(sorted(self.swap), min(20, len(self.swap))):
            assert self.stack.load(TYPE, offset) == self.swap[offset]

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "stack"):
            return
        self.stack.check()
        assert self.stack.zv.statistics().curr_pages == len(self.swap)
        assert self.stack.cache.zbuds.statistics().zbud_curr_zpages <= len(self.cached)


TestHalves = HalvesMachine.TestCase
TestHalves.settings = settings(max_examples=60)
