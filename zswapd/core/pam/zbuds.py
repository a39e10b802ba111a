# SPDX-License-Identifier: GPL-2.0-or-later
"""zbuds: ephemeral pages, compressed.

Which may go at any time and of which the least recently used do first.

A page that would leave its frame to itself is refused: keeping it costs as much as the kernel's
page cache would pay for it. So there are no bodies here.

What goes, goes by runs of frames (a frame of zbud with its one or two pages, a zspage with all of
its), since frames are what somebody wants. Eviction is driven from the side, through tmem: `evict`
names the pages of a run to its caller, who has tmem forget them, and gives the run back in one
piece. It names only what the headers say; a header that is damaged may say anything, hence the
caller also gets the pampd, to compare it with what the index has there. A run that cannot be
emptied for that reason is counted and comes last again. The data is not looked at: it would have to
come from memory, and nobody is going to read it.

None of it outlives the process: to a successor, ephemeral runs are free frames.

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
"""Of a header: oid, index, length, pool."""


@dataclass(frozen=True, slots=True)
class ZbudsStatistics:
    """What is kept and what had to go, by zcache's names whatever the allocator is.

    Attributes:
        zbud_curr_zpages, zbud_curr_zbytes: pages kept now, and their data without headers in bytes.
        zbud_cumul_zpages, zbud_cumul_zbytes: the same of all pages ever taken.
        loads: pages given out.
        compress_poor: pages refused because they would leave no room in their frame.
        failed_get_free_pages: pages refused because no frame was free.
        evicted_zpages: pages that had to go so that their frames could be used for something else.
        evicted_raw_pages: frames that were set free so.
        evicted_unbuddied_pages, evicted_buddied_pages: runs of frames among them with one page, and
            with more.
        failed_evictions: runs that could not be emptied, since one of their headers was damaged.
        corrupted: gets that failed their check.
        damaged_pages: pages that were damaged when they were let go; zbud_curr_zbytes keeps their
            length, which nobody knows.
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
    """Ephemeral pages in one allocator, which keeps an order of use (see ZPages for the arguments)."""

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

        No limits: room is made before.
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
        """Write the page into `out`, which is a use of its run.

        Raises:
            CorruptedPageError: header, data or checksum are not those of that page (counted).
        """
        if self.read(pampd, oid, index, out) == RAW:
            raise self.corruption(oid, index, "its codec is one that is not used here")
        self.allocator.touch(pampd)
        self._loads += 1

    def free(self, pampd: int) -> None:
        """Let go of a page.

        Raises:
            InvariantError: the pampd is not that of a page.
        """
        weight = self.weigh(pampd)
        if weight == NO_PAGE:
            raise InvariantError(f"pampd {pampd:#x} is freed but no page is kept there")
        self.allocator.free(pampd)
        self._pages -= 1
        if weight >= 0:
            self._zbytes -= weight >> 8
        else:
            self._damaged += 1

    # From the side.

    def oldest_run(self) -> int:
        """Return the first frame of the run not used for longest; 0 if nothing is kept."""
        return self.allocator.oldest_run()

    def evict(self, first: int, forget: Callable[[int, int, int, int], bool]) -> int:
        """Let go of all pages of the run that begins at a frame.

        Return the frames set free, 0 if it could not be emptied.

        Args:
            first: of one of our runs.
            forget: called with (pool, oid, index, pampd) of each page; has the index forget it if
                it names just the pampd, and says whether it did.
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
        """Prove that the pages an index names are those that are counted here.

        After damage, only how many there are.

        Args:
            pampds: of all pages kept, in any order.

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
