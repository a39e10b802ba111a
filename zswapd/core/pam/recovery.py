# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of zv's pages: a successor finds them again in the arena that a dead process left.

`recover` walks the objects of an adopted allocator and offers each page to the index.
`free_dropped` ends it. What a death leaves beside whole pages, and what recovery makes of it:

- two objects for one page: a store that died between making the new copy live and freeing the old
  one, or a compaction at the same place. Either may stay, since the store was not answered; the
  later generation does, if its body is whole;
- a body that no header names: a store or a free of a page that does not compress, cut short. It is
  freed;
- in an arena of an older layout, one object with a checksum and no generation: a store that was cut
  short between its last two words (*torn*). It is freed. Objects without a checksum get one there.

A death leaves nothing else, since the live word is written last. A wrong checksum, a length beyond
the object, a codec or a page that does not exist are memory that has changed: the object is
*damaged*. A damaged object is never believed. It may have been any page, so the caller must mark
every missing page as lost, not take it for zeros, before `free_dropped` frees the damaged objects.

The checksum of every object is verified, which takes 0.2 µs a page. The index is made of headers,
and a wrong one would cost its own page, which would be missing, and the page whose place it took.
Bodies are not read: no page is found by the contents of a body, the body's checksum stands in the
header's object, and each reader verifies it. Reading the bodies would cost a pass over all pages
that do not compress, and change only the time at which a damaged one is noticed. Only of two copies
of a page are the bodies read.

Every step is harmless if it is the last one: the arena changes only in `free_dropped`, by frees; an
arena of an older layout also by checksums for objects that have none.

Generations are serial numbers, compared by their distance (RFC 1982). A page that is older than
half their range could win against its successor; either may stay, see above.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from zswapd.core import crashpoints
from zswapd.core.allocators.frametable import HIGH_SHIFT, LOW_SHIFT
from zswapd.core.compress.base import LZ4, RAW
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import HEADER, HEADER_BYTES
from zswapd.core.pam.zpages import CHECK_MASK, CODEC_AT, GENERATION_HALF
from zswapd.core.pam.zv import BODY_CHECK, BODY_MASK

if TYPE_CHECKING:
    from zswapd.core.pam.base import Adopter
    from zswapd.core.pam.zv import Zv

_Q: Final = struct.Struct("=Q")
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
_SOME: Final = 0xFFF
"""Objects that are freed between two calls of `PageFrames.alive`, less one."""


@dataclass(slots=True)
class Findings:
    """What `recover` found beside whole pages.

    Attributes:
        torn: stores that were cut short.
        duplicates: pages found twice.
        damaged: objects that no death leaves.
        dropped: handles of the objects that `free_dropped` is to free.
    """

    torn: int = 0
    duplicates: int = 0
    damaged: int = 0
    dropped: list[int] = field(default_factory=list)


def recover(zv: Zv, index: Adopter) -> Findings:
    """Offer every page of an adopted allocator to an index; have zv count the pages that it takes.

    Raises:
        ArenaError: no memory for the index.
    """
    recovery = _Recovery(zv, index)
    zv.allocator.each_span(recovery.found_span)
    return recovery.findings


def free_dropped(zv: Zv, findings: Findings) -> int:
    """Free the objects that `recover` dropped, and the bodies that no page names.

    Returns:
        The number of these bodies.
    """
    allocator = zv.allocator
    for number, handle in enumerate(findings.dropped):
        allocator.free(handle)
        reach(crashpoints.TAKEOVER_DROPPED)
        if not number & _SOME:
            zv.frames.alive()
    findings.dropped = []
    return allocator.free_unclaimed()


class _Recovery:
    """One walk over the objects of a Zv.

    Args:
        zv: counts the pages that are kept.
        index: takes the pages in.

    Attributes:
        findings: so far.
    """

    def __init__(self, zv: Zv, index: Adopter) -> None:
        self._zv = zv
        self._index = index
        self._allocator = zv.allocator
        self._memory = zv.allocator.memory
        self._words64 = zv.frames.arena.words64
        self._page_size = zv.frames.page_size
        self._compressors = zv.compressors
        self._is_older = zv.frames.arena.is_older
        self.findings = Findings()

    def found_span(self, handle: int, size: int, count: int) -> None:
        """Keep or drop `count` objects in a row, each `size` bytes long."""
        for place, generation, oid, index, length, codec, pool in self._zv.survey(
            handle, size, count
        ):
            if generation and (codec <= LZ4 or codec in self._compressors):
                self._found_page(place, generation, oid, index, length, codec, pool)
            else:
                self._found_damaged(place, size)

    def _found_page(
        self, handle: int, generation: int, oid: int, index: int, length: int, codec: int, pool: int
    ) -> None:
        """Keep or drop the page at a handle, whose checksum is right."""
        if codec == RAW and not self._allocator.claim(self._body(handle)):
            self._drop_second_header(handle, self._index.find_page(pool, oid, index))
            return
        other = self._index.adopt_page(pool, oid, index, handle)
        reach(crashpoints.TAKEOVER_PAGE)
        if not other:
            self._zv.count_found(generation, codec, length)
        elif other > 0:
            self._settle(handle, other)
        else:
            self._drop(handle, disclaim=True)

    def _found_damaged(self, handle: int, size: int) -> None:
        """Drop an object, unless it is one of a layout before 5 that has no checksum.

        A whole page of that kind gets a checksum and is kept.
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

        Those have an object without a checksum; or one whose store was cut short before its
        generation was written, which is dropped here.
        """
        if not self._is_older or bool(check) == bool(generation):
            return False
        if not generation:
            self.findings.torn += 1
            if self.findings.torn > 1:  # one process, one store
                return False
            self.findings.dropped.append(handle)
        return True

    def _sign(self, handle: int, generation: int, length: int, codec: int) -> None:
        """Give an object of an older layout the checksum that a store gives it."""
        check = self._zv.check_of(handle, generation, length if codec <= RAW else 0)
        self._words64[handle >> 3] = check << LOW_SHIFT | generation << HIGH_SHIFT

    def _drop(self, handle: int, *, disclaim: bool) -> None:
        """Drop a damaged object."""
        self.findings.damaged += 1
        self.findings.dropped.append(handle)
        if disclaim:
            self._disclaim(handle)

    def _drop_second_header(self, handle: int, other: int) -> None:
        """Drop the header of a raw page whose body is claimed already, or is no body.

        Where compaction died with two headers of one page, they are the same to the last byte, and
        `other` is the first one.
        """
        size = HEADER_BYTES + 8
        self.findings.dropped.append(handle)
        if other > 0 and self._memory[other : other + size] == self._memory[handle : handle + size]:
            self.findings.duplicates += 1
        else:
            self.findings.damaged += 1

    def _settle(self, handle: int, other: int) -> None:
        """Keep one of two copies of a page and drop the other; the index has `other`."""
        _check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, handle)
        _check, its_generation, _oid, _index, its_length, its_codec, _pool = _unpack_header(
            self._memory, other
        )
        self.findings.duplicates += 1
        loser = handle
        if not self._body_is_whole(handle):
            self.findings.damaged += 1
        elif not self._body_is_whole(other):
            self.findings.damaged += 1
            loser = other
        elif 0 < (generation - its_generation) & CHECK_MASK < GENERATION_HALF:
            loser = other
        if loser == other:
            self._index.replace_page(pool, oid, index, other, handle)
            self._zv.uncount(its_codec, its_length)
            self._zv.count_found(generation, codec, length)
        self._disclaim(loser)
        self.findings.dropped.append(loser)
        reach(crashpoints.TAKEOVER_DUPLICATE)

    def _body(self, handle: int) -> int:
        """Return the handle of a raw page's body."""
        word: int = _Q.unpack_from(self._memory, handle + HEADER_BYTES)[0]
        return word & BODY_MASK

    def _disclaim(self, handle: int) -> None:
        if self._memory[handle + CODEC_AT] == RAW:
            self._allocator.disclaim(self._body(handle))

    def _body_is_whole(self, handle: int) -> bool:
        """Say whether the body of a page matches its checksum, if the page has both."""
        (word,) = _Q.unpack_from(self._memory, handle + HEADER_BYTES)
        if self._memory[handle + CODEC_AT] != RAW or not word >> 40:
            return True
        body = word & BODY_MASK
        return bool(
            word >> 40 == (_digest(self._memory[body : body + self._page_size]) & BODY_CHECK or 1)
        )
