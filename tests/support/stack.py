# SPDX-License-Identifier: GPL-2.0-or-later
"""A small stack of the core: arena, frames, allocators, compressed back ends, index, front ends.

`check()` proves the invariants of all parts at once. Property tests call it after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zswapd.core import compress
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.base import Allocator
from zswapd.core.allocators.frametable import EPHEMERAL
from zswapd.core.allocators.lru import Lru
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.compress.base import Compressor
from zswapd.core.frontends.cleancache import Cleancache
from zswapd.core.frontends.frontswap import Frontswap
from zswapd.core.pam.zbuds import Zbuds
from zswapd.core.pam.zv import Zv
from zswapd.core.reclaim.eviction import Eviction
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem

MakeAllocator = Callable[[PageFrames], Allocator]
EPHEMERAL_ALLOCATORS = {"zbud": ZbudPool, "zsmalloc": ZsPool}


@dataclass(slots=True)
class Cache:
    """The ephemeral half of the pool."""

    allocator: ZbudPool | ZsPool
    zbuds: Zbuds
    nodes: Objnodes
    eviction: Eviction
    cleancache: Cleancache


@dataclass(slots=True)
class Stack:
    """One pool with all its parts."""

    page_size: int
    arena: Arena
    frames: PageFrames
    allocator: Allocator
    zv: Zv
    nodes: Objnodes
    tmem: Tmem
    frontswap: Frontswap
    cache: Cache

    def check(self) -> None:
        """Prove the invariants of every layer, and that the layers agree with each other."""
        self.frames.check()
        self.allocator.check()
        self.tmem.check()
        self.zv.check(self.tmem.pampds(self.zv))
        self.cache.allocator.check()
        self.cache.zbuds.check(self.tmem.pampds(self.cache.zbuds))
        assert self.frames.ephemeral_frames == self.cache.allocator.used_frames()
        assert (
            self.frames.used_frames == self.allocator.used_frames() + self.frames.ephemeral_frames
        )

    def close(self) -> None:
        """Free the memory."""
        self.arena.close()

    def load(self, swap_type: int, offset: int) -> bytes | None:
        """Return frontswap's page, or None."""
        out = bytearray(b"\xee") * self.page_size
        if self.frontswap.load(swap_type, offset, memoryview(out)):
            return bytes(out)
        assert out == bytearray(b"\xee") * self.page_size, (
            "a load that misses must not touch the buffer"
        )
        return None


def build(
    page_size: int = 4096,
    *,
    frames: int = 256,
    reserve: int | None = None,
    node_reserve: int = 600,
    allocator: MakeAllocator = ZsPool,
    compressor: str | Compressor = "lz4",
    total_frames: int = 1 << 40,
    keep_poor: bool = True,
    checksum: bool = True,
    ephemeral: str = "zbud",
    packer: bool = True,
) -> Stack:
    """Build a stack with its reserve populated (all frames unless `reserve` says fewer).

    `ephemeral` names the other half's allocator. Without `packer`, zpages.py does its steps one by
    one. `total_frames` is the system's memory for zv_page_count_policy_percent; by default there is
    no limit.
    """
    arena = Arena(frames, page_size, kind="memfd")
    pages = PageFrames(arena, reserve_frames=frames if reserve is None else reserve)
    pages.refill_now()
    objects = allocator(pages)
    zv = Zv(
        objects,
        pages,
        compress.get(compressor) if isinstance(compressor, str) else compressor,
        compress.by_codec(),
        total_frames=total_frames,
        keep_poor=keep_poor,
        checksum=checksum,
    )
    nodes, cache_nodes = (
        Objnodes(20_000, reserve=node_reserve),
        Objnodes(20_000, reserve=node_reserve),
    )
    tmem = Tmem(nodes, cache_nodes)
    front = Frontswap(tmem, zv)
    lru = Lru(pages.end_frame)
    pages.accompany(lru.populate)
    clean = EPHEMERAL_ALLOCATORS[ephemeral](pages, EPHEMERAL, lru)
    zbuds = Zbuds(clean, pages, zv.compressor, compress.by_codec(), checksum=checksum)
    if not packer:
        zv.packer = zbuds.packer = None
    wanted = objects.longest_run
    eviction = Eviction(
        tmem, zbuds, pages, cache_nodes, wanted_run=wanted, longest_run=clean.longest_run
    )
    zv.evict_cache = eviction.evict_for_store
    cleancache = Cleancache(tmem, zbuds, eviction.make_room)
    cache = Cache(clean, zbuds, cache_nodes, eviction, cleancache)
    return Stack(page_size, arena, pages, objects, zv, nodes, tmem, front, cache)
