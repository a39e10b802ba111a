# SPDX-License-Identifier: GPL-2.0-or-later
"""The ephemeral half, put together: an allocator with an order of use, zbuds, eviction, cleancache.

It shares the arena and tmem with the persistent half and nothing else: frames, index nodes, limits
and statistics are its own. Nothing of it is found by a successor, which makes a new, empty one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zswapd.core.allocators.choice import make_allocator
from zswapd.core.allocators.frametable import EPHEMERAL
from zswapd.core.allocators.lru import Lru
from zswapd.core.allocators.zsmalloc import ZsStatistics
from zswapd.core.frontends.cleancache import Cleancache, CleancacheStatistics
from zswapd.core.pam.zbuds import Zbuds, ZbudsStatistics
from zswapd.core.reclaim.ages import StoreAges
from zswapd.core.reclaim.eviction import Eviction
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.allocators.zbud import ZbudPool, ZbudStatistics
    from zswapd.core.allocators.zsmalloc import ZsPool
    from zswapd.core.compress.base import Compressor
    from zswapd.core.tmem.objnodes import Objnodes
    from zswapd.core.tmem.tmem import Tmem

_PLACES = 4096
"""Frames that are looked at for one answer about ages: most may be those of swap.

Half a millisecond.
"""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Snapshots of the parts of the ephemeral half.

    Attributes:
        frames: frames it has.
        limit_frames: frames it may have.
        zsmalloc, zbud: its allocator; the other is None.
        zbuds, cleancache: see there.
        ages: runs of a sample by the time since one of their pages was put (see `StoreAges`); empty
            if none was taken.
    """

    frames: int
    limit_frames: int
    zsmalloc: ZsStatistics | None
    zbud: ZbudStatistics | None
    zbuds: ZbudsStatistics
    cleancache: CleancacheStatistics
    ages: tuple[int, ...]


class CachedRuns:
    """The runs of frames in an order of use, as `StoreAges` asks for them.

    A run is as old as the first of its pages.

    Args:
        lru: which runs there are.
        allocator: what is in them.
        zbuds: when it was put.
    """

    def __init__(self, lru: Lru, allocator: ZsPool | ZbudPool, zbuds: Zbuds) -> None:
        self._lru = lru
        self._allocator = allocator
        self._zbuds = zbuds

    @property
    def pages(self) -> int:
        """A number above those of all frames that may begin a run."""
        return self._lru.end

    def generation(self, number: int) -> int:
        """Return the serial number of the put that one of the pages at a frame is from.

        0 if no run begins there.
        """
        handles = self._allocator.objects_of(number) if number in self._lru else ()
        return self._zbuds.key_of(handles[0]).generation if handles else 0


def split(
    statistics: ZsStatistics | ZbudStatistics,
) -> tuple[ZsStatistics | None, ZbudStatistics | None]:
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
        nodes, lru, allocator, zbuds, eviction, cleancache: the parts.
        ages: who knows how long ago pages were put.

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
        self.lru = lru = Lru(frames.end_frame)
        frames.accompany(lru.populate)
        self.allocator: ZsPool | ZbudPool = make_allocator(
            allocator, frames, EPHEMERAL, lru, max_zspage_frames=max_zspage_frames
        )
        self.zbuds = Zbuds(self.allocator, frames, compressor, compressors)
        self.eviction = Eviction(
            tmem,
            self.zbuds,
            frames,
            nodes,
            wanted_run=wanted_run,
            longest_run=self.allocator.longest_run,
        )
        self.cleancache = Cleancache(tmem, self.zbuds, self.eviction.make_room)
        zbuds = self.zbuds
        self.ages = StoreAges(
            [CachedRuns(lru, self.allocator, zbuds)], lambda: zbuds.newest, places=_PLACES
        )

    def check(self) -> None:
        """Prove the invariants of every part. Takes seconds for a full cache.

        Raises:
            InvariantError: naming what is wrong.
        """
        self.allocator.check()
        self.zbuds.check(self._tmem.pampds(self.zbuds))
        if self._frames.ephemeral_frames != self.allocator.used_frames():
            held = self.allocator.used_frames()
            raise InvariantError(
                f"{self._frames.ephemeral_frames} ephemeral frames in use, the allocator holds"
                f" {held}"
            )

    def statistics(self, *, ages_sampled: bool = True) -> CacheStatistics:
        """Return snapshots of all parts, with a sample of ages or without."""
        zsmalloc, zbud = split(self.allocator.statistics())
        return CacheStatistics(
            frames=self._frames.ephemeral_frames,
            limit_frames=self.eviction.limit_frames,
            zsmalloc=zsmalloc,
            zbud=zbud,
            zbuds=self.zbuds.statistics(),
            cleancache=self.cleancache.statistics(),
            ages=self.ages.sample() if ages_sampled else (),
        )
