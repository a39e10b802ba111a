# SPDX-License-Identifier: GPL-2.0-or-later
"""zv: the back end of persistent pages, compressed, each behind a header in an object.

A page is kept in one of these forms:

- same-filled: one machine word repeated. The object has the header and that word, 32 bytes in all.
- compressed: the object has the header and the compressed bytes.
- raw: the compressed page would need a frame of its own. The page is kept uncompressed in a frame,
  the *body*, which also spares the decompression. The object has the header and the handle of the
  body. So a page takes at most one page and 32 bytes. A header never shares a frame with the bytes
  of a raw page. So no reader and no successor looks for headers in a body, whatever its bytes
  imitate.

A page is poor if it is longer than zv_max_zsize. It is also poor if both it and the mean of the
pool are longer than zv_max_mean_zsize. `keep_poor` says whether a poor page is kept or refused. The
mean is that of `zsize`, the compressed bytes without headers.

zcache had a disk behind it and refused poor pages. A pool without a disk keeps them by default, as
zram does. After a refusal the kernel still has the page, must try to write it again, and has gained
nothing.

zpages.py writes and reads objects. recovery.py finds them again in a successor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.compress.base import RAW, SAME_FILLED
from zswapd.core.crashpoints import reach
from zswapd.core.pam.accounts import Accounts
from zswapd.core.pam.base import (
    CLIENT_MASK,
    CLIENT_SHIFT,
    HEADER,
    HEADER_BYTES,
    MAX_CLIENTS,
    NO_NEED,
    NO_ROOM,
    RejectReason,
)
from zswapd.core.pam.zpages import CHECK_MASK, GENERATION_HALF, NO_PAGE, ZPages
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor

_Q: Final = struct.Struct("=Q")
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
DIST_CHUNK: Final = 64
"""Width of a column of the two distributions, in bytes. As in zcache, it is a 64th of a 4 KiB page.
"""
BODY_MASK: Final = (1 << 40) - 1
"""The low 40 bits of the word in a raw page's object: the handle of the body.

The upper 24 bits are the checksum of the body.
"""
RAW_BYTES: Final = HEADER_BYTES + 8
"""Bytes of a raw page's object, beside its body."""
BODY_CHECK: Final = (1 << 24) - 1
"""The bits of a whole checksum that a body's checksum keeps. It is never 0."""
LEAST_GAIN: Final = 16
"""The least saving of a recompression, in bytes: one step of zsmalloc's size classes for 4 KiB
pages.
"""
EVICTIONS_PER_STORE: Final = 64
"""The largest number of cache evictions that one store asks for.

Each frees several adjacent frames where the neighbours of the oldest run are ephemeral too.
"""


def _object_bytes(codec: int, length: int, page_size: int) -> int:
    """Return the bytes of a page's object with its header, and of its body."""
    return RAW_BYTES + page_size if codec == RAW else HEADER_BYTES + length


def _nothing() -> bool:
    """Evict nothing."""
    return False


@dataclass(frozen=True, slots=True)
class ZvStatistics:
    """Counts of kept and refused pages, and the distribution of sizes.

    Attributes:
        curr_pages: pages kept now (zswap's stored_pages).
        curr_pages_max: the largest value of curr_pages.
        curr_zbytes: bytes of their data without headers (zram's compr_data_size).
        curr_object_bytes: bytes of their data with headers, as asked of the allocator.
        curr_same_filled: same-filled pages among them.
        curr_incompressible: raw pages among them (zram's huge_pages).
        stores: pages stored.
        loads: pages loaded.
        compress_poor, mean_compress_poor: pages that policy found poor, kept or not.
        stored_poor: poor pages that were kept.
        pool_limit_hit, policy_percent_exceeded, failed_alloc: pages refused, by reason.
        corrupted: loads of damaged pages.
        recompressed, recompress_saved_bytes: pages recompressed with a stronger codec, and the
            bytes of data that this saved.
        damaged_pages: pages that were damaged when they were freed. Their length and codec are
            unknown. So the counts of bytes and kinds still include them, and the body of a raw page
            is not freed.
        curr_dist_counts, cumul_dist_counts: objects by size with header, in units of 64 bytes,
            rounded up. Raw pages are in the last column (zv_curr_dist_counts,
            zv_cumul_dist_counts).
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
    recompressed: int
    recompress_saved_bytes: int
    curr_dist_counts: tuple[int, ...]
    cumul_dist_counts: tuple[int, ...]


counters.declare(
    ZvStatistics,
    cumulative=(
        "stores loads compress_poor mean_compress_poor stored_poor pool_limit_hit"
        " policy_percent_exceeded failed_alloc corrupted damaged_pages recompressed"
        " recompress_saved_bytes cumul_dist_counts"
    ),
    high_water="curr_pages_max",
)


class Zv(ZPages):
    """The back end of persistent pages in one allocator.

    Args:
        allocator: provides the objects.
        frames: the frames that the limits count.
        compressor: codec for new pages.
        compressors: codecs for pages already stored, by codec number.
        total_frames: memory of the system in frames, for zv_page_count_policy_percent.
        keep_poor: keep poor pages instead of refusing them.
        checksum: checksums cover the data of compressed and raw pages too.

    Attributes:
        accounts: what each client keeps, and may keep.
        compressor, checksum, keep_poor: as above. They can be set at any time, for later stores.
        takes_poor: the pool keeps a poor page if it has no other place, whatever `keep_poor` is.
        max_zsize: zv_max_zsize in bytes, by default 7/8 of a page.
        max_mean_zsize: zv_max_mean_zsize in bytes, by default 5/8 of a page.
        limit_frames: pool.limit in frames.
        accept_frames: after a limit was hit, stores are refused until at most this number of frames
            is used. By default it has no effect.
        policy_percent: zv_page_count_policy_percent.
        evict_cache: called when no frame is free. It evicts pages of the cache and returns whether
            that freed frames.
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
        self._pages = self._pages_max = self._zbytes = self._same_filled = self._raw = 0
        self._stores = self._loads = self._poor = self._mean_poor = self._stored_poor = 0
        self._limit_hit = self._percent_exceeded = self._failed_alloc = self._damaged = 0
        self._recompressed = self._recompress_saved = 0
        self._curr_dist = [0] * (frames.page_size // DIST_CHUNK + 2)
        self._cumul_dist = list(self._curr_dist)
        self.accounts = Accounts()
        self._has_limits = False
        self._own_compressors: dict[int, Compressor] = {}
        self._total_frames = total_frames
        self.evict_cache: Callable[[], bool] = _nothing
        self.keep_poor = self.takes_poor = keep_poor
        self.max_zsize = frames.page_size // 8 * 7
        self.max_mean_zsize = frames.page_size // 8 * 5
        self.limit_frames = frames.limit_frames
        self.accept_frames = 1 << 62
        self._is_full = False
        self.policy_percent = 75
        self._page = memoryview(bytearray(frames.page_size))

    @property
    def policy_percent(self) -> int:
        """zv_page_count_policy_percent: the share of the system's memory that the pool may hold."""
        return self._policy_percent

    @policy_percent.setter
    def policy_percent(self, percent: int) -> None:
        self._policy_percent = percent
        self._policy_frames = self._total_frames * percent // 100

    # The page path.

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page; return its pampd, or the negated RejectReason (see base.Pam)."""
        if not replacing:
            refused = self._check_limits(oid)
            if refused:
                return refused
        packed = self._pack_as(oid, page) if self._own_compressors else self.pack(page)
        codec, zsize = packed & 0xFF, packed >> 8
        if codec != SAME_FILLED:
            if zsize > self.max_mean_zsize or zsize > self.max_zsize:
                refused = self._admit(zsize)
                if refused:
                    return refused
            if zsize > self._max_data:
                return self._create_raw(pool, oid, index, page)
        handle = self._alloc(HEADER_BYTES + zsize) or self._alloc_after_eviction(
            HEADER_BYTES + zsize
        )
        if not handle:
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self.write_packed(handle, pool, oid, index)
        self._count(codec, zsize, zsize)
        self.accounts.add(oid >> CLIENT_SHIFT & CLIENT_MASK, HEADER_BYTES + zsize)
        return handle

    def _check_limits(self, oid: int) -> int:
        """Count a page for which there is no room; return 0, or the negated reason."""
        # The limits do not count the ephemeral half's frames.
        used = self.frames.used_frames - self.frames.ephemeral_frames
        if used >= self.limit_frames or (self._is_full and used > self.accept_frames):
            self._is_full = True
            self._limit_hit += 1
            return -RejectReason.POOL_LIMIT_HIT
        self._is_full = used >= self._policy_frames
        if self._is_full:
            self._percent_exceeded += 1
            return -RejectReason.POLICY_PERCENT_EXCEEDED
        if self._has_limits and self.accounts.refuses(oid >> CLIENT_SHIFT & CLIENT_MASK):
            return -RejectReason.POOL_LIMIT_HIT
        return 0

    def has_room(self, frames: int) -> bool:
        """Return whether the pool can take pages for which it needs `frames` more frames.

        A pool that refuses poor pages may refuse any page.
        """
        if not self.takes_poor:
            return False
        used = self.frames.used_frames - self.frames.ephemeral_frames
        if self._is_full and used > self.accept_frames:
            return False
        return used + frames <= min(self.limit_frames, self._policy_frames)

    def _pack_as(self, oid: int, page: memoryview) -> int:
        """Compress a page with the codec of its client, which need not be the pool's."""
        own = self._own_compressors.get(oid >> CLIENT_SHIFT & CLIENT_MASK)
        if own is None:
            return self.pack(page)
        of_pool = self.compressor
        self.compressor = own
        try:
            return self.pack(page)
        finally:
            self.compressor = of_pool

    def _alloc_after_eviction(self, size: int) -> int:
        """Evict pages of the cache until an object can be allocated.

        Returns:
            The handle of the object, or 0 if the evictions free no frame for it.
        """
        for _ in range(EVICTIONS_PER_STORE):
            if not self.evict_cache():
                break
            handle: int = self._alloc(size)
            if handle:
                return handle
        return 0

    def _admit(self, zsize: int) -> int:
        """Count a page if it is poor; return 0 to keep it, or the negated reason to refuse it."""
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
        """Keep a page uncompressed in a frame of its own, with a header in a separate object."""
        body = self._alloc(self._page_size) or self._alloc_after_eviction(self._page_size)
        reach(crashpoints.STORE_BODY)
        handle = (
            self._alloc(HEADER_BYTES + 8) or self._alloc_after_eviction(HEADER_BYTES + 8)
            if body
            else 0
        )
        if not handle:
            if body:
                self.allocator.free(body)
            self._failed_alloc += 1
            return -RejectReason.FAILED_ALLOC
        self._memory[body : body + self._page_size] = page
        reach(crashpoints.STORE_BODY_WRITTEN)
        # The checksum in the header does not cover the body. So the body's own checksum is stored
        # beside the handle, which needs 40 bits for 1 TiB. 0 means no checksum.
        check = _digest(page) & BODY_CHECK or 1 if self.checksum else 0
        self.write(handle, pool, oid, index, RAW, _Q.pack(check << 40 | body))
        self._count(RAW, 8, self._page_size)
        self.accounts.add(oid >> CLIENT_SHIFT & CLIENT_MASK, RAW_BYTES + self._page_size)
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
        """Free a page.

        Raises:
            InvariantError: there is no page at the pampd.
        """
        weight = self.weigh(pampd)
        codec, length = weight & 0xFF, weight >> 8 & 0xFFFF
        if weight == NO_PAGE:
            raise InvariantError(f"pampd {pampd:#x} is freed but no page is kept there")
        self._pages -= 1
        if weight < 0:
            # A damaged header is not trusted: its length or handle may be that of another page.
            self._damaged += 1
        elif codec == RAW:
            (word,) = _Q.unpack_from(self._memory, pampd + HEADER_BYTES)
            # The header goes first. A successor takes a header without a body for damage.
            self.allocator.free(pampd)
            reach(crashpoints.FREE_HEADER)
            self.allocator.free(word & BODY_MASK)
            self._raw -= 1
            self._zbytes -= self._page_size
            self.accounts.add(weight >> 24, -(RAW_BYTES + self._page_size))
            self._curr_dist[-1] -= 1
            return
        else:
            self._same_filled -= codec == SAME_FILLED
            self._zbytes -= length
            self.accounts.add(weight >> 24, -(HEADER_BYTES + length))
            self._curr_dist[(HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] -= 1
        self.allocator.free(pampd)

    # Off the page path.

    def rewrite(self, pampd: int, compressor: Compressor, gain_percent: int) -> int:
        """Make a copy of a page with another codec, if that saves enough (see base.RewritingPam).

        The copy is as live as its original. A successor that finds both keeps the copy, because its
        generation is the later one.
        """
        _check, _generation, oid, index, length, codec, pool = _unpack_header(self._memory, pampd)
        if codec in {SAME_FILLED, compressor.codec}:
            return NO_NEED
        self.get(pampd, oid, index, self._page)
        self._loads -= 1  # a load without a reader
        data = compressor.compress(self._page)
        zsize = self._page_size if codec == RAW else length
        if len(data) > self._max_data or zsize - len(data) < max(
            zsize * gain_percent // 100, LEAST_GAIN
        ):
            return 0
        handle = self._alloc(HEADER_BYTES + len(data))
        if not handle:
            return NO_ROOM
        self.write(handle, pool, oid, index, compressor.codec, data)
        self._enter(oid, compressor.codec, len(data), 1)
        self._recompressed += 1
        self._recompress_saved += zsize - len(data)
        return handle

    # For recovery.py.

    def count_found(self, oid: int, generation: int, codec: int, length: int) -> None:
        """Count a page that recovery keeps; stores go on from the latest generation found."""
        self._enter(oid, codec, length, 1)
        if self._pages > self._pages_max:
            self._pages_max = self._pages
        if not self._generation or (generation - self._generation) & CHECK_MASK < GENERATION_HALF:
            self._generation = generation

    def uncount(self, oid: int, codec: int, length: int) -> None:
        """Remove a page from the counts because recovery keeps another copy of it."""
        self._enter(oid, codec, length, -1)

    def _enter(self, oid: int, codec: int, length: int, sign: int) -> None:
        """Add a page to the counts (`sign` 1) or remove it (-1), without counting a store."""
        self._pages += sign
        change = sign * _object_bytes(codec, length, self._page_size)
        self.accounts.add(oid >> CLIENT_SHIFT & CLIENT_MASK, change)
        if codec == RAW:
            self._raw += sign
            self._zbytes += sign * self._page_size
            self._curr_dist[-1] += sign
            return
        self._same_filled += sign * (codec == SAME_FILLED)
        self._zbytes += sign * length
        self._curr_dist[(HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] += sign

    # Clients.

    def set_client(
        self, client: int, limit_bytes: int, accept_percent: int, compressor: Compressor | None
    ) -> None:
        """Set what a client may keep; pages that it keeps already stay as they are.

        Args:
            client: its number.
            limit_bytes: its limit, or accounts.NO_LIMIT.
            accept_percent: see `Accounts.set_limit`.
            compressor: codec for its new pages; None for that of the pool.
        """
        self.accounts.set_limit(client, limit_bytes, accept_percent)
        self._has_limits = self.accounts.has_limits()
        if compressor is None:
            self._own_compressors.pop(client, None)
        else:
            self._own_compressors[client] = compressor

    # The books.

    def object_bytes(self, client: int) -> int:
        """Return the bytes that the objects of a client take, with headers."""
        return self.accounts.object_bytes(client)

    def limit_hits(self, client: int) -> int:
        """Return the number of pages that were refused because of a client's limit."""
        return self.accounts.limit_hits[client]

    @property
    def raw_pages(self) -> int:
        """The number of raw pages."""
        return self._raw

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
            recompressed=self._recompressed,
            recompress_saved_bytes=self._recompress_saved,
            curr_dist_counts=tuple(self._curr_dist),
            cumul_dist_counts=tuple(self._cumul_dist),
        )

    def check(self, pampds: Iterable[int]) -> None:
        """Verify that the counts here match the pages that an index names.

        After damage, only the number of pages is compared.

        Args:
            pampds: those of all kept pages, in any order.

        Raises:
            InvariantError: a count is wrong.
        """
        pages = zbytes = same_filled = raw = 0
        dist, clients = [0] * len(self._curr_dist), [0] * MAX_CLIENTS
        for pampd in pampds:
            _check, generation, oid, _index, length, codec, _pool = _unpack_header(
                self._memory, pampd
            )
            if not generation:
                raise InvariantError(f"the index names pampd {pampd:#x}, where no page is kept")
            pages += 1
            same_filled += codec == SAME_FILLED
            raw += codec == RAW
            zbytes += self._page_size if codec == RAW else length
            clients[oid >> CLIENT_SHIFT & CLIENT_MASK] += _object_bytes(
                codec, length, self._page_size
            )
            dist[
                -1 if codec == RAW else (HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK
            ] += 1
        found = (pages, zbytes, same_filled, raw, dist)
        counted = (self._pages, self._zbytes, self._same_filled, self._raw, self._curr_dist)
        if pages != self._pages or (not self._damaged and found != counted):
            raise InvariantError(
                f"zv counts {self._pages} pages, {self._zbytes} bytes; its index names {pages},"
                f" {zbytes}"
            )
        accounts = [self.accounts.object_bytes(client) for client in range(MAX_CLIENTS)]
        if not self._damaged and clients != accounts:
            raise InvariantError(f"the accounts are {accounts}, the pages {clients}")
