# SPDX-License-Identifier: GPL-2.0-or-later
"""Zstandard (python-zstandard): a fifth to a third smaller than LZ4, five times slower both ways.

It is meant for pages that were not used for a long time (core/reclaim/recompress.py). As the codec
for new pages it works like the others.

An object has the frame without its first seven bytes, which are the same for all pages of a size.
They are the magic number, "single segment, no checksum, no dictionary", and the page size. So
damaged data cannot ask for more memory than a page.

Both contexts are made once, and a page's frame is decoded in one pass from buffer to buffer. After
the first page, which the self-test of every worker sends through, the library allocates no memory
except the bytes that it returns.

Level 3 takes 20 µs for a page of programs and text, and gives 61 % of its size (LZ4: 78 %). Level 9
takes 80 µs and gives 60 %.
"""

from __future__ import annotations

from typing import Final

import zstandard

from zswapd.errors import CorruptedPageError, InvariantError

_LEVEL: Final = 3
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_compress: Final = zstandard.ZstdCompressor(
    level=_LEVEL, write_checksum=False, write_content_size=True
).compress
_decompress: Final = zstandard.ZstdDecompressor().decompress


def _head(page_size: int) -> bytes:
    """Return the first bytes of the frame of every page of that size."""
    if page_size < 256 + (1 << 16):
        return _MAGIC + b"\x60" + (page_size - 256).to_bytes(2, "little")
    return _MAGIC + b"\xa0" + page_size.to_bytes(4, "little")


class Zstd:
    """Zstandard frames without their head."""

    name = "zstd"
    codec = 4

    def __init__(self) -> None:
        self._heads = {size: _head(size) for size in (4096, 16384, 65536)}  # Linux's page sizes

    def compress(self, page: memoryview) -> bytes:
        """Return the page's frame without its head.

        Raises:
            InvariantError: the library makes frames with another head. The self-test detects that
                before any page is served.
        """
        data: bytes = _compress(page)
        head = self._heads.get(len(page)) or _head(len(page))
        if not data.startswith(head):
            raise InvariantError(
                f"zstandard {zstandard.__version__} begins a frame with {data[: len(head)].hex()}"
            )
        return data[len(head) :]

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Return the page.

        Raises:
            CorruptedPageError: the frame is damaged or is not a whole page.
        """
        try:
            page: bytes = _decompress(
                b"".join((self._heads.get(page_size) or _head(page_size), data))
            )
        except zstandard.ZstdError as error:
            raise CorruptedPageError(f"a stored page is no zstd frame: {error}") from error
        return page
