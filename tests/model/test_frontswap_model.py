# SPDX-License-Identifier: GPL-2.0-or-later
"""frontswap over the whole core against a dict of (type, offset) → page.

Several swap files; stores are refused for every reason there is, also those of pages that were
stored before; codecs change in the middle; the pool is compacted, its reserve refilled and trimmed;
bits are flipped in it.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.stack import MakeAllocator, Stack, build
from tests.support.strategies import contents, page, page_sizes
from zswapd.core import compress
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.frontends.frontswap import MAX_OFFSET
from zswapd.core.pam.base import HEADER_BYTES, RejectReason
from zswapd.errors import CorruptedPageError

TYPES = (0, 1, 31)
DAMAGED = None
Place = tuple[int, int]


def types() -> st.SearchStrategy[int]:
    """Draw a swap file."""
    return st.sampled_from(TYPES)


def offsets() -> st.SearchStrategy[int]:
    """Draw offsets that meet often, and those at which swizzling carries over."""
    return st.one_of(
        st.integers(0, 12), st.sampled_from((255, 256, 257, 511, 65535, 65536, MAX_OFFSET))
    )


class FrontswapMachine(RuleBasedStateMachine):
    """The model holds the page, or DAMAGED; what is not in it must miss."""

    stack: Stack

    @initialize(
        page_size=page_sizes(),
        compressor=st.sampled_from(compress.names()),
        allocator=st.sampled_from((ZsPool, ZbudPool)),
        nodes=st.sampled_from((40, 600)),
        frames=st.integers(24, 90),
        damage=st.booleans(),
    )
    def build(
        self,
        page_size: int,
        compressor: str,
        allocator: MakeAllocator,
        nodes: int,
        frames: int,
        damage: bool,
    ) -> None:
        self.stack = build(
            page_size, frames=frames, compressor=compressor, allocator=allocator, node_reserve=nodes
        )
        self.total = frames
        self.damage = damage  # after damage, fewer things can be proved; hence runs without it
        self.page_size = page_size
        for swap_type in TYPES:
            self.stack.frontswap.init(swap_type, when_losing=partial(self._lose, swap_type))
        self.lost: list[Place] = []
        self.model: dict[Place, bytes | None] = {}
        self.stored = self.refused = 0

    def _lose(self, swap_type: int, offset: int) -> None:
        self.lost.append((swap_type, offset))

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with contextlib.closing(self.stack):
            for swap_type in TYPES:
                self.stack.frontswap.invalidate_area(swap_type)
            self.stack.check()
            damaged = self.stack.zv.statistics().damaged_pages
            # What a damaged header named is beyond reach: no more than a frame each.
            assert self.stack.frames.used_frames <= damaged
            assert damaged or not any(self.stack.zv.statistics().curr_dist_counts)
            assert self.stack.tmem.statistics().curr_objnode_count == 0

    @rule(swap_type=types(), offset=offsets(), content=contents(), count=st.integers(1, 8))
    def store(self, swap_type: int, offset: int, content: tuple[str, int], count: int) -> None:
        frontswap = self.stack.frontswap
        for at in range(offset, min(offset + count, MAX_OFFSET + 1)):
            data = page(content[0], content[1] + at % 7, self.page_size)
            there = (swap_type, at) in self.model
            self.lost.clear()
            reason = frontswap.store(swap_type, at, memoryview(data))
            if reason is None:
                assert not frontswap.frozen
                assert self.lost == []
                self.model[swap_type, at] = data
                self.stored += 1
            else:
                assert isinstance(reason, RejectReason)
                assert self.lost == ([(swap_type, at)] if there else [])
                self.model.pop((swap_type, at), None)
                self.refused += 1

    @rule(swap_type=types(), offset=offsets())
    def load(self, swap_type: int, offset: int) -> None:
        self._expect((swap_type, offset))

    def _expect(self, place: Place) -> None:
        try:
            data = self.stack.load(*place)
        except CorruptedPageError:
            assert place in self.model
            assert self.model[place] is DAMAGED
        else:
            if place in self.model:
                assert self.model[place] is not DAMAGED, "damage was not noticed"
            assert data == self.model.get(place)

    @rule(swap_type=types(), offset=offsets())
    def invalidate_page(self, swap_type: int, offset: int) -> None:
        there = (swap_type, offset) in self.model
        assert self.stack.frontswap.invalidate_page(swap_type, offset) == there
        self.model.pop((swap_type, offset), None)

    @rule(swap_type=types(), first=offsets(), last=offsets())
    def invalidate_range(self, swap_type: int, first: int, last: int) -> None:
        hit = [place for place in self.model if place[0] == swap_type and first <= place[1] <= last]
        assert self.stack.frontswap.invalidate_range(swap_type, first, last) == len(hit)
        for place in hit:
            del self.model[place]

    @rule(swap_type=types())
    def invalidate_area(self, swap_type: int) -> None:
        hit = [place for place in self.model if place[0] == swap_type]
        assert self.stack.frontswap.invalidate_area(swap_type) == len(hit)
        for place in hit:
            del self.model[place]

    @rule(frozen=st.sampled_from((False, False, True)))
    def freeze_or_thaw(self, frozen: bool) -> None:
        if frozen:
            self.stack.frontswap.freeze()
        else:
            self.stack.frontswap.thaw()

    @rule(name=st.sampled_from(compress.names()))
    def switch_codec(self, name: str) -> None:
        self.stack.zv.compressor = compress.get(name)

    @rule(
        keep_poor=st.booleans(),
        mean=st.sampled_from((0.05, 0.625)),
        limit=st.sampled_from((0.3, 2.0)),
    )
    def set_policy(self, keep_poor: bool, mean: float, limit: float) -> None:
        self.stack.zv.keep_poor = keep_poor
        self.stack.zv.max_mean_zsize = int(mean * self.page_size)
        self.stack.zv.limit_frames = int(limit * self.total)

    @rule(bound=st.sampled_from((2, 1 << 30)))
    def compact(self, bound: int) -> None:
        before = self.stack.frames.used_frames
        freed = self.stack.tmem.compact(self.stack.zv, bound)
        assert before - self.stack.frames.used_frames == freed >= 0

    @rule(share=st.sampled_from((0.0, 0.5, 1.0)))
    def set_reserve(self, share: float) -> None:
        self.stack.frames.reserve_target = int(share * self.total)
        self.stack.frames.trim_now()
        self.stack.frames.refill_now()

    @precondition(
        lambda self: self.damage and any(data is not DAMAGED for data in self.model.values())
    )
    @rule(seed=st.integers(0, 1 << 16))
    def flip_a_bit(self, seed: int) -> None:
        rng = random.Random(seed)
        swap_type, offset = rng.choice(
            sorted(place for place, data in self.model.items() if data is not DAMAGED)
        )
        key = swap_type << 8 | offset & 0xFF, offset >> 8
        for pampd in self.stack.tmem.pampds(self.stack.zv):
            named = self.stack.zv.key_of(pampd)
            if (named.oid, named.index) == key:
                # Of the data: eight bytes are there whatever the page's form.
                self.stack.arena.view[pampd + HEADER_BYTES + rng.randrange(8)] ^= (
                    1 << rng.randrange(8)
                )
                self.model[swap_type, offset] = DAMAGED
                return
        raise AssertionError("the index does not name a page that was stored")

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "stack"):
            return
        self.stack.check()
        for place in self.model:
            self._expect(place)
        seen = self.stack.frontswap.statistics()
        assert (seen.succ_stores, seen.failed_stores) == (self.stored, self.refused)
        assert sum(dict(seen.rejects).values()) == self.refused
        assert self.stack.zv.statistics().curr_pages == len(self.model)
        assert sum(self.stack.frontswap.pages(swap_type) for swap_type in TYPES) == len(self.model)


TestFrontswap = FrontswapMachine.TestCase
