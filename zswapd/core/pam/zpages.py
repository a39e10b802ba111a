# SPDX-License-Identifier: GPL-2.0-or-later
"""The stored form of pages, common to both halves: compression, header, checksum, object.

A store writes data, then header, then checksum and generation. The last two are one 64-bit word,
written by one store. So an object whose store was cut short is not live, and a death at any
instruction leaves no half of a live word.

The checksum covers header and data. If checksums are switched off, it covers only the header of a
compressed page. It always covers same-filled and raw pages whole, because their data is one word. A
successor builds the index from the headers and must not take one page for another.

LZ4 pages and same-filled pages go through `_pages.Packer` where it exists: the same work in C. The
Python code here is its reference, and handles all other pages.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from zswapd.core import crashpoints
from zswapd.core.allocators.base import DEAD_CHECK
from zswapd.core.allocators.frametable import HIGH_SHIFT, LOW_SHIFT
from zswapd.core.compress.base import LZ4, RAW, SAME_FILLED
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import CLIENT_MASK, CLIENT_SHIFT, HEADER, HEADER_BYTES, PageKey
from zswapd.errors import CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor
    from zswapd.core.pam._pages import Packer

CHECK_MASK: Final = 0xFFFFFFFF
GENERATION_HALF: Final = 1 << 31
"""Half the range of generations. A generation ahead by a smaller distance is the later one."""
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
_pack_rest: Final = struct.Struct("=QIHBB").pack_into
"""Packs the part of a header that follows the live word."""
CODEC_AT: Final = 22
"""Offset of the codec in the header, in bytes."""
NOT_THE_PAGE: Final = -1
WRONG_CHECKSUM: Final = -2
NO_LZ4_BLOCK: Final = -3
NO_PAGE: Final = -4
"""Results of `Packer.unpack` and `Packer.weigh` that are no codec or length.

They are constants here, not imported, so that compiled code has numbers.
"""
Page = tuple[int, int, int, int, int, int, int]
"""Contents of a possible page: handle, generation, oid, index, bytes of data, codec, pool."""
_WRONG: Final = {
    NOT_THE_PAGE: "its header is not that of the page",
    WRONG_CHECKSUM: "its checksum is wrong",
    NO_LZ4_BLOCK: "a stored page is no LZ4 block",
}


def make_packer(memory: memoryview, page_size: int) -> Packer | None:
    """Return a packer for an arena, or None if `_pages` was not built or ZSWAPD_PURE is set.

    All functions work without a packer.
    """
    if os.environ.get("ZSWAPD_PURE"):
        return None
    try:
        from zswapd.core.pam._pages import Packer
    except ImportError:
        return None
    return Packer(memory, page_size)


class ZPages:
    """The pages of one allocator.

    Args:
        allocator: provides the objects.
        frames: the frames of the allocator's arena.
        compressor: codec for new pages.
        compressors: codecs for pages already stored, by codec number.
        checksum: the checksum in a header covers the data of compressed pages too.

    Attributes:
        allocator, frames, compressors: as above.
        compressor, checksum: as above. They can be set at any time, for later stores.
        packer: handles LZ4 pages in C. None if Python handles them.
    """

    def __init__(
        self,
        allocator: Allocator,
        frames: PageFrames,
        compressor: Compressor,
        compressors: Mapping[int, Compressor],
        *,
        checksum: bool,
    ) -> None:
        self.allocator = allocator
        self._alloc = allocator.alloc
        self.frames = frames
        self._memory = allocator.memory
        self._words64 = frames.arena.words64
        self._page_size = frames.page_size
        self._max_data = allocator.max_shared - HEADER_BYTES
        # One call reads the first, middle and last word of a page. Nearly all pages that are not
        # same-filled differ in these words, so the test costs them 40 ns.
        half = frames.page_size // 2 - 8
        self._probe = struct.Struct(f"=Q{half - 8}xQ{half}xQ").unpack_from
        self._words_a_page = frames.page_size // 8
        self.compressors = compressors
        self._compressor = compressor
        self.checksum = checksum
        self.packer: Packer | None = make_packer(allocator.memory, frames.page_size)
        self._packs_lz4 = compressor is compressors.get(LZ4)
        self._codec = SAME_FILLED
        self._data = b""
        self._generation = 0
        self._corrupted = 0

    @property
    def compressor(self) -> Compressor:
        """The codec for new pages."""
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        self._compressor = compressor
        # Only the LZ4 codec of `compressors`: another compressor may have the same number.
        self._packs_lz4 = compressor is self.compressors.get(LZ4)

    # The page path.

    def is_same_filled(self, page: memoryview) -> bool:
        """Return whether a page is one machine word repeated."""
        first, middle, last = self._probe(page)
        return bool(
            first == middle == last and page.tobytes() == bytes(page[:8]) * self._words_a_page
        )

    def pack(self, page: memoryview) -> int:
        """Compress a page; return its length in bytes, times 256, plus its codec.

        The result stays here for `write_packed` until the next call.
        """
        packer = self.packer
        if packer is not None and self._packs_lz4:
            self._codec = -1
            return packer.pack(page)
        if self.is_same_filled(page):
            self._codec, self._data = SAME_FILLED, bytes(page[:8])
        else:
            self._codec, self._data = self._compressor.codec, self._compressor.compress(page)
        return len(self._data) << 8 | self._codec

    def write_packed(self, handle: int, pool: int, oid: int, index: int) -> None:
        """Store the page that was packed last in a new object."""
        packer = self.packer
        if packer is None or self._codec >= 0:
            self.write(handle, pool, oid, index, self._codec, self._data)
            return
        self._generation = generation = self._generation % 0xFFFFFFFF + 1
        packer.commit(handle, pool, oid, index, generation, self.checksum, crashpoints.armed())

    def write(self, handle: int, pool: int, oid: int, index: int, codec: int, data: bytes) -> None:
        """Store a page in a new object: data, header, and last the live word."""
        memory = self._memory
        length = len(data)
        end = handle + HEADER_BYTES + length
        self._generation = generation = self._generation % 0xFFFFFFFF + 1
        memory[handle + HEADER_BYTES : end] = data
        reach(crashpoints.STORE_DATA)
        _pack_rest(memory, handle + 8, oid, index, length, codec, pool)
        reach(crashpoints.STORE_HEADER)
        check = self.check_of(handle, generation, length if self.checksum or codec <= RAW else 0)
        reach(crashpoints.STORE_CHECKED)
        self._words64[handle >> 3] = check << LOW_SHIFT | generation << HIGH_SHIFT
        reach(crashpoints.STORE_ALIVE)

    def check_of(self, handle: int, generation: int, length: int) -> int:
        """Return the checksum of an object's header and of `length` bytes behind it.

        The seed of the hash is the generation.
        """
        return (
            _digest(self._memory[handle + 8 : handle + HEADER_BYTES + length], generation)
            & CHECK_MASK
            or 1
        )

    def read(self, pampd: int, oid: int, index: int, out: memoryview) -> int:
        """Write the page into `out`, unless its codec is RAW; return the codec.

        Raises:
            CorruptedPageError: header, data or checksum are not those of that page (counted).
        """
        packer = self.packer
        if packer is not None:
            found = packer.unpack(pampd, oid, index, out)
            if found < 0:
                raise self.corruption(oid, index, _WRONG[found])
            if found <= LZ4:
                return found
        memory = self._memory
        check, generation, its_oid, its_index, length, codec, _pool = _unpack_header(memory, pampd)
        start = pampd + HEADER_BYTES
        if its_oid != oid or its_index != index or not generation:
            raise self.corruption(oid, index, _WRONG[NOT_THE_PAGE])
        if packer is None and not self.matches(pampd, check, generation, length):
            raise self.corruption(oid, index, _WRONG[WRONG_CHECKSUM])
        if codec > RAW:
            try:
                out[:] = self.compressors[codec].decompress(
                    memory[start : start + length], self._page_size
                )
            except (CorruptedPageError, KeyError) as error:
                raise self.corruption(oid, index, f"{error} (codec {codec})") from error
        elif codec == SAME_FILLED:
            out[:] = bytes(memory[start : start + 8]) * self._words_a_page
        return int(codec)

    def weigh(self, handle: int) -> int:
        """Return the codec of a page in bits 0-7, its length in bits 8-23, then its client.

        The result is NO_PAGE if there is no page, and WRONG_CHECKSUM if the page is damaged.
        """
        packer = self.packer
        if packer is not None:
            return packer.weigh(handle)
        check, generation, oid, _index, length, codec, _pool = _unpack_header(self._memory, handle)
        if not generation and check in (0, DEAD_CHECK):
            return NO_PAGE
        return (
            (oid >> CLIENT_SHIFT & CLIENT_MASK) << 24 | length << 8 | codec
            if self.matches(handle, check, generation, length)
            else WRONG_CHECKSUM
        )

    def survey(self, handle: int, size: int, count: int) -> list[Page]:
        """Return the contents of the headers of adjacent objects, each verified by its checksum.

        Dead objects are left out. For an object that is damaged or no page, all fields except the
        handle are 0.
        """
        packer = self.packer
        if packer is not None:
            return packer.survey(handle, size, count)
        pages: list[Page] = []
        for place in range(handle, handle + size * count, size):
            check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, place)
            if not generation and check == DEAD_CHECK:
                continue
            fits = length == 8 if codec <= RAW else 0 < length <= size - HEADER_BYTES
            if generation and fits and self.matches(place, check, generation, length):
                pages.append((place, generation, oid, index, length, codec, pool))
            else:
                pages.append((place, 0, 0, 0, 0, 0, 0))
        return pages

    def matches(self, handle: int, check: int, generation: int, length: int) -> bool:
        """Return whether an object matches its checksum; the body of a raw page is not read."""
        if check == self.check_of(handle, generation, length):
            return True
        # A page stored while checksums were off has a checksum of its header alone.
        return self._memory[handle + CODEC_AT] > RAW and check == self.check_of(
            handle, generation, 0
        )

    def corruption(self, oid: int, index: int, why: str) -> CorruptedPageError:
        """Count a damaged page and return the error for its reader."""
        self._corrupted += 1
        return CorruptedPageError(
            f"stored page (object {oid:#x}, index {index}) is damaged: {why}",
            hint="only the reader of this page gets an error; test the machine's memory",
        )

    # Off the page path.

    @property
    def newest(self) -> int:
        """The generation of the last store."""
        return self._generation

    def key_of(self, pampd: int) -> PageKey:
        """Return the contents of the page's header."""
        _check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, pampd)
        return PageKey(pool, oid, index, generation, length, codec)

    def compact(
        self, moved: Callable[[int, int, int, int, int], None], max_moves: int = 1 << 62
    ) -> int:
        """Pack pages together so that frames become free; return the number of frames freed.

        Bodies never move: a body shares its frame with no other object.

        Args:
            moved: called with (pool, oid, index, old pampd, new pampd) while both are valid.
            max_moves: pages to move at most.
        """

        def object_moved(old: int, new: int) -> None:
            _check, _generation, oid, index, _length, _codec, pool = _unpack_header(
                self._memory, new
            )
            moved(pool, oid, index, old, new)

        return self.allocator.compact(object_moved, max_moves)
