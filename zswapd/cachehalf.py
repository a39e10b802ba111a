# SPDX-License-Identifier: GPL-2.0-or-later
"""The ephemeral half, put together: an allocator with an order of use, zbuds, eviction, cleancache.

It shares the arena and tmem with the persistent half and nothing else: frames, index nodes, limits and statistics are its own.
Nothing of it is found by a successor, which makes a new, empty one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zswapd.allocators.choice import make_allocator
from zswapd.allocators.frametable import EPHEMERAL
from zswapd.allocators.lru import Lru
from zswapd.allocators.zspages import ZsStatistics
from zswapd.errors import InvariantError
from zswapd.frontends.cleancache import Cleancache, CleancacheStatistics
from zswapd.pam.zbuds import Zbuds, ZbudsStatistics
from zswapd.reclaim.eviction import Eviction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.allocators.pageframes import PageFrames
    from zswapd.allocators.zbud import ZbudPool, ZbudStatistics
    from zswapd.allocators.zsmalloc import ZsPool
    from zswapd.compress.base import Compressor
    from zswapd.tmem.core import Tmem
    from zswapd.tmem.objnodes import Objnodes


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Snapshots of the parts of the ephemeral half.

    Attributes:
        frames: frames it has.
        limit_frames: frames it may have.
        zsmalloc, zbud: its allocator; the other is None.
        zbuds, cleancache: see there.
    """

    frames: int
    limit_frames: int
    zsmalloc: ZsStatistics | None
    zbud: ZbudStatistics | None
    zbuds: ZbudsStatistics
    cleancache: CleancacheStatistics


def split(statistics: ZsStatistics | ZbudStatistics) -> tuple[ZsStatistics | None, ZbudStatistics | None]:
    """Return an allocator's statistics as zsmalloc's and zbud's, one of which there is."""
    return (statistics, None) if isinstance(statistics, ZsStatistics) else (None, statistics)


class CacheHalf:
    """All parts between cache volumes and frames.

    Args:
        frames: of the arena.
        tmem: the index, whose ephemeral pools have their nodes in `nodes`.
        nodes: of the index.
        compressor, compressors: see ZPages.
        allocator: its name.
        max_zspage_frames: longest zspage, if that is zsmalloc.
        wanted_run: frames side by side that the persistent half asks for at most.

    Attributes:
        nodes, allocator, zbuds, eviction, cleancache: the parts.

    Raises:
        ArenaError: no memory for the order of use.
    """

    def __init__(
        self,
        frames: PageFrames,
        tmem: Tmem,
        nodes: Objnodes,
        compressor: Compressor,
        compressors: Mapping[int, Compressor],
        *,
        allocator: str,
        max_zspage_frames: int,
        wanted_run: int,
    ) -> None:
        self._frames = frames
        self._tmem = tmem
        self.nodes = nodes
        lru = Lru(frames.end_frame)
        frames.accompany(lru.populate)
        self.allocator: ZsPool | ZbudPool = make_allocator(
            allocator, frames, EPHEMERAL, lru, max_zspage_frames=max_zspage_frames
        )
        self.zbuds = Zbuds(self.allocator, frames, compressor, compressors)
        self.eviction = Eviction(tmem, self.zbuds, frames, nodes, wanted_run=wanted_run, longest_run=self.allocator.longest_run)
        self.cleancache = Cleancache(tmem, self.zbuds, self.eviction.make_room)

    def check(self) -> None:
        """Prove the invariants of every part. Takes seconds for a full cache.

        Raises:
            InvariantError: naming what is wrong.
        """
        self.allocator.check()
        self.zbuds.check(self._tmem.pampds(self.zbuds))
        if self._frames.ephemeral_frames != self.allocator.used_frames():
            held = self.allocator.used_frames()
            raise InvariantError(f"{self._frames.ephemeral_frames} ephemeral frames in use, the allocator holds {held}")

    def statistics(self) -> CacheStatistics:
        """Return snapshots of all parts."""
        zsmalloc, zbud = split(self.allocator.statistics())
        return CacheStatistics(
            frames=self._frames.ephemeral_frames,
            limit_frames=self.eviction.limit_frames,
            zsmalloc=zsmalloc,
            zbud=zbud,
            zbuds=self.zbuds.statistics(),
            cleancache=self.cleancache.statistics(),
        )
