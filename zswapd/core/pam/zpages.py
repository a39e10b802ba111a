# SPDX-License-Identifier: GPL-2.0-or-later
"""What both halves do with a page.

Compress it, put it behind a header into an object, and get it back unharmed.

Order of a store: data, then header, then checksum and generation, which are one 64-bit word, by one
store. A store cut short is therefore no live object, and no death leaves half a live word.

The checksum covers header and data. Where checksums are switched off, it covers the header of a
compressed page alone, and all of the others, whose data is one word: a successor makes the index
from headers, and must not take one page for another.

LZ4 and same-filled pages go through `_pages.Packer` where there is one: the same, in C. The Python
code here is its reference, and does all the rest.
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
from zswapd.core.pam.base import HEADER, HEADER_BYTES, PageKey
from zswapd.errors import CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.core.allocators.base import Allocator
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.compress.base import Compressor
    from zswapd.core.pam._pages import Packer

CHECK_MASK: Final = 0xFFFFFFFF
GENERATION_HALF: Final = 1 << 31
"""Half the range of serial numbers: at a smaller distance ahead, a generation is the later one."""
_unpack_header: Final = HEADER.unpack_from
_digest: Final = xxh3_64_intdigest
_pack_rest: Final = struct.Struct("=QIHBB").pack_into
"""Of a header, what is behind the live word."""
CODEC_AT: Final = 22
"""Place of the codec in the header."""
NOT_THE_PAGE: Final = -1
WRONG_CHECKSUM: Final = -2
NO_LZ4_BLOCK: Final = -3
NO_PAGE: Final = -4
"""What `Packer.unpack` and `weigh` return instead of a codec or a length.

Constants, so that compiled code has numbers.
"""
Page = tuple[int, int, int, int, int, int, int]
"""An object that may be a page: handle, generation, object, index, bytes of data, codec, pool."""
_WRONG: Final = {
    NOT_THE_PAGE: "its header is not that of the page",
    WRONG_CHECKSUM: "its checksum is wrong",
    NO_LZ4_BLOCK: "a stored page is no LZ4 block",
}


def make_packer(memory: memoryview, page_size: int) -> Packer | None:
    """Return a packer for an arena; None if `_pages` was not built, or if ZSWAPD_PURE is set.

    Everything works without a packer.
    """
    if os.environ.get("ZSWAPD_PURE"):
        return None
    try:
        from zswapd.core.pam._pages import Packer
    except ImportError:
        return None
    return Packer(memory, page_size)


class ZPages:
    """Pages in one allocator.

    Args:
        allocator: of the objects.
        frames: of its arena.
        compressor: for new pages.
        compressors: by codec number, for pages already there.
        checksum: have the checksums in headers cover the data of compressed pages too.

    Attributes:
        allocator, frames, compressors: as above.
        compressor, checksum: as above; settable at any time, for pages to come.
        packer: does LZ4 pages; None to have all of it done in Python.
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
        # First, middle and last word of a page in one call: pages that differ there, nearly all,
        # cost 40 ns.
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
        """What compresses new pages."""
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        self._compressor = compressor
        # The LZ4 that reads pages, not something else by its number.
        self._packs_lz4 = compressor is self.compressors.get(LZ4)

    # The page path.

    def is_same_filled(self, page: memoryview) -> bool:
        """Say whether a page is one machine word repeated."""
        first, middle, last = self._probe(page)
        return bool(
            first == middle == last and page.tobytes() == bytes(page[:8]) * self._words_a_page
        )

    def pack(self, page: memoryview) -> int:
        """Compress a page; return its length in bytes, times 256, plus its codec.

        `write_packed` knows it until the next.
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
        """Make a new object the page that was packed last."""
        packer = self.packer
        if packer is None or self._codec >= 0:
            self.write(handle, pool, oid, index, self._codec, self._data)
            return
        self._generation = generation = self._generation % 0xFFFFFFFF + 1
        packer.commit(handle, pool, oid, index, generation, self.checksum, crashpoints.armed())

    def write(self, handle: int, pool: int, oid: int, index: int, codec: int, data: bytes) -> None:
        """Make a new object a page: its data, and the header that brings it to life."""
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

        The generation is in it as the seed.
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
        """Return the length of a page's data, times 256, plus its codec.

        NO_PAGE or WRONG_CHECKSUM if that is so.
        """
        packer = self.packer
        if packer is not None:
            return packer.weigh(handle)
        check, generation, _oid, _index, length, codec, _pool = _unpack_header(self._memory, handle)
        if not generation and check in (0, DEAD_CHECK):
            return NO_PAGE
        return (
            length << 8 | codec
            if self.matches(handle, check, generation, length)
            else WRONG_CHECKSUM
        )

    def survey(self, handle: int, size: int, count: int) -> list[Page]:
        """Return what the headers of objects in a row say, each verified by its checksum.

        Dead objects are left out. Of an object that is no page, or a damaged one, all but the
        handle is 0.
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
        """Say whether an object matches its checksum; a raw page's body is not looked at."""
        if check == self.check_of(handle, generation, length):
            return True
        # Stored while checksums were off: of the header alone.
        return self._memory[handle + CODEC_AT] > RAW and check == self.check_of(
            handle, generation, 0
        )

    def corruption(self, oid: int, index: int, why: str) -> CorruptedPageError:
        """Count a damaged page and return the error for its reader."""
        self._corrupted += 1
        return CorruptedPageError(
            f"stored page (object {oid:#x}, index {index}) is damaged: {why}",
            hint="only its reader is hurt; test the machine's memory",
        )

    # Off the page path.

    @property
    def newest(self) -> int:
        """The serial number of the last store."""
        return self._generation

    def key_of(self, pampd: int) -> PageKey:
        """Return what the page's header says."""
        _check, generation, oid, index, length, codec, pool = _unpack_header(self._memory, pampd)
        return PageKey(pool, oid, index, generation, length, codec)

    def compact(
        self, moved: Callable[[int, int, int, int, int], None], max_moves: int = 1 << 62
    ) -> int:
        """Pack pages together; `moved` gets (pool, oid, index, old pampd, new pampd).

        Returns the frames set free.

        Frames of raw pages never move: nothing shares them.
        """

        def object_moved(old: int, new: int) -> None:
            _check, _generation, oid, index, _length, _codec, pool = _unpack_header(
                self._memory, new
            )
            moved(pool, oid, index, old, new)

        return self.allocator.compact(object_moved, max_moves)
