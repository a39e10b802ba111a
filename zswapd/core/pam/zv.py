# SPDX-License-Identifier: GPL-2.0-or-later
"""zv: persistent pages, compressed, each behind a header in an allocator's object.

What becomes of a page:

- one machine word repeated (same-filled): header and that word, 32 bytes in all;
- compressible: header and the compressed bytes;
- poor, i.e. longer than zv_max_zsize, or longer than zv_max_mean_zsize while the pool's mean is: kept or refused, as
  `keep_poor` says;
- raw: compressed, it would need a frame of its own all the same. It is then kept as it is, which spares the decompression, and
  the object holds the frame's handle: so no page ever takes more than a page and 32 bytes. No header and no user's bytes ever
  share a frame in the wrong way: whatever a raw page holds, nobody looks for headers in it.

zcache refused poor pages, having a disk behind it. A pool without one keeps them by default (as zram does): a swap device that
refuses gives the kernel nothing but a page it must try to write again.

zpages.py writes and reads objects; zvpages.py has the books, what a successor does, and the counters.

The mean is of `zsize`, compressed bytes without headers.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from zswapd.core import crashpoints
from zswapd.core.compress.base import RAW, SAME_FILLED
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import HEADER, HEADER_BYTES, NO_NEED, NO_ROOM, RejectReason
from zswapd.core.pam.zpages import NO_PAGE
from zswapd.core.pam.zvpages import BODY_CHECK, BODY_MASK, DIST_CHUNK, ZvPages
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor

_Q: Final = struct.Struct("=Q")
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
LEAST_GAIN: Final = 16
"""Bytes: a step of zsmalloc's size classes for 4 KiB pages."""
EVICTIONS_PER_STORE: Final = 64
"""Evictions of the cache that one store asks for, at most. Each frees several frames, side by side
where the neighbours of the oldest run are ephemeral too."""


def _nothing() -> bool:
    """Free nothing."""
    return False


class Zv(ZvPages):
    """Persistent pages in one allocator.

    Args:
        allocator: where objects live.
        frames: whose use the limits bound.
        compressor: for new pages.
        compressors: by codec number, for pages already there.
        total_frames: frames of memory the system has, for zv_page_count_policy_percent.
        keep_poor: keep pages that compress poorly instead of refusing them.
        checksum: have checksums cover the data of compressed and raw pages too.

    Attributes:
        compressor, checksum, keep_poor: as above; settable at any time, for pages to come.
        max_zsize: zv_max_zsize in bytes; 7/8 of a page by default.
        max_mean_zsize: zv_max_mean_zsize in bytes; 5/8 of a page by default.
        limit_frames: pool.limit in frames.
        accept_frames: once a limit was hit, pages are taken again when it holds no more than this; by default at once.
        policy_percent: zv_page_count_policy_percent.
        evict_cache: called when no frame is free; it evicts pages of the cache and returns whether that
            set frames free.
    """

    def __init__(
        self,
        allocator: Allocator,
        frames: PageFrames,
        compressor: Compressor,
        compressors: Mapping[int, Compressor],
        *,
        total_frames: int,
        keep_poor: bool = True,
        checksum: bool = True,
    ) -> None:
        super().__init__(allocator, frames, compressor, compressors, checksum=checksum)
        self._total_frames = total_frames
        self.evict_cache: Callable[[], bool] = _nothing
        self.keep_poor = keep_poor
        self.max_zsize = frames.page_size // 8 * 7
        self.max_mean_zsize = frames.page_size // 8 * 5
        self.limit_frames = frames.limit_frames
        self.accept_frames = 1 << 62
        self._is_full = False
        self.policy_percent = 75
        self._page = memoryview(bytearray(frames.page_size))

    @property
    def policy_percent(self) -> int:
        """zv_page_count_policy_percent: share of the system's memory that the pool may hold."""
        return self._policy_percent

    @policy_percent.setter
    def policy_percent(self, percent: int) -> None:
        self._policy_percent = percent
        self._policy_frames = self._total_frames * percent // 100

    # The page path.

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page; return its pampd, or the negated RejectReason (see base.Pam)."""
        if not replacing:
            # The other half's frames are not swap's to count.
            used = self._frames.used_frames - self._frames.ephemeral_frames
            if used >= self.limit_frames or (self._is_full and used > self.accept_frames):
                self._is_full = True
                self._limit_hit += 1
                return -RejectReason.POOL_LIMIT_HIT
            self._is_full = used >= self._policy_frames
            if self._is_full:
                self._percent_exceeded += 1
                return -RejectReason.POLICY_PERCENT_EXCEEDED
        packed = self.pack(page)
        codec, zsize = packed & 0xFF, packed >> 8
        if codec != SAME_FILLED:
            if zsize > self.max_mean_zsize or zsize > self.max_zsize:
                refused = self._admit(zsize)
                if refused:
                    return refused
            if zsize > self._max_data:
                return self._create_raw(pool, oid, index, page)
        handle = self._alloc(HEADER_BYTES + zsize) or self._alloc_after_eviction(HEADER_BYTES + zsize)
        if not handle:
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self.write_packed(handle, pool, oid, index)
        self._count(codec, zsize, zsize)
        return handle

    def _alloc_after_eviction(self, size: int) -> int:
        """Have frames of the other half freed for an object; return its handle, or 0 if there are none."""
        for _ in range(EVICTIONS_PER_STORE):
            if not self.evict_cache():
                break
            handle: int = self._alloc(size)
            if handle:
                return handle
        return 0

    def _admit(self, zsize: int) -> int:
        """Count a poor page; return 0 to keep it or the negated reason to refuse it."""
        if zsize > self.max_zsize:
            self._poor += 1
            reason = RejectReason.COMPRESS_POOR
        elif self._pages and self._zbytes > self.max_mean_zsize * self._pages:
            self._mean_poor += 1
            reason = RejectReason.MEAN_COMPRESS_POOR
        else:
            return 0
        if self.keep_poor:
            self._stored_poor += 1
            return 0
        return -reason

    def _create_raw(self, pool: int, oid: int, index: int, page: memoryview) -> int:
        """Keep a page as it is in a frame of its own, and its header with the frame's handle in an object beside it."""
        body = self._alloc(self._page_size) or self._alloc_after_eviction(self._page_size)
        reach(crashpoints.STORE_BODY)
        handle = self._alloc(HEADER_BYTES + 8) or self._alloc_after_eviction(HEADER_BYTES + 8) if body else 0
        if not handle:
            if body:
                self._allocator.free(body)
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self._memory[body : body + self._page_size] = page
        reach(crashpoints.STORE_BODY_WRITTEN)
        # The checksum of the header's object does not reach the body, so the body's own goes with the handle: 40 bits are
        # enough to address 1 TiB. 0 is for none.
        check = _digest(page) & BODY_CHECK or 1 if self.checksum else 0
        self.write(handle, pool, oid, index, RAW, _Q.pack(check << 40 | body))
        self._count(RAW, 8, self._page_size)
        return handle

    def _count(self, codec: int, length: int, zsize: int) -> None:
        self._stores += 1
        self._pages += 1
        if self._pages > self._pages_max:
            self._pages_max = self._pages
        self._zbytes += zsize
        column = (HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK if codec != RAW else -1
        self._curr_dist[column] += 1
        self._cumul_dist[column] += 1
        if codec <= RAW:
            if codec == RAW:
                self._raw += 1
            else:
                self._same_filled += 1

    def get(self, pampd: int, oid: int, index: int, out: memoryview) -> None:
        """Write the page into `out`.

        Raises:
            CorruptedPageError: header, data or checksum are not those of that page (counted).
        """
        if self.read(pampd, oid, index, out) == RAW:
            (word,) = _Q.unpack_from(self._memory, pampd + HEADER_BYTES)
            body = word & BODY_MASK
            out[:] = self._memory[body : body + self._page_size]
            if word >> 40 and word >> 40 != (_digest(out) & BODY_CHECK or 1):
                raise self.corruption(oid, index, "its checksum is wrong")
        reach(crashpoints.PAGE_LOADED)
        self._loads += 1

    def free(self, pampd: int) -> None:
        """Let go of a page.

        Raises:
            InvariantError: the pampd is not that of a page.
        """
        weight = self.weigh(pampd)
        codec, length = weight & 0xFF, weight >> 8
        if weight == NO_PAGE:
            raise InvariantError(f"pampd {pampd:#x} is freed but no page is kept there")
        self._pages -= 1
        if weight < 0:
            # Nothing in a damaged header may be believed: a length or a handle could be another page's.
            self._damaged += 1
        elif codec == RAW:
            (word,) = _Q.unpack_from(self._memory, pampd + HEADER_BYTES)
            # First what names the body: a header without one would be taken for damage by a successor.
            self._allocator.free(pampd)
            reach(crashpoints.FREE_HEADER)
            self._allocator.free(word & BODY_MASK)
            self._raw -= 1
            self._zbytes -= self._page_size
            self._curr_dist[-1] -= 1
            return
        else:
            self._same_filled -= codec == SAME_FILLED
            self._zbytes -= length
            self._curr_dist[(HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] -= 1
        self._allocator.free(pampd)

    # Off the page path.

    def rewrite(self, pampd: int, compressor: Compressor, gain_percent: int) -> int:
        """Make a copy of a page with another codec, if that is worthwhile (see base.RewritingPam).

        The copy is as alive as its original: a successor that finds both takes the copy, whose generation is the later one.
        """
        _check, _generation, oid, index, length, codec, pool = _unpack_header(self._memory, pampd)
        if codec in {SAME_FILLED, compressor.codec}:
            return NO_NEED
        self.get(pampd, oid, index, self._page)
        self._loads -= 1  # nobody has asked for it
        data = compressor.compress(self._page)
        zsize = self._page_size if codec == RAW else length
        if len(data) > self._max_data or zsize - len(data) < max(zsize * gain_percent // 100, LEAST_GAIN):
            return 0
        handle = self._alloc(HEADER_BYTES + len(data))
        if not handle:
            return NO_ROOM
        self.write(handle, pool, oid, index, compressor.codec, data)
        self._enter(compressor.codec, len(data), 1)
        self._recompressed += 1
        self._recompress_saved += zsize - len(data)
        return handle
