# SPDX-License-Identifier: GPL-2.0-or-later
"""Eviction from the ephemeral half, least recently used runs first.

Three callers need frames:

- A cleancache put, before it begins (`make_room`). The cache keeps to its limit and leaves swap its
  reserve. It may take free frames while half of the reserve's target is left. Below that, it evicts
  its own pages.
- A persistent store that finds no frame (`evict_for_store`), in the middle of tmem's put. That is
  safe: only ephemeral pools lose pages, and they share neither index nodes nor objects with the
  persistent pool. The store may need contiguous frames. So the ephemeral neighbours of the oldest
  run are evicted with it.
- The shrinker, which returns memory to the system (`evict`).

A page is dropped only if the index names exactly this copy (`Tmem.forget`). So a damaged header
cannot drop a valid page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zswapd.core.pam.base import RejectReason
from zswapd.core.tmem.radix import MAX_NEW_NODES

if TYPE_CHECKING:
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.pam.zbuds import Zbuds
    from zswapd.core.tmem.objnodes import Objnodes
    from zswapd.core.tmem.tmem import Tmem

_MAX_RUNS: Final = 4
"""Maximum of runs that one put evicts. A lowered limit is not reached by a single put."""
_MAX_FAILURES: Final = 8
"""Runs in a row that cannot be emptied, after which the search ends."""


class Eviction:
    """The evictor of one ephemeral back end.

    Args:
        tmem: the index of its pages.
        zbuds: the back end.
        frames: the owner of its frames.
        nodes: memory of its index.
        wanted_run: most contiguous frames that a persistent store needs.
        longest_run: most frames that one ephemeral page may take.

    Attributes:
        limit_frames: cache.limit in frames. It may be set at any time, below the current use too.
    """

    def __init__(
        self,
        tmem: Tmem,
        zbuds: Zbuds,
        frames: PageFrames,
        nodes: Objnodes,
        *,
        wanted_run: int,
        longest_run: int,
    ) -> None:
        self._forget = tmem.forget
        self._zbuds = zbuds
        self._frames = frames
        self._nodes = nodes
        self._wanted_run = wanted_run
        self._longest_run = longest_run
        self.limit_frames = frames.end_frame - frames.first_frame

    def make_room(self) -> RejectReason | None:
        """Make room for a put within the cache's limits; return None, or why there is none."""
        for _ in range(_MAX_RUNS):
            reason = self._lacking()
            first = self._zbuds.oldest_run() if reason is not None else 0
            if not first:
                return reason
            self._zbuds.evict(first, self._forget)
        return self._lacking()

    def _lacking(self) -> RejectReason | None:
        """Return why one more run may not be taken, or None if it may."""
        frames = self._frames
        if frames.ephemeral_frames + self._longest_run > self.limit_frames:
            return RejectReason.POOL_LIMIT_HIT
        if frames.table.free_frames - self._longest_run < frames.reserve_target // 2:
            return RejectReason.FAILED_ALLOC
        if self._nodes.available() < MAX_NEW_NODES and not self._nodes.wants_refill():
            return RejectReason.FAILED_OBJNODE
        return None

    def evict_for_store(self) -> bool:
        """Free frames for a persistent store, `wanted_run` of them contiguous if possible.

        Return whether any frame was freed.
        """
        table = self._frames.table
        first = self._zbuds.oldest_run()
        freed = failures = low = high = 0
        while first and high - low < self._wanted_run:
            span = table.free_around(first)
            gone = self._zbuds.evict(first, self._forget)
            if gone:
                freed += gone
                low, high = span
                first = table.ephemeral_beside(low, high)
                continue
            failures += 1
            if freed or failures == _MAX_FAILURES:
                break
            first = self._zbuds.oldest_run()  # a different one: the failed run is now the newest
        return freed > 0

    def evict(self, count: int) -> int:
        """Free at least `count` frames if the ephemeral half has them; return how many.

        It takes about 2 µs a frame.
        """
        freed = failures = 0
        while freed < count and failures < _MAX_FAILURES:
            first = self._zbuds.oldest_run()
            if not first:
                break
            gone = self._zbuds.evict(first, self._forget)
            freed += gone
            failures = 0 if gone else failures + 1
        return freed
