# SPDX-License-Identifier: GPL-2.0-or-later
"""The ephemeral half: an allocator with an order of use, zbuds, eviction and cleancache.

It shares only the arena and tmem with the persistent half. It has its own frames, index nodes,
limits and statistics. A successor finds nothing of it, and makes a new and empty one.
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
"""The most frames examined for one sample of ages, since most frames may be those of swap.

A sample takes half a millisecond.
"""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Snapshots of the parts of the ephemeral half.

    Attributes:
        frames: frames in use.
        limit_frames: frames that may be used.
        zsmalloc, zbud: the allocator; the other one is None.
        zbuds, cleancache: see their classes.
        ages: runs of a sample by the time since one of their pages was put (see `StoreAges`). Empty
            if no sample was taken.
    """

    frames: int
    limit_frames: int
    zsmalloc: ZsStatistics | None
    zbud: ZbudStatistics | None
    zbuds: ZbudsStatistics
    cleancache: CleancacheStatistics
    ages: tuple[int, ...]


class CachedRuns:
    """The runs of frames in an order of use, in the form that `StoreAges` needs.

    The age of a run is that of its first page.

    Args:
        lru: has the runs.
        allocator: has the objects of a run.
        zbuds: has the generation of a page.
    """

    def __init__(self, lru: Lru, allocator: ZsPool | ZbudPool, zbuds: Zbuds) -> None:
        self._lru = lru
        self._allocator = allocator
        self._zbuds = zbuds

    @property
    def pages(self) -> int:
        """A number above all frames that may begin a run."""
        return self._lru.end

    def generation(self, number: int) -> int:
        """Return the generation of the first page of the run at a frame; 0 without a run."""
        handles = self._allocator.objects_of(number) if number in self._lru else ()
        return self._zbuds.key_of(handles[0]).generation if handles else 0


def split(
    statistics: ZsStatistics | ZbudStatistics,
) -> tuple[ZsStatistics | None, ZbudStatistics | None]:
    """Return an allocator's statistics as (zsmalloc, zbud), one of which is None."""
    return (statistics, None) if isinstance(statistics, ZsStatistics) else (None, statistics)


class CacheHalf:
    """All parts between cache volumes and frames.

    Args:
        frames: the frames of the arena.
        tmem: the index. Its ephemeral pools have their nodes in `nodes`.
        nodes: nodes of the index.
        compressor, compressors: see ZPages.
        allocator: name of the allocator.
        max_zspage_frames: longest zspage in frames, if the allocator is zsmalloc.
        wanted_run: the most adjacent frames that the persistent half asks for.

    Attributes:
        nodes, lru, allocator, zbuds, eviction, cleancache: the parts.
        ages: samples of the time since pages were put.

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
        """Verify the invariants of every part; takes seconds for a full cache.

        Raises:
            InvariantError: the message names the fault.
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
        """Return snapshots of all parts, with or without a sample of ages."""
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
