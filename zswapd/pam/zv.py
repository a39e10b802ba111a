# SPDX-License-Identifier: GPL-2.0-or-later
"""zv: persistent pages, compressed, each behind a header in an allocator's object.

What becomes of a page:

- one machine word repeated (same-filled): header and that word, 32 bytes in all;
- compressible: header and the compressed bytes;
- poor, i.e. longer than zv_max_zsize, or longer than zv_max_mean_zsize while the pool's mean is: kept or refused, as
  `keep_poor` says. A page that does not even fit behind its header is kept as it is in a frame of its own, and the object
  holds the frame's handle: so no page ever takes more than a page and 32 bytes.

zcache refused poor pages, having a disk behind it. A pool without one keeps them by default (as zram does): a swap device that
refuses gives the kernel nothing but a page it must try to write again.

Order of a store: data, then header, then checksum and word of life. A store cut short is therefore no live object, or one
whose checksum fails.

Counters count since the start unless they begin with `curr_`. The mean is of `zsize`, compressed bytes without headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from zswapd.compress.base import RAW, SAME_FILLED
from zswapd.errors import CorruptedPageError, InvariantError
from zswapd.pam.base import HEADER, HEADER_BYTES, PageKey, RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from zswapd.allocators.base import Allocator
    from zswapd.allocators.pageframes import PageFrames
    from zswapd.compress.base import Compressor

_I = struct.Struct("=I")
_Q = struct.Struct("=Q")
_LIFE = struct.Struct("=II")
_unpack_header = HEADER.unpack_from
_pack_header = HEADER.pack_into
_CHECK = 0xFFFFFFFF
DIST_CHUNK = 64
"""Width in bytes of a column of the two distributions, as in zcache (a 64th of its page)."""


@dataclass(frozen=True, slots=True)
class ZvStatistics:
    """What zv keeps, what it turned away, and how sizes are spread.

    Attributes:
        curr_pages: pages kept now (zswap's stored_pages).
        curr_pages_max: the most there ever were.
        curr_zbytes: their data without headers, in bytes (zram's compr_data_size).
        curr_object_bytes: the same with headers: what was asked of the allocator.
        curr_same_filled: same-filled pages among them.
        curr_incompressible: pages among them that are kept as they are (zram's huge_pages).
        stores: pages taken.
        loads: pages given out.
        compress_poor, mean_compress_poor: pages that policy found poor, kept or not.
        stored_poor: poor pages kept all the same.
        pool_limit_hit, policy_percent_exceeded, failed_alloc: pages refused, by reason.
        corrupted: loads that failed their check.
        damaged_pages: pages that were damaged when they were let go. Nobody knows what they had been, so the counts of bytes
            and of kinds keep them, and the body of a raw one is lost.
        curr_dist_counts, cumul_dist_counts: objects by size in units of 64 bytes, rounded up, header included; raw pages in the
            last column (zv_curr_dist_counts, zv_cumul_dist_counts).
    """

    curr_pages: int
    curr_pages_max: int
    curr_zbytes: int
    curr_object_bytes: int
    curr_same_filled: int
    curr_incompressible: int
    stores: int
    loads: int
    compress_poor: int
    mean_compress_poor: int
    stored_poor: int
    pool_limit_hit: int
    policy_percent_exceeded: int
    failed_alloc: int
    corrupted: int
    damaged_pages: int
    curr_dist_counts: tuple[int, ...]
    cumul_dist_counts: tuple[int, ...]


class Zv:
    """Persistent pages in one allocator.

    Args:
        allocator: where objects live.
        frames: whose use the limits bound.
        compressor: for new pages.
        compressors: by codec number, for pages already there.
        total_frames: frames of memory the system has, for zv_page_count_policy_percent.
        keep_poor: keep pages that compress poorly instead of refusing them.
        checksum: put a checksum into headers.

    Attributes:
        compressor, checksum, keep_poor: as above; settable at any time, for pages to come.
        max_zsize: zv_max_zsize in bytes; 7/8 of a page by default.
        max_mean_zsize: zv_max_mean_zsize in bytes; 5/8 of a page by default.
        limit_frames: pool.limit in frames.
        policy_percent: zv_page_count_policy_percent.
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
        self._allocator = allocator
        self._alloc = allocator.alloc
        self._memory = allocator.memory
        self._frames = frames
        self._page_size = frames.page_size
        self._max_data = allocator.max_size - HEADER_BYTES
        self._compressors = compressors
        self._total_frames = total_frames
        # First, middle and last word of a page in one call: pages that differ there, nearly all, cost 40 ns.
        half = frames.page_size // 2 - 8
        self._probe = struct.Struct(f"=Q{half - 8}xQ{half}xQ").unpack_from
        self._words_a_page = frames.page_size // 8
        self.compressor = compressor
        self.checksum = checksum
        self.keep_poor = keep_poor
        self.max_zsize = frames.page_size // 8 * 7
        self.max_mean_zsize = frames.page_size // 8 * 5
        self.limit_frames = frames.limit_frames
        self.policy_percent = 75
        self._generation = 0
        self._pages = self._pages_max = self._zbytes = self._same_filled = self._raw = 0
        self._stores = self._loads = self._poor = self._mean_poor = self._stored_poor = 0
        self._limit_hit = self._percent_exceeded = self._failed_alloc = self._corrupted = self._damaged = 0
        self._curr_dist = [0] * (frames.page_size // DIST_CHUNK + 2)
        self._cumul_dist = list(self._curr_dist)

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
            used = self._frames.used_frames
            if used >= self.limit_frames:
                self._limit_hit += 1
                return -RejectReason.POOL_LIMIT_HIT
            if used >= self._policy_frames:
                self._percent_exceeded += 1
                return -RejectReason.POLICY_PERCENT_EXCEEDED
        first, middle, last = self._probe(page)
        if first == middle == last and page.tobytes() == bytes(page[:8]) * self._words_a_page:
            data, codec = bytes(page[:8]), SAME_FILLED
        else:
            compressor = self.compressor
            data, codec = compressor.compress(page), compressor.codec
            zsize = len(data)
            if zsize > self.max_mean_zsize or zsize > self.max_zsize or zsize > self._max_data:
                refused = self._judge(zsize)
                if refused:
                    return refused
                if zsize > self._max_data:
                    return self._create_raw(pool, oid, index, page)
        handle = self._alloc(HEADER_BYTES + len(data))
        if not handle:
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self._write(handle, pool, oid, index, codec, data)
        self._count(codec, len(data), len(data))
        return handle

    def _judge(self, zsize: int) -> int:
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
        body = self._alloc(self._page_size)
        handle = self._alloc(HEADER_BYTES + 8) if body else 0
        if not handle:
            if body:
                self._allocator.free(body)
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self._memory[body : body + self._page_size] = page
        # The checksum of the header's object does not reach the body, so the body's own goes with the handle: 40 bits are
        # enough to address 1 TiB.
        check = xxh3_64_intdigest(page) & 0xFFFFFF if self.checksum else 0
        self._write(handle, pool, oid, index, RAW, _Q.pack(check << 40 | body))
        self._count(RAW, 8, self._page_size)
        return handle

    def _write(self, handle: int, pool: int, oid: int, index: int, codec: int, data: bytes) -> None:
        memory = self._memory
        length = len(data)
        end = handle + HEADER_BYTES + length
        self._generation = generation = self._generation % 0xFFFFFFFF + 1
        memory[handle + HEADER_BYTES : end] = data
        _pack_header(memory, handle, 0, 0, oid, index, length, codec, pool)
        # The checksum covers what follows the word of life; the generation is in it as the seed.
        check = (xxh3_64_intdigest(memory[handle + 8 : end], generation) & _CHECK or 1) if self.checksum else 0
        _LIFE.pack_into(memory, handle, check, generation)

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
        memory = self._memory
        check, generation, its_oid, its_index, length, codec, _pool = _unpack_header(memory, pampd)
        start = pampd + HEADER_BYTES
        if its_oid != oid or its_index != index or not generation:
            raise self._corruption(oid, index, "its header is not that of the page")
        if check and check != (xxh3_64_intdigest(memory[pampd + 8 : start + length], generation) & _CHECK or 1):
            raise self._corruption(oid, index, "its checksum is wrong")
        if codec > RAW:
            try:
                out[:] = self._compressors[codec].decompress(memory[start : start + length], self._page_size)
            except (CorruptedPageError, KeyError) as error:
                raise self._corruption(oid, index, f"{error} (codec {codec})") from error
        elif codec == SAME_FILLED:
            out[:] = bytes(memory[start : start + 8]) * self._words_a_page
        else:
            (word,) = _Q.unpack_from(memory, start)
            body = word & 0xFFFFFFFFFF
            out[:] = memory[body : body + self._page_size]
            if check and word >> 40 != xxh3_64_intdigest(out) & 0xFFFFFF:
                raise self._corruption(oid, index, "its checksum is wrong")
        self._loads += 1

    def _corruption(self, oid: int, index: int, why: str) -> CorruptedPageError:
        self._corrupted += 1
        return CorruptedPageError(
            f"stored page (object {oid:#x}, index {index}) is damaged: {why}",
            hint="only its reader is hurt; test the machine's memory",
        )

    def free(self, pampd: int) -> None:
        """Let go of a page.

        Raises:
            InvariantError: the pampd is not that of a page.
        """
        memory = self._memory
        check, generation, _oid, _index, length, codec, _pool = _unpack_header(memory, pampd)
        if not check and not generation:
            raise InvariantError(f"pampd {pampd:#x} is freed but no page is kept there")
        self._pages -= 1
        if check and check != (xxh3_64_intdigest(memory[pampd + 8 : pampd + HEADER_BYTES + length], generation) & _CHECK or 1):
            # Nothing in a damaged header may be believed: a length or a handle could be another page's.
            self._damaged += 1
        elif codec == RAW:
            (word,) = _Q.unpack_from(memory, pampd + HEADER_BYTES)
            self._allocator.free(word & 0xFFFFFFFFFF)
            self._raw -= 1
            self._zbytes -= self._page_size
            self._curr_dist[-1] -= 1
        else:
            self._same_filled -= codec == SAME_FILLED
            self._zbytes -= length
            self._curr_dist[(HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] -= 1
        self._allocator.free(pampd)

    def key_of(self, pampd: int) -> PageKey:
        """Return what the page's header says."""
        _check, generation, oid, index, _length, _codec, pool = _unpack_header(self._memory, pampd)
        return PageKey(pool, oid, index, generation)

    # Off the page path.

    def compact(self, moved: Callable[[int, int, int, int, int], None], max_moves: int = 1 << 62) -> int:
        """Pack pages together; `moved` gets (pool, oid, index, old pampd, new pampd). Returns the frames set free.

        Frames of raw pages never move: there is one of them a zspage.
        """

        def object_moved(old: int, new: int) -> None:
            _check, _generation, oid, index, _length, _codec, pool = _unpack_header(self._memory, new)
            moved(pool, oid, index, old, new)

        return self._allocator.compact(object_moved, max_moves)

    def statistics(self) -> ZvStatistics:
        """Return a frozen snapshot."""
        return ZvStatistics(
            curr_pages=self._pages,
            curr_pages_max=self._pages_max,
            curr_zbytes=self._zbytes,
            curr_object_bytes=self._zbytes + self._pages * HEADER_BYTES + self._raw * 8,
            curr_same_filled=self._same_filled,
            curr_incompressible=self._raw,
            stores=self._stores,
            loads=self._loads,
            compress_poor=self._poor,
            mean_compress_poor=self._mean_poor,
            stored_poor=self._stored_poor,
            pool_limit_hit=self._limit_hit,
            policy_percent_exceeded=self._percent_exceeded,
            failed_alloc=self._failed_alloc,
            corrupted=self._corrupted,
            damaged_pages=self._damaged,
            curr_dist_counts=tuple(self._curr_dist),
            cumul_dist_counts=tuple(self._cumul_dist),
        )

    def check(self, pampds: Iterable[int]) -> None:
        """Prove that the pages an index names are those that are counted here; after damage, only how many there are.

        Args:
            pampds: of all pages kept, in any order.

        Raises:
            InvariantError: a count is wrong.
        """
        pages = zbytes = same_filled = raw = 0
        dist = [0] * len(self._curr_dist)
        for pampd in pampds:
            _check, generation, _oid, _index, length, codec, _pool = _unpack_header(self._memory, pampd)
            if not generation:
                raise InvariantError(f"the index names pampd {pampd:#x}, where no page is kept")
            pages += 1
            same_filled += codec == SAME_FILLED
            raw += codec == RAW
            zbytes += self._page_size if codec == RAW else length
            dist[-1 if codec == RAW else (HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] += 1
        found = (pages, zbytes, same_filled, raw, dist)
        counted = (self._pages, self._zbytes, self._same_filled, self._raw, self._curr_dist)
        if pages != self._pages or (not self._damaged and found != counted):
            raise InvariantError(f"zv counts {self._pages} pages, {self._zbytes} bytes; its index names {pages}, {zbytes}")
