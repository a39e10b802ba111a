# SPDX-License-Identifier: GPL-2.0-or-later
"""zbuds: the back end of ephemeral pages, compressed, evicted in the order of their last use.

A page that would leave no room for another page in its frame is refused. It would cost as much
memory as the same page in the kernel's page cache. So zbuds has no bodies.

Eviction frees whole runs of frames, since frames are what the evicting caller needs. A run is a
frame of zbud with one or two pages, or a zspage with all its pages. `evict` names the pages of a
run to its caller through `forget`. The caller has tmem forget them, and `evict` frees the run in
one piece.

`evict` knows the pages from their headers only. A damaged header may name any page. So the caller
also gets the pampd and compares it with the one in the index. A run that `evict` cannot empty for
that reason is counted and becomes the most recently used. `evict` does not read or verify the data:
that would cost a read of memory for data that has no reader.

Ephemeral pages do not outlive the process: to a successor, ephemeral runs are free frames.

Source of the ideas: zbud and ephemeral pools in zcache (Dan Magenheimer, 2010-2012).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core.compress.base import RAW
from zswapd.core.pam.base import HEADER, HEADER_BYTES, RejectReason
from zswapd.core.pam.zpages import NO_PAGE, ZPages
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor

_unpack_header: Final = HEADER.unpack_from
_unpack_key: Final = struct.Struct("=8xQIHxB").unpack_from
"""Unpacks oid, index, length and pool of a header."""


@dataclass(frozen=True, slots=True)
class ZbudsStatistics:
    """Counts of kept, refused and evicted pages, with zcache's names for either allocator.

    Attributes:
        zbud_curr_zpages, zbud_curr_zbytes: pages kept now, and bytes of their data without headers.
        zbud_cumul_zpages, zbud_cumul_zbytes: the same for all pages ever stored.
        loads: pages loaded.
        compress_poor: pages refused because they would leave no room in their frame.
        failed_get_free_pages: pages refused because no frame was free.
        evicted_zpages: pages evicted so that their frames could be used again.
        evicted_raw_pages: frames that these evictions freed.
        evicted_unbuddied_pages, evicted_buddied_pages: evicted runs with one page, and with more.
        failed_evictions: runs that could not be emptied because one of their headers was damaged.
        corrupted: loads of damaged pages.
        damaged_pages: pages that were damaged when they were freed. Their length is unknown, so
            zbud_curr_zbytes still counts it.
    """

    zbud_curr_zpages: int
    zbud_curr_zbytes: int
    zbud_cumul_zpages: int
    zbud_cumul_zbytes: int
    loads: int
    compress_poor: int
    failed_get_free_pages: int
    evicted_zpages: int
    evicted_raw_pages: int
    evicted_unbuddied_pages: int
    evicted_buddied_pages: int
    failed_evictions: int
    corrupted: int
    damaged_pages: int


counters.declare(
    ZbudsStatistics,
    cumulative=(
        "zbud_cumul_zpages zbud_cumul_zbytes loads compress_poor failed_get_free_pages"
        " evicted_zpages evicted_raw_pages evicted_unbuddied_pages evicted_buddied_pages"
        " failed_evictions corrupted damaged_pages"
    ),
)


class Zbuds(ZPages):
    """The back end of ephemeral pages in one allocator, which must keep an order of use.

    The arguments are those of ZPages.
    """

    def __init__(
        self,
        allocator: Allocator,
        frames: PageFrames,
        compressor: Compressor,
        compressors: Mapping[int, Compressor],
        *,
        checksum: bool = True,
    ) -> None:
        super().__init__(allocator, frames, compressor, compressors, checksum=checksum)
        self._pages = self._zbytes = self._cumul_pages = self._cumul_zbytes = self._loads = 0
        self._poor = self._failed = self._damaged = 0
        self._evicted_pages = self._evicted_frames = self._evicted_unbuddied = (
            self._evicted_buddied
        ) = 0
        self._failed_evictions = 0

    # The page path.

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page; return its pampd, or the negated RejectReason (see base.Pam).

        No limit applies here: the front end makes room before.
        """
        zsize = self.pack(page) >> 8
        if zsize > self._max_data:
            self._poor += 1
            return -RejectReason.COMPRESS_POOR
        handle: int = self._alloc(HEADER_BYTES + zsize)
        if not handle:
            self._failed += 1
            return -RejectReason.FAILED_ALLOC
        self.write_packed(handle, pool, oid, index)
        self._pages += 1
        self._zbytes += zsize
        self._cumul_pages += 1
        self._cumul_zbytes += zsize
        return handle

    def get(self, pampd: int, oid: int, index: int, out: memoryview) -> None:
        """Write the page into `out` and mark its run as used.

        Raises:
            CorruptedPageError: header, data or checksum are not those of that page (counted).
        """
        if self.read(pampd, oid, index, out) == RAW:
            raise self.corruption(oid, index, "its codec is never used for ephemeral pages")
        self.allocator.touch(pampd)
        self._loads += 1

    def free(self, pampd: int) -> None:
        """Free a page.

        Raises:
            InvariantError: there is no page at the pampd.
        """
        weight = self.weigh(pampd)
        if weight == NO_PAGE:
            raise InvariantError(f"pampd {pampd:#x} is freed but no page is kept there")
        self.allocator.free(pampd)
        self._pages -= 1
        if weight >= 0:
            self._zbytes -= weight >> 8 & 0xFFFF
        else:
            self._damaged += 1

    # Off the page path.

    def oldest_run(self) -> int:
        """Return the first frame of the least recently used run, or 0 if no page is kept."""
        return self.allocator.oldest_run()

    def evict(self, first: int, forget: Callable[[int, int, int, int], bool]) -> int:
        """Evict all pages of the run that begins at a frame.

        Args:
            first: first frame of a run of this allocator.
            forget: called with (pool, oid, index, pampd) of each page. It removes the page from the
                index if the index has that pampd, and returns whether it did.

        Returns:
            The number of frames freed, or 0 if the run could not be emptied.
        """
        allocator = self.allocator
        gone: list[int] = []
        handles = allocator.objects_of(first)
        for handle in handles:
            oid, index, length, pool = _unpack_key(self._memory, handle)
            if forget(pool, oid, index, handle):
                gone.append(handle)
                if length <= self._max_data:
                    self._zbytes -= length
                else:
                    self._damaged += 1
        self._pages -= len(gone)
        self._evicted_pages += len(gone)
        if not gone or len(gone) < len(handles):
            for handle in gone:
                allocator.free(handle)
            self._failed_evictions += 1
            allocator.touch(first * self._page_size)
            return 0
        before = self.frames.ephemeral_frames
        allocator.free_run(first)
        freed = before - self.frames.ephemeral_frames
        self._evicted_frames += freed
        if len(gone) == 1:
            self._evicted_unbuddied += 1
        else:
            self._evicted_buddied += 1
        return freed

    def statistics(self) -> ZbudsStatistics:
        """Return a frozen snapshot."""
        return ZbudsStatistics(
            zbud_curr_zpages=self._pages,
            zbud_curr_zbytes=self._zbytes,
            zbud_cumul_zpages=self._cumul_pages,
            zbud_cumul_zbytes=self._cumul_zbytes,
            loads=self._loads,
            compress_poor=self._poor,
            failed_get_free_pages=self._failed,
            evicted_zpages=self._evicted_pages,
            evicted_raw_pages=self._evicted_frames,
            evicted_unbuddied_pages=self._evicted_unbuddied,
            evicted_buddied_pages=self._evicted_buddied,
            failed_evictions=self._failed_evictions,
            corrupted=self._corrupted,
            damaged_pages=self._damaged,
        )

    def check(self, pampds: Iterable[int]) -> None:
        """Verify that the counts here match the pages that an index names.

        After damage, only the number of pages is compared.

        Args:
            pampds: those of all kept pages, in any order.

        Raises:
            InvariantError: a count is wrong.
        """
        pages = zbytes = 0
        for pampd in pampds:
            _check, generation, _oid, _index, length, _codec, _pool = _unpack_header(
                self._memory, pampd
            )
            if not generation:
                raise InvariantError(f"the index names pampd {pampd:#x}, where no page is kept")
            pages += 1
            zbytes += length
        if pages != self._pages or (not self._damaged and zbytes != self._zbytes):
            raise InvariantError(
                f"zbuds counts {self._pages} pages, {self._zbytes} bytes; its index names {pages},"
                f" {zbytes}"
            )
