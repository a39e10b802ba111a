# SPDX-License-Identifier: GPL-2.0-or-later
"""The books of zv: what is kept, how that is counted, and how a successor finds it again.

`adopt` walks the objects of an adopted allocator and offers each page to the index. What it may find after a death, and what it
makes of it:

- two objects for one page: a store that died between making the new copy live and freeing the old
  one, or a compaction at the same place. Either may stay, since the store was not answered; the
  later generation does, if its body is whole;
- a body that no header names: a store or a free of a page that does not compress, cut short. It is
  freed;
- in an arena of an older layout, one object with a checksum and no generation: a store that was cut
  short between its last two words (*torn*). It is freed. Objects without a checksum get one there.

Anything else that makes no sense (a wrong checksum, a length beyond the object, a codec or a page
that do not exist) is not what a death leaves, since the live word comes last: the memory is
*damaged*. Such an object is never believed. It may have been any page, so the caller has to see to
it that no missing page is taken for zeros, before `end_adoption` frees what was dropped.

The checksum of every object is verified, which takes 0.2 us a page. The index is made of headers,
and a wrong one would cost its own page, which would be missing, and the page whose place it took.
Bodies are not read: no page is found by what is in one, its checksum stands in the header's object,
and each reader verifies it. Reading them would cost a pass over all that does not compress, and
change nothing but the time at which a damaged one is noticed. Only of two copies of a page are they
read.

Every step is harmless if it is the last one: the arena changes only in `end_adoption`, by frees; an
older one also by checksums for objects that have none.

Generations are serial numbers, compared by their distance (RFC 1982). A page that is older than half their range could win
against its successor; as said, that is allowed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.allocators.frametable import HIGH_SHIFT, LOW_SHIFT
from zswapd.core.compress.base import LZ4, RAW, SAME_FILLED
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import HEADER, HEADER_BYTES
from zswapd.core.pam.zpages import CHECK_MASK, ZPages
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor
    from zswapd.core.pam.base import Adopter

_Q: Final = struct.Struct("=Q")
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
DIST_CHUNK: Final = 64
"""Width in bytes of a column of the two distributions, as in zcache (a 64th of its page)."""


BODY_MASK: Final = (1 << 40) - 1
"""Of the word that a raw page's object holds: the body's handle. The 24 bits above are the body's checksum."""
BODY_CHECK: Final = (1 << 24) - 1
"""What that checksum has of the whole one; it is never 0."""
_SOME: Final = 0xFFF
"""Objects that are freed between two signs of life, less one."""
_HALF: Final = 1 << 31
_CODEC_AT: Final = 22
"""Place of the codec in the header."""


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
        recompressed, recompress_saved_bytes: pages kept with a stronger codec later, and what that saved of their data.
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
    recompressed: int
    recompress_saved_bytes: int
    curr_dist_counts: tuple[int, ...]
    cumul_dist_counts: tuple[int, ...]


counters.declare(
    ZvStatistics,
    cumulative=(
        "stores loads compress_poor mean_compress_poor stored_poor pool_limit_hit policy_percent_exceeded "
        "failed_alloc corrupted damaged_pages recompressed recompress_saved_bytes cumul_dist_counts"
    ),
    high_water="curr_pages_max",
)


@dataclass(slots=True)
class Findings:
    """What `adopt` came upon beside whole pages.

    Attributes:
        torn: stores that were cut short.
        duplicates: pages found twice.
        damaged: objects that no death leaves.
        dropped: handles of the objects that are to be freed.
    """

    torn: int = 0
    duplicates: int = 0
    damaged: int = 0
    dropped: list[int] = field(default_factory=list)


class ZvPages(ZPages):
    """What zv keeps; Zv adds the ways in and out."""

    def __init__(
        self,
        allocator: Allocator,
        frames: PageFrames,
        compressor: Compressor,
        compressors: Mapping[int, Compressor],
        *,
        checksum: bool,
    ) -> None:
        super().__init__(allocator, frames, compressor, compressors, checksum=checksum)
        self._pages = self._pages_max = self._zbytes = self._same_filled = self._raw = 0
        self._stores = self._loads = self._poor = self._mean_poor = self._stored_poor = 0
        self._limit_hit = self._percent_exceeded = self._failed_alloc = self._damaged = 0
        self._recompressed = self._recompress_saved = 0
        self._curr_dist = [0] * (frames.page_size // DIST_CHUNK + 2)
        self._cumul_dist = list(self._curr_dist)

    # A successor's beginning.

    def adopt(self, index: Adopter) -> Findings:
        """Offer every page of an adopted allocator to an index, and count those it takes.

        Raises:
            ArenaError: no memory for the index.
        """
        self._index = index
        self._findings = Findings()
        self._allocator.each_span(self._found_span)
        self._pages_max = self._pages
        return self._findings

    def end_adoption(self, findings: Findings) -> int:
        """Free what `adopt` dropped, and bodies that nobody names; return the number of these."""
        for number, handle in enumerate(findings.dropped):
            self._allocator.free(handle)
            reach(crashpoints.TAKEOVER_DROPPED)
            if not number & _SOME:
                self._frames.alive()
        findings.dropped = []
        return self._allocator.free_unclaimed()

    def _found_span(self, handle: int, size: int, count: int) -> None:
        """Take in `count` objects in a row, each `size` bytes long, or put them with those that are dropped."""
        for place, generation, oid, index, length, codec, pool in self.survey(handle, size, count):
            if generation and (codec <= LZ4 or codec in self._compressors):
                self._found_page(place, generation, oid, index, length, codec, pool)
            else:
                self._found_damaged(place, size)

    def _found_page(self, handle: int, generation: int, oid: int, index: int, length: int, codec: int, pool: int) -> None:
        """Take in the page at a handle, or put it with those that are dropped."""
        if codec == RAW and not self._allocator.claim(self._body(handle)):
            self._drop_second_header(handle, self._index.find_page(pool, oid, index))
            return
        other = self._index.adopt_page(pool, oid, index, handle)
        reach(crashpoints.TAKEOVER_PAGE)
        if not other:
            self._keep(generation, codec, length)
        elif other > 0:
            self._settle(handle, other)
        else:
            self._drop(handle, disclaim=True)

    def _found_damaged(self, handle: int, size: int) -> None:
        """Put an object with those that are dropped, unless it is of a layout before 5, without a checksum.

        Such a page gets a checksum.
        """
        check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, handle)
        if not self._is_of_older_layout(handle, check, generation):
            self._drop(handle, disclaim=False)
        elif generation:
            fits = 0 < length <= size - HEADER_BYTES
            if (length == 8) if codec <= RAW else (fits and codec in self._compressors):
                self._sign(handle, generation, length, codec)
                self._found_page(handle, generation, oid, index, length, codec, pool)
            else:
                self._drop(handle, disclaim=False)

    def _is_of_older_layout(self, handle: int, check: int, generation: int) -> bool:
        """Say whether an object that does not match its checksum is one that layouts before 5 have.

        That is one without a checksum; or the one whose store was cut short before its generation,
        which is put with those that are dropped.
        """
        if not self._frames.arena.is_older or bool(check) == bool(generation):
            return False
        if not generation:
            self._findings.torn += 1
            if self._findings.torn > 1:  # one process, one store
                return False
            self._findings.dropped.append(handle)
        return True

    def _sign(self, handle: int, generation: int, length: int, codec: int) -> None:
        """Give an object of an older layout the checksum that it would have been stored with."""
        check = self.check_of(handle, generation, length if codec <= RAW else 0)
        self._words64[handle >> 3] = check << LOW_SHIFT | generation << HIGH_SHIFT

    def _keep(self, generation: int, codec: int, length: int) -> None:
        self._enter(codec, length, 1)
        if not self._generation or (generation - self._generation) & CHECK_MASK < _HALF:
            self._generation = generation

    def _drop(self, handle: int, *, disclaim: bool) -> None:
        """Let a damaged object go."""
        self._findings.damaged += 1
        self._findings.dropped.append(handle)
        if disclaim:
            self._disclaim(handle)

    def _drop_second_header(self, handle: int, other: int) -> None:
        """Let a raw page's header go whose body is claimed, or no body.

        Where compaction died with two headers of one page, they are the same to the last byte, and `other` is the first.
        """
        size = HEADER_BYTES + 8
        self._findings.dropped.append(handle)
        if other > 0 and self._memory[other : other + size] == self._memory[handle : handle + size]:
            self._findings.duplicates += 1
        else:
            self._findings.damaged += 1

    def _settle(self, handle: int, other: int) -> None:
        """Decide between two copies of a page, the second of which the index has."""
        _check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, handle)
        _check, its_generation, _oid, _index, its_length, its_codec, _pool = _unpack_header(self._memory, other)
        self._findings.duplicates += 1
        loser = handle
        if not self._body_is_whole(handle):
            self._findings.damaged += 1
        elif not self._body_is_whole(other):
            self._findings.damaged += 1
            loser = other
        elif 0 < (generation - its_generation) & CHECK_MASK < _HALF:
            loser = other
        if loser == other:
            self._index.replace_page(pool, oid, index, other, handle)
            self._enter(its_codec, its_length, -1)
            self._keep(generation, codec, length)
        self._disclaim(loser)
        self._findings.dropped.append(loser)
        reach(crashpoints.TAKEOVER_DUPLICATE)

    def _body(self, handle: int) -> int:
        """Return the handle of a raw page's body."""
        word: int = _Q.unpack_from(self._memory, handle + HEADER_BYTES)[0]
        return word & BODY_MASK

    def _disclaim(self, handle: int) -> None:
        if self._memory[handle + _CODEC_AT] == RAW:
            self._allocator.disclaim(self._body(handle))

    def _body_is_whole(self, handle: int) -> bool:
        """Say whether the body of a page matches its checksum, if it has both."""
        (word,) = _Q.unpack_from(self._memory, handle + HEADER_BYTES)
        if self._memory[handle + _CODEC_AT] != RAW or not word >> 40:
            return True
        body = word & BODY_MASK
        return bool(word >> 40 == (_digest(self._memory[body : body + self._page_size]) & BODY_CHECK or 1))

    def _enter(self, codec: int, length: int, sign: int) -> None:
        """Count a page that is kept already (1), or take it off the books again (-1)."""
        self._pages += sign
        if codec == RAW:
            self._raw += sign
            self._zbytes += sign * self._page_size
            self._curr_dist[-1] += sign
            return
        self._same_filled += sign * (codec == SAME_FILLED)
        self._zbytes += sign * length
        self._curr_dist[(HEADER_BYTES + length + DIST_CHUNK - 1) // DIST_CHUNK] += sign

    # What there is.

    @property
    def raw_pages(self) -> int:
        """Pages that are kept as they are."""
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
