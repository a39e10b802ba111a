# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of zv's pages: a successor finds them again in the arena that a dead process left.

`recover` walks the objects of an adopted allocator and offers each page to the index.
`free_dropped` is the last step. A death leaves these things beside whole pages:

- Two objects for one page. A store died after the new copy became live and before it freed the old
  one, or a compaction did. Either copy may stay, since the store was not answered. Recovery keeps
  the later generation if its body is whole.
- A body that no header names. A store or a free of an incompressible page was cut short. Recovery
  frees the body.
- In an arena of an older layout, one object with a checksum and no generation. A store was cut
  short between its last two words (*torn*). Recovery frees the object. It also gives a checksum to
  objects of that arena without one.

A death leaves nothing else, since a store writes the live word last. Anything else is memory that
has changed, and the object is *damaged*: a wrong checksum, a length beyond the object, an unknown
codec, or a page that does not exist. Recovery never trusts a damaged object. It may have been any
page. So the caller must mark every missing page as lost before `free_dropped` frees the damaged
objects; otherwise a missing page would read as zeros.

Recovery verifies the checksum of every object, which takes 0.2 µs a page. The index is built from
headers. A wrong header would cost two pages: its own, which would be missing, and the
one that it would replace.

Recovery does not read bodies. No page is found by the contents of its body. The checksum of a body
is in the object of its header, and each reader verifies it. Reading all bodies would take a pass
over all incompressible pages, and would only report damage earlier. Recovery reads bodies only to
choose between two copies of a page.

Recovery may die after any step without harm. The arena changes only in `free_dropped`, by frees. An
arena of an older layout also changes where objects get their missing checksums.

Generations are serial numbers, compared by their distance (RFC 1982). A copy that is older than
half the range could win against its successor. Either copy may stay, see above.
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
"""Number of objects freed between two calls of `PageFrames.alive`, less one."""


@dataclass(slots=True)
class Findings:
    """The results of `recover`, apart from whole pages.

    Attributes:
        torn: stores that were cut short.
        duplicates: pages found twice.
        damaged: objects in a state that no death leaves.
        dropped: handles of the objects that `free_dropped` must free.
    """

    torn: int = 0
    duplicates: int = 0
    damaged: int = 0
    dropped: list[int] = field(default_factory=list)


def recover(zv: Zv, index: Adopter) -> Findings:
    """Offer every page of an adopted allocator to an index; zv counts the pages that it takes.

    Raises:
        ArenaError: the index has no memory.
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
        zv: the back end, which counts the pages that are kept.
        index: takes the pages in.

    Attributes:
        findings: the results so far.
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
        """Keep or drop each of `count` adjacent objects of `size` bytes."""
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
        """Keep or drop the page at a handle; its checksum is right."""
        if codec == RAW and not self._allocator.claim(self._body(handle)):
            self._drop_second_header(handle, self._index.find_page(pool, oid, index))
            return
        other = self._index.adopt_page(pool, oid, index, handle)
        reach(crashpoints.TAKEOVER_PAGE)
        if not other:
            self._zv.count_found(oid, generation, codec, length)
        elif other > 0:
            self._settle(handle, other)
        else:
            self._drop(handle, disclaim=True)

    def _found_damaged(self, handle: int, size: int) -> None:
        """Drop an object, or keep it if it is a whole page of a layout before 5 without a checksum.

        A kept page gets its checksum here.
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
        """Return whether an object without a valid checksum is normal for a layout before 5.

        Those layouts have live objects without a checksum. They may also have one object whose
        store was cut short before the generation was written. That object is dropped here.
        """
        if not self._is_older or bool(check) == bool(generation):
            return False
        if not generation:
            self.findings.torn += 1
            if self.findings.torn > 1:  # a process has one store under way
                return False
            self.findings.dropped.append(handle)
        return True

    def _sign(self, handle: int, generation: int, length: int, codec: int) -> None:
        """Give an object of an older layout the checksum that a store gives it."""
        check = self._zv.check_of(handle, generation, length if codec <= RAW else 0)
        self._words64[handle >> 3] = check << LOW_SHIFT | generation << HIGH_SHIFT

    def _drop(self, handle: int, *, disclaim: bool) -> None:
        self.findings.damaged += 1
        self.findings.dropped.append(handle)
        if disclaim:
            self._disclaim(handle)

    def _drop_second_header(self, handle: int, other: int) -> None:
        """Drop the header of a raw page if its body is already claimed or is no body.

        If a compaction died with two headers of one page, both have the same bytes. `other` is the
        pampd of the first one.
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
            self._zv.uncount(oid, its_codec, its_length)
            self._zv.count_found(oid, generation, codec, length)
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
        """Return False if the page has a body with a checksum that does not match."""
        (word,) = _Q.unpack_from(self._memory, handle + HEADER_BYTES)
        if self._memory[handle + CODEC_AT] != RAW or not word >> 40:
            return True
        body = word & BODY_MASK
        return bool(
            word >> 40 == (_digest(self._memory[body : body + self._page_size]) & BODY_CHECK or 1)
        )
