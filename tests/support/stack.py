# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole core, built small: arena, frames, allocator, compressed back end, index, swap front end.

`check()` proves everything that can be proved about it at once; property tests call it after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zswapd import compress
from zswapd.allocators.arena import Arena
from zswapd.allocators.base import Allocator
from zswapd.allocators.pageframes import PageFrames
from zswapd.allocators.zsmalloc import ZsPool
from zswapd.compress.base import Compressor
from zswapd.frontends.frontswap import Frontswap
from zswapd.pam.zv import Zv
from zswapd.tmem.core import Tmem
from zswapd.tmem.objnodes import Objnodes

MakeAllocator = Callable[[PageFrames], Allocator]


@dataclass(slots=True)
class Stack:
    """One pool and all that is in it."""

    page_size: int
    arena: Arena
    frames: PageFrames
    allocator: Allocator
    zv: Zv
    nodes: Objnodes
    tmem: Tmem
    frontswap: Frontswap

    def check(self) -> None:
        """Prove the invariants of every layer, and that the layers agree with each other."""
        self.frames.check()
        self.allocator.check()
        self.tmem.check()
        self.zv.check(self.tmem.pampds(self.zv))
        assert self.frames.used_frames == self.allocator.used_frames()

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()

    def load(self, swap_type: int, offset: int) -> bytes | None:
        """Return the page that frontswap has, or None."""
        out = bytearray(b"\xee") * self.page_size
        if self.frontswap.load(swap_type, offset, memoryview(out)):
            return bytes(out)
        assert out == bytearray(b"\xee") * self.page_size, "a load that misses must not touch the buffer"
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
) -> Stack:
    """Build a stack with its reserve populated (all frames unless `reserve` says fewer).

    `total_frames` is the system's memory that zv_page_count_policy_percent is a share of; by default no limit
    at all.
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
    nodes = Objnodes(20_000, reserve=node_reserve)
    tmem = Tmem(nodes)
    return Stack(page_size, arena, pages, objects, zv, nodes, tmem, Frontswap(tmem, zv))
