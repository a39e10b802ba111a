# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames of the ephemeral half are given up, least recently used first.

For swap, for a newer page, or for the system.

Three who ask:

- a cleancache put, before it begins (`make_room`): the cache keeps to its limit and leaves swap its
  reserve. It may take free frames as long as half of the reserve's target is left; from then on it
  lives on what it has itself;
- a persistent store that finds no frame (`evict_for_store`), in the middle of tmem's put. That is
  safe: the pages that go are in ephemeral pools only, which share neither index nodes nor objects
  with the persistent one. The store may lack frames side by side, so the neighbours of the oldest
  run go with it while they are ephemeral too;
- whoever gives memory back to the system (`evict`).

Pages go only if the index names just this copy (`Tmem.forget`): what a damaged header says costs
nobody a page.
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
"""Runs that one put evicts at most: a limit that is lowered is not for one put to reach."""
_MAX_FAILURES: Final = 8
"""Runs in a row that cannot be emptied before nobody tries further."""


class Eviction:
    """What evicts, over one ephemeral back end.

    Args:
        tmem: the index of its pages.
        zbuds: the back end.
        frames: whose frames it has.
        nodes: memory of its index.
        wanted_run: frames side by side that a persistent store asks for at most.
        longest_run: frames that an ephemeral page may take at most.

    Attributes:
        limit_frames: cache.limit in frames; settable at any time, below the current use too.
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
        """See to it that a put finds a frame within the cache's limits; return why it cannot."""
        for _ in range(_MAX_RUNS):
            reason = self._lacking()
            first = self._zbuds.oldest_run() if reason is not None else 0
            if not first:
                return reason
            self._zbuds.evict(first, self._forget)
        return self._lacking()

    def _lacking(self) -> RejectReason | None:
        """Return why one more run may not be taken now."""
        frames = self._frames
        if frames.ephemeral_frames + self._longest_run > self.limit_frames:
            return RejectReason.POOL_LIMIT_HIT
        if frames.table.free_frames - self._longest_run < frames.reserve_target // 2:
            return RejectReason.FAILED_ALLOC
        if self._nodes.available() < MAX_NEW_NODES and not self._nodes.wants_refill():
            return RejectReason.FAILED_OBJNODE
        return None

    def evict_for_store(self) -> bool:
        """Free frames for a persistent store, as many side by side as it may want if that can be.

        Return whether any.
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
            first = self._zbuds.oldest_run()  # another: that one comes last now
        return freed > 0

    def evict(self, count: int) -> int:
        """Free at least `count` frames, if the ephemeral half has as many; return how many.

        About 2 µs a frame.
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
