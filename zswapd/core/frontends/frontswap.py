# SPDX-License-Identifier: GPL-2.0-or-later
"""frontswap: swap over tmem. Store, load, invalidate_page and invalidate_area, by (type, offset).

A type is one swap file. All types share one persistent tmem pool. Offsets are swizzled as in the
kernel's frontswap for tmem: oid = type << 8 | low eight bits of the offset, and index = the other
bits. So a swap file has 256 objects of even size.

Rules
  - A load does not remove the page.
  - A store replaces the older page. A refused store leaves none.
  - While frozen, stores are refused and flush the older page. Loads and invalidates go on.
  - After invalidate_area, no page of the type is left.

Source of the ideas: frontswap (Dan Magenheimer, 2010-2012) and its zcache back end.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - mypyc looks a dataclass's annotations up
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import CLIENT_SHIFT, MAX_CLIENTS, MAX_INDEX, NO_NEED, RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.compress.base import Compressor
    from zswapd.core.pam.base import PageKey, RewritingPam
    from zswapd.core.tmem.tmem import Tmem

MAX_SWAPFILES: Final = MAX_CLIENTS
SWIZ_BITS: Final = CLIENT_SHIFT
_SWIZ: Final = 1 << SWIZ_BITS
_SWIZ_MASK: Final = _SWIZ - 1
MAX_OFFSET: Final = (MAX_INDEX << SWIZ_BITS) | _SWIZ_MASK
"""Highest page offset in a swap file."""


@dataclass(frozen=True, slots=True)
class FrontswapStatistics:
    """Frontswap's own counters, with the kernel's names.

    Attributes:
        succ_stores, failed_stores: pages accepted and refused.
        loads: pages found.
        failed_loads: loads of pages that are not there.
        invalidates: pages dropped by invalidation.
        rejects: refused stores by reason (name in small letters); only reasons that occurred.
        frozen: whether stores are refused.
    """

    succ_stores: int
    failed_stores: int
    loads: int
    failed_loads: int
    invalidates: int
    rejects: Mapping[str, int]
    frozen: bool


counters.declare(
    FrontswapStatistics,
    cumulative="succ_stores failed_stores loads failed_loads invalidates rejects",
)


class Frontswap:
    """All swap files over one persistent tmem pool.

    Args:
        tmem: the index.
        pam: the back end, which keeps the pages.
    """

    def __init__(self, tmem: Tmem, pam: RewritingPam) -> None:
        self._tmem = tmem
        self._pam = pam
        self._pool = tmem.new_pool(tmem.new_client(), pam, persistent=True)
        tmem.when_flushing = self._flushing
        self._sizes: dict[int, int] = {}
        self._when_losing: dict[int, Callable[[int], None]] = {}
        self._frozen = False
        self._rejects = dict.fromkeys(RejectReason, 0)
        self._succ_stores = self._failed_stores = self._loads = self._failed_loads = (
            self._invalidates
        ) = 0

    def init(
        self,
        swap_type: int,
        pages: int = MAX_OFFSET + 1,
        *,
        when_losing: Callable[[int], None] | None = None,
    ) -> None:
        """Add an empty swap file.

        Args:
            swap_type: its number, below MAX_SWAPFILES.
            pages: its length.
            when_losing: called with a page's offset just before the page's last copy is dropped,
                because a store of the page was refused.

        Raises:
            ValueError: the number is out of range or in use.
        """
        if not 0 <= swap_type < MAX_SWAPFILES:
            raise ValueError(f"swap type {swap_type} is not below {MAX_SWAPFILES}")
        if swap_type in self._sizes:
            raise ValueError(f"swap type {swap_type} is in use")
        self._sizes[swap_type] = pages
        if when_losing is not None:
            self._when_losing[swap_type] = when_losing

    def remove(self, swap_type: int) -> None:
        """Remove a swap file. It has no pages."""
        del self._sizes[swap_type]
        self._when_losing.pop(swap_type, None)

    def resize(self, swap_type: int, pages: int) -> None:
        """Set the length of a swap file. It has no pages beyond it."""
        self._sizes[swap_type] = pages

    def store(self, swap_type: int, offset: int, page: memoryview) -> RejectReason | None:
        """Keep a page; return None or the reason of the refusal. Then no older copy is left."""
        if self._frozen:
            if self.holds(swap_type, offset):
                self._flushing(
                    self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
                )
                reach(crashpoints.REFUSED_MARKED)
            self.invalidate_page(swap_type, offset)
            self._failed_stores += 1
            self._rejects[RejectReason.FROZEN] += 1
            return RejectReason.FROZEN
        try:
            reason = self._tmem.put(
                self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS, page
            )
        except BaseException:
            self._failed_stores += 1
            raise
        if reason is None:
            self._succ_stores += 1
        else:
            self._failed_stores += 1
            self._rejects[reason] += 1
        return reason

    def _flushing(self, pool: int, oid: int, index: int) -> None:
        """Tell the device that a page is about to lose its last copy."""
        when_losing = self._when_losing.get(oid >> SWIZ_BITS)
        if when_losing is not None and pool == self._pool:
            when_losing(index << SWIZ_BITS | oid & _SWIZ_MASK)

    def load(self, swap_type: int, offset: int, out: memoryview) -> bool:
        """Write a page into `out`; return False if it is not there.

        Raises:
            CorruptedPageError: it is there, but damaged.
        """
        if self._tmem.get(
            self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS, out
        ):
            self._loads += 1
            return True
        self._failed_loads += 1
        return False

    def invalidate_page(self, swap_type: int, offset: int) -> bool:
        """Drop a page; return whether it was there."""
        found = self._tmem.flush_page(
            self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
        )
        self._invalidates += found
        return found

    def invalidate_range(self, swap_type: int, first: int, last: int) -> int:
        """Drop the pages from offset `first` to `last`; return how many were there.

        The cost grows with the pages that are there, plus 256 object look-ups. So a discard of a
        whole swap file is one call.
        """
        if last - first < _SWIZ:
            return sum(self.invalidate_page(swap_type, offset) for offset in range(first, last + 1))
        flushed = 0
        for low in range(_SWIZ):
            # The offsets of this object in the range are low, low + 256, ...: round up at the
            # first, down at the last.
            begin = (first - low + _SWIZ_MASK) >> SWIZ_BITS
            end = (last - low) >> SWIZ_BITS
            flushed += self._tmem.flush_range(self._pool, swap_type << SWIZ_BITS | low, begin, end)
        self._invalidates += flushed
        return flushed

    def invalidate_area(self, swap_type: int) -> int:
        """Drop all pages of a swap file, as swapoff does; return how many there were."""
        flushed = sum(
            self._tmem.flush_object(self._pool, swap_type << SWIZ_BITS | low)
            for low in range(_SWIZ)
        )
        self._invalidates += flushed
        return flushed

    # Adoption by a successor: the methods of pam.base.Adopter.

    def adopt_page(self, pool: int, oid: int, index: int, pampd: int) -> int:
        """Enter a page that its back end has found.

        Return -1 if no swap file has this page (see pam.base.Adopter).
        """
        pages = self._sizes.get(oid >> SWIZ_BITS, 0)
        if pool != self._pool or index << SWIZ_BITS | oid & _SWIZ_MASK >= pages:
            return -1
        return self._tmem.adopt_page(pool, oid, index, pampd)

    def find_page(self, pool: int, oid: int, index: int) -> int:
        """Return the pampd of a page, or 0 if there is none."""
        return self._tmem.find(pool, oid, index) if pool == self._pool else 0

    def replace_page(self, pool: int, oid: int, index: int, old: int, new: int) -> bool:
        """Replace the pampd of a page."""
        return self._tmem.replace(pool, oid, index, old, new)

    def holds(self, swap_type: int, offset: int) -> bool:
        """Say whether a page is in the pool, without reading it."""
        return (
            self._tmem.find(
                self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
            )
            != 0
        )

    def pampd_of(self, swap_type: int, offset: int) -> int:
        """Return the pampd of a page, or 0 if it is not in the pool."""
        return self._tmem.find(
            self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
        )

    def generation(self, swap_type: int, offset: int) -> int:
        """Return the serial number of a page's store, or 0 if the page is not in the pool.

        It stays the same as long as the page's bytes do.
        """
        key = self.key_of(swap_type, offset)
        return key.generation if key is not None else 0

    def key_of(self, swap_type: int, offset: int) -> PageKey | None:
        """Return the header of a page, or None if it is not in the pool. Its data is not read."""
        pampd = self._tmem.find(
            self._pool, swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
        )
        return self._pam.key_of(pampd) if pampd else None

    def recompress(
        self, swap_type: int, offset: int, compressor: Compressor, gain_percent: int
    ) -> int:
        """Recompress a page if that saves `gain_percent` of its size. It gets a new generation.

        Returns:
            1 if the page was replaced; 0 if the gain is too small; NO_NEED if there is nothing to
            do or no page; NO_ROOM if there is no room for the copy.

        Raises:
            CorruptedPageError: the page is damaged.
        """
        oid, index = swap_type << SWIZ_BITS | offset & _SWIZ_MASK, offset >> SWIZ_BITS
        old = self._tmem.find(self._pool, oid, index)
        new = self._pam.rewrite(old, compressor, gain_percent) if old else NO_NEED
        if new <= 0:
            return new
        self._tmem.replace(self._pool, oid, index, old, new)
        reach(crashpoints.STORE_INDEXED)
        self._pam.free(old)
        reach(crashpoints.STORE_REPLACED)
        return 1

    def pages(self, swap_type: int) -> int:
        """Return how many pages of a swap file are in the pool. It asks 256 objects."""
        return sum(
            self._tmem.object_pages(self._pool, swap_type << SWIZ_BITS | low)
            for low in range(_SWIZ)
        )

    def object_bytes(self, swap_type: int) -> int:
        """Return the bytes that the objects of a swap file take in the pool, with headers."""
        return self._pam.object_bytes(swap_type)

    def limit_hits(self, swap_type: int) -> int:
        """Return how many pages were refused because the swap file was at its limit."""
        return self._pam.limit_hits(swap_type)

    def freeze(self) -> None:
        """Refuse stores; each store still flushes the older page."""
        self._frozen = True

    def thaw(self) -> None:
        """Accept stores again."""
        self._frozen = False

    @property
    def frozen(self) -> bool:
        """Whether stores are refused."""
        return self._frozen

    def statistics(self) -> FrontswapStatistics:
        """Return a frozen snapshot."""
        return FrontswapStatistics(
            succ_stores=self._succ_stores,
            failed_stores=self._failed_stores,
            loads=self._loads,
            failed_loads=self._failed_loads,
            invalidates=self._invalidates,
            rejects={
                reason.name.lower(): count for reason, count in self._rejects.items() if count
            },
            frozen=self._frozen,
        )
