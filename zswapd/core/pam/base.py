# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end interface of tmem (page accessible memory), the object header, and reject reasons.

Every stored object begins with a header of 24 bytes. In zcache, zv_hdr and zbud_hdr had the same
purpose. The layout:

    0   u32 checksum    XXH3 of all that follows, header and data. Never 0. It covers the header
                        alone if checksums are off and the data is compressed. Older layouts have
                        0 here if checksums were off.
    4   u32 generation  serial number of the store, never 0. Of two copies the later one counts.
    8   u64 oid         object in the pool
    16  u32 index       page in the object
    20  u16 length      bytes of data behind the header
    22  u8  codec       compression of the data (core/compress/base.py)
    23  u8  pool        tmem pool

The header names the page. So eviction can name the pages that it evicts, and a successor can
rebuild the index from the arena alone.

The checksum and the generation together are the live word of the allocators. A store writes them
last, by one 64-bit store.
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
MAX_CLIENTS: Final = 32
"""Number of clients that have an account. A client is one swap file."""
CLIENT_SHIFT: Final = 8
"""The client of a page is `oid >> CLIENT_SHIFT`, as frontswap makes oids."""
CLIENT_MASK: Final = MAX_CLIENTS - 1
NO_ROOM: Final = -1
"""The result of `RewritingPam.rewrite` if there is no room for the copy at the moment."""
NO_NEED: Final = -2
"""The result of `RewritingPam.rewrite` if the page has the codec already, or has none."""


class RejectReason(enum.IntEnum):
    """The reason for refusing a store.

    Names are those of zcache and zswap where they mean the same.
    """

    COMPRESS_POOR = 1
    """The page compresses to more than zv_max_zsize, and `keep_poor` is off."""
    MEAN_COMPRESS_POOR = 2
    """The page and the mean of the pool are both above zv_max_mean_zsize, and `keep_poor` is off.
    """
    POOL_LIMIT_HIT = 3
    """The pool holds pool.limit bytes."""
    POLICY_PERCENT_EXCEEDED = 4
    """The pool holds zv_page_count_policy_percent of the system's memory."""
    FAILED_ALLOC = 5
    """The reserve of populated frames is empty. It is refilled off the page path."""
    FAILED_OBJNODE = 6
    """The reserve of index nodes is empty. It is refilled off the page path."""
    FROZEN = 7
    """The front end is frozen."""
    INDEX_LIMIT = 8
    """The page number is above the largest that an index can hold."""

    @property
    def errno_(self) -> int:
        """The errno that a writer gets: ENOSPC if room is missing, EIO for all other reasons."""
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
    """The contents of a header."""

    pool: int
    oid: int
    index: int
    generation: int
    length: int
    """Bytes of data behind the header."""
    codec: int


class Adopter(Protocol):
    """The index, as a back end uses it during recovery."""

    def adopt_page(self, pool: int, oid: int, index: int, pampd: int) -> int:
        """Enter a page if its place is empty.

        Returns:
            0 if the page was entered, the pampd that has the place, or a negative number if there
            can be no page with this name.

        Raises:
            ArenaError: the index has no memory.
        """

    def find_page(self, pool: int, oid: int, index: int) -> int:
        """Return the pampd of a page, or 0."""

    def replace_page(self, pool: int, oid: int, index: int, old: int, new: int) -> bool:
        """Replace `old` by `new` as the pampd of a page; return False if it has another pampd."""


class Pam(Protocol):
    """A back end that keeps pages.

    A pampd (page descriptor) is an opaque machine word above 0 that identifies a kept page.
    """

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page.

        Args:
            pool: tmem pool, below MAX_POOLS.
            oid: object, at most MAX_OID.
            index: page in the object, at most MAX_INDEX.
            page: bytes of the page.
            replacing: the caller frees an older copy right after, so limits on the total do not
                apply.

        Returns:
            The pampd, or the negated RejectReason.
        """

    def get(self, pampd: int, oid: int, index: int, out: memoryview) -> None:
        """Write the page into `out`.

        Raises:
            CorruptedPageError: the object is not that page, or is damaged.
        """

    def free(self, pampd: int) -> None:
        """Free a page."""

    def key_of(self, pampd: int) -> PageKey:
        """Return the contents of the page's header."""

    def compact(self, moved: Callable[[int, int, int, int, int], None], max_moves: int) -> int:
        """Pack pages together so that frames become free.

        Args:
            moved: called with (pool, oid, index, old pampd, new pampd) while both are valid.
            max_moves: pages to move at most.

        Returns:
            The number of frames freed.
        """


class RewritingPam(Pam, Protocol):
    """A back end that can store a page again with another codec, and keeps accounts."""

    def object_bytes(self, client: int) -> int:
        """Return the bytes that the objects of a client take, with headers."""

    def limit_hits(self, client: int) -> int:
        """Return the number of pages that were refused because of a client's limit."""

    def rewrite(self, pampd: int, compressor: Compressor, gain_percent: int) -> int:
        """Make a copy of a page with another codec, if that saves enough.

        Args:
            pampd: the page. It stays; the caller frees it after the index has the copy.
            compressor: the codec of the copy.
            gain_percent: share of the page's bytes that the copy must save at least.

        Returns:
            The pampd of the copy, 0 if the copy would save too little, NO_NEED or NO_ROOM.

        Raises:
            CorruptedPageError: the page is damaged.
        """
