# SPDX-License-Identifier: GPL-2.0-or-later
"""cleancache: clean pages of slow files over tmem, by (pool, inode, index).

The cache is a second chance and never the only copy. Each file system is one ephemeral tmem pool. A
page that was put may be gone at the next get, so the client must have the data elsewhere. A page
must never be stale. A put replaces the older page, and a refused put leaves none. An invalidated
page is gone when the call returns.

A get removes the page, because its reader keeps it. The reader's page cache puts it again when it
drops it. In a shared pool pages stay after a get, because the pool has several readers. They also
stay if the caller asks for it: the kernel does not report when it drops a page of a FUSE file from
its page cache.

A damaged page is a miss. It is invalidated and counted, and its reader gets the data from the file.

Swizzling: tmem's indexes have 32 bits, which is 16 TiB of 4 KiB pages. Pages above that go to
further objects of the same inode, with oid = segment << 48 | inode. Puts for inode numbers above 48
bits and segments above 16 bits are refused page by page.

Source of the ideas: cleancache (Dan Magenheimer, 2009-2012) and its zcache back end.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - mypyc looks a dataclass's annotations up
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core.pam.base import MAX_INDEX, RejectReason
from zswapd.errors import CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.pam.base import Pam
    from zswapd.core.tmem.tmem import Tmem

_INDEX_BITS: Final = 32
_INODE_BITS: Final = 48
MAX_INODE: Final = (1 << _INODE_BITS) - 1
MAX_PAGE: Final = (1 << (64 - _INODE_BITS + _INDEX_BITS)) - 1
"""Highest page number in a file that can be kept."""


@dataclass(frozen=True, slots=True)
class CleancacheStatistics:
    """Cleancache's own counters, with the kernel's names.

    Attributes:
        succ_gets, failed_gets: gets that found their page, and gets that did not.
        puts: pages that were accepted.
        failed_puts: pages that were refused.
        invalidates: pages dropped by invalidation.
        damaged: pages that were damaged and dropped; they count as failed gets too.
        rejects: refused puts by reason (name in small letters); only reasons that occurred.
        pages: pages in the cache at present.
        frozen: whether puts are refused.
    """

    succ_gets: int
    failed_gets: int
    puts: int
    failed_puts: int
    invalidates: int
    damaged: int
    rejects: Mapping[str, int]
    pages: int
    frozen: bool


counters.declare(
    CleancacheStatistics,
    cumulative="succ_gets failed_gets puts failed_puts invalidates damaged rejects",
)


class Cleancache:
    """All file systems over one ephemeral back end.

    Args:
        tmem: the index.
        pam: the back end, which keeps the pages.
        make_room: called before each put. It may evict, because tmem is not busy then. It returns
            the reason why there is no room, or None.
    """

    def __init__(self, tmem: Tmem, pam: Pam, make_room: Callable[[], RejectReason | None]) -> None:
        self._tmem = tmem
        self._pam = pam
        self._make_room = make_room
        self._client = tmem.new_client()
        self._is_shared: dict[int, bool] = {}
        # Highest segment in use, by pool: invalidate_inode has to visit all up to it.
        self._segments: dict[int, int] = {}
        self._frozen = False
        self._rejects = dict.fromkeys(RejectReason, 0)
        self._succ_gets = self._failed_gets = self._puts = self._failed_puts = self._invalidates = (
            self._damaged
        ) = 0

    # File systems.

    def init_fs(self) -> int:
        """Return a new, empty pool. A get removes its page.

        Raises:
            ValueError: no pool number is free.
        """
        return self._init(is_shared=False)

    def init_shared_fs(self) -> int:
        """Return a new, empty pool. Its pages stay after a get. Raises as `init_fs` does."""
        return self._init(is_shared=True)

    def _init(self, *, is_shared: bool) -> int:
        pool = self._tmem.new_pool(self._client, self._pam, persistent=False)
        self._is_shared[pool] = is_shared
        self._segments[pool] = 0
        return pool

    def invalidate_fs(self, pool: int) -> int:
        """Destroy a pool, as unmounting does; return how many pages it had."""
        self._check(pool)
        flushed = self._tmem.destroy_pool(pool)
        del self._is_shared[pool], self._segments[pool]
        self._invalidates += flushed
        return flushed

    def _check(self, pool: int) -> None:
        if pool not in self._is_shared:
            raise ValueError(f"pool {pool} belongs to no file system")

    # Pages.

    def put_page(self, pool: int, inode: int, index: int, page: memoryview) -> RejectReason | None:
        """Keep a page; return None or the reason of the refusal. Then no older copy is left."""
        self._check(pool)
        if inode > MAX_INODE or index > MAX_PAGE:
            return self._refused(RejectReason.INDEX_LIMIT)
        if self._frozen:
            self.invalidate_page(pool, inode, index)
            return self._refused(RejectReason.FROZEN)
        reason = self._make_room()
        if reason is not None:
            self.invalidate_page(pool, inode, index)
            return self._refused(reason)
        segment = index >> _INDEX_BITS
        if segment > self._segments[pool]:
            self._segments[pool] = segment
        try:
            reason = self._tmem.put(pool, segment << _INODE_BITS | inode, index & MAX_INDEX, page)
        except BaseException:
            self._failed_puts += 1
            raise
        if reason is not None:
            return self._refused(reason)
        self._puts += 1
        return None

    def _refused(self, reason: RejectReason) -> RejectReason:
        self._failed_puts += 1
        self._rejects[reason] += 1
        return reason

    def get_page(
        self, pool: int, inode: int, index: int, out: memoryview, *, keep: bool = False
    ) -> bool:
        """Write a page into `out` and remove it from the pool; return False if it is not there.

        Args:
            pool: of a file system.
            inode: of the file.
            index: of the page in the file.
            out: as long as a page; undefined after a miss.
            keep: leave the page in the pool, as a shared pool always does.
        """
        self._check(pool)
        oid = index >> _INDEX_BITS << _INODE_BITS | inode
        is_there = False
        if inode <= MAX_INODE and index <= MAX_PAGE:
            try:
                is_there = self._tmem.get(pool, oid, index & MAX_INDEX, out)
            except CorruptedPageError:
                self._damaged += 1
                self._tmem.flush_page(pool, oid, index & MAX_INDEX)
        if not is_there:
            self._failed_gets += 1
            return False
        if not keep and not self._is_shared[pool]:
            self._tmem.flush_page(pool, oid, index & MAX_INDEX)
        self._succ_gets += 1
        return True

    def invalidate_page(self, pool: int, inode: int, index: int) -> bool:
        """Drop a page; return whether it was there."""
        return self.invalidate_range(pool, inode, index, index) > 0

    def invalidate_range(self, pool: int, inode: int, first: int, last: int) -> int:
        """Drop a file's pages from `first` to `last`; return how many were there.

        The cost grows with the pages that are there, not with the range.
        """
        self._check(pool)
        if inode > MAX_INODE:
            return 0
        flushed = 0
        for segment in range(
            first >> _INDEX_BITS, min(last >> _INDEX_BITS, self._segments[pool]) + 1
        ):
            start = segment << _INDEX_BITS
            oid = segment << _INODE_BITS | inode
            flushed += self._tmem.flush_range(
                pool, oid, max(first - start, 0), min(last - start, MAX_INDEX)
            )
        self._invalidates += flushed
        return flushed

    def invalidate_inode(self, pool: int, inode: int) -> int:
        """Drop all pages of a file; return how many there were."""
        self._check(pool)
        if inode > MAX_INODE:
            return 0
        segments = range(self._segments[pool] + 1)
        flushed = sum(
            self._tmem.flush_object(pool, segment << _INODE_BITS | inode) for segment in segments
        )
        self._invalidates += flushed
        return flushed

    def invalidate_some(self, pool: int, count: int) -> int:
        """Drop up to `count` pages of a file system, in any order; return how many.

        It serves to destroy a large pool in steps.
        """
        self._check(pool)
        flushed = self._tmem.flush_some(pool, count)
        self._invalidates += flushed
        return flushed

    def pages(self, pool: int) -> int:
        """Return how many pages a file system has in the cache."""
        return self._tmem.pool_pages(pool)

    # All file systems together.

    def freeze(self) -> None:
        """Refuse puts; each put still invalidates the older page. Gets and invalidates go on."""
        self._frozen = True

    def thaw(self) -> None:
        """Accept puts again."""
        self._frozen = False

    @property
    def frozen(self) -> bool:
        """Whether puts are refused."""
        return self._frozen

    def statistics(self) -> CleancacheStatistics:
        """Return a frozen snapshot."""
        return CleancacheStatistics(
            succ_gets=self._succ_gets,
            failed_gets=self._failed_gets,
            puts=self._puts,
            failed_puts=self._failed_puts,
            invalidates=self._invalidates,
            damaged=self._damaged,
            rejects={
                reason.name.lower(): count for reason, count in self._rejects.items() if count
            },
            pages=sum(self._tmem.pool_pages(pool) for pool in self._is_shared),
            frozen=self._frozen,
        )
