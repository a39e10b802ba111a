# SPDX-License-Identifier: GPL-2.0-or-later
"""Page accessible memory: what tmem asks of whoever keeps a page.

The header of every stored object, and reasons to refuse.

The header, 24 bytes before the data (zcache had zv_hdr and zbud_hdr for the same purpose):

    0   u32 checksum    of everything behind it, header and data; of the header alone if checksums are
                        off and the data is compressed; never 0 (but in arenas of older layouts, if
                        checksums were off there)
    4   u32 generation  serial number of the store, never 0: of two copies of a page, the later one counts
    8   u64 oid         object in the pool
    16  u32 index       page in the object
    20  u16 length      bytes of data behind the header
    22  u8  codec       how the data is compressed (core/compress/base.py)
    23  u8  pool        tmem pool

It names the page, so that eviction can say what it evicts and a successor can rebuild the index
from the arena alone. The generation and the checksum together are the allocators' live word,
which is written last, by one 64-bit store.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.compress.base import Compressor

HEADER = struct.Struct("=IIQIHBB")
HEADER_BYTES: Final = 24

MAX_POOLS: Final = 256
MAX_OID: Final = (1 << 64) - 1
MAX_INDEX: Final = (1 << 32) - 1
NO_ROOM: Final = -1
"""What `RewritingPam.rewrite` returns when there is no room for the copy just now."""
NO_NEED: Final = -2
"""The same when a page has the codec already, or none."""


class RejectReason(enum.IntEnum):
    """Why a store was refused. The names are zcache's and zswap's where they mean the same."""

    COMPRESS_POOR = 1
    """The page compresses to more than zv_max_zsize, and poor pages are not wanted."""
    MEAN_COMPRESS_POOR = 2
    """It is above zv_max_mean_zsize while the pool's mean is too, and poor pages are not wanted."""
    POOL_LIMIT_HIT = 3
    """The pool holds pool.limit bytes."""
    POLICY_PERCENT_EXCEEDED = 4
    """The pool holds zv_page_count_policy_percent of the system's memory."""
    FAILED_ALLOC = 5
    """The reserve of populated frames is empty; it is refilled off the page path."""
    FAILED_OBJNODE = 6
    """The reserve of index nodes is empty; likewise."""
    FROZEN = 7
    """The front end is frozen."""
    INDEX_LIMIT = 8
    """The page's number is above what an index can hold."""

    @property
    def errno_(self) -> int:
        """The errno that a writer gets: ENOSPC when it is a matter of room, else EIO."""
        return errno.EIO if self in _NOT_ROOM else errno.ENOSPC


_NOT_ROOM = frozenset(
    {
        RejectReason.FROZEN,
        RejectReason.INDEX_LIMIT,
        RejectReason.COMPRESS_POOR,
        RejectReason.MEAN_COMPRESS_POOR,
    }
)


@dataclass(frozen=True, slots=True)
class PageKey:
    """What a header says about the page behind it."""

    pool: int
    oid: int
    index: int
    generation: int
    length: int
    """Bytes of data behind the header."""
    codec: int


class Adopter(Protocol):
    """The index, as a back end sees it that finds its pages again."""

    def adopt_page(self, pool: int, oid: int, index: int, pampd: int) -> int:
        """Take a page in if its place is empty.

        Returns:
            0, the pampd that has the place, or a negative number if there can be no such page.

        Raises:
            ArenaError: the index has no memory.
        """

    def find_page(self, pool: int, oid: int, index: int) -> int:
        """Return the pampd of a page, or 0."""

    def replace_page(self, pool: int, oid: int, index: int, old: int, new: int) -> bool:
        """Let `new` stand for a page if `old` does; return whether it did."""


class Pam(Protocol):
    """A back end that keeps pages.

    A pampd (page descriptor) is an opaque machine word above 0 that finds one again.
    """

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page.

        Args:
            pool: tmem pool, below MAX_POOLS.
            oid: object, at most MAX_OID.
            index: page in the object, at most MAX_INDEX.
            page: its bytes.
            replacing: an older copy will be freed right after, so limits on the total do not apply.

        Returns:
            The pampd, or the negated RejectReason.
        """

    def get(self, pampd: int, oid: int, index: int, out: memoryview) -> None:
        """Write the page into `out`.

        Raises:
            CorruptedPageError: what is kept there is not that page, whole.
        """

    def free(self, pampd: int) -> None:
        """Let go of a page."""

    def key_of(self, pampd: int) -> PageKey:
        """Return what the page's header says."""

    def compact(self, moved: Callable[[int, int, int, int, int], None], max_moves: int) -> int:
        """Pack pages together.

        Args:
            moved: called with (pool, oid, index, old pampd, new pampd) while both are valid.
            max_moves: stop after so many pages.

        Returns:
            Frames set free.
        """


class RewritingPam(Pam, Protocol):
    """A back end that can keep a page in another form."""

    def rewrite(self, pampd: int, compressor: Compressor, gain_percent: int) -> int:
        """Make a copy of a page with another codec, if that is worthwhile.

        Args:
            pampd: the page, which stays; whoever lets the copy stand for it frees it.
            compressor: makes the copy.
            gain_percent: of its bytes, how many it has to save at least.

        Returns:
            The copy's pampd; 0 if it is not worthwhile; NO_NEED; NO_ROOM.

        Raises:
            CorruptedPageError: the page is damaged.
        """
