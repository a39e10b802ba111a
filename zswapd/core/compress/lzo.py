# SPDX-License-Identifier: GPL-2.0-or-later
"""LZO1X-1 (python-lzo): compresses as fast as LZ4, decompresses slower.

It is a little denser on some data.
"""

from __future__ import annotations

from typing import Final

import lzo

from zswapd.errors import CorruptedPageError

_compress: Final = lzo.compress
_decompress: Final = lzo.decompress


class Lzo:
    """LZO1X-1 without python-lzo's own header, since the page size is known.

    python-lzo takes `bytes` only, so each direction costs one copy.
    """

    name = "lzo"
    codec = 3

    def compress(self, page: memoryview) -> bytes:
        """Return the page as an LZO1X block."""
        data: bytes = _compress(bytes(page), 1, False)  # noqa: FBT003 - positional in python-lzo: level, header
        return data

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Return the page.

        Raises:
            CorruptedPageError: the block is damaged or is not a whole page.
        """
        try:
            page: bytes = _decompress(bytes(data), False, page_size)  # noqa: FBT003 - header, length
        except lzo.error as error:
            raise CorruptedPageError(f"a stored page is no LZO block: {error}") from error
        if len(page) != page_size:
            raise CorruptedPageError(
                f"a stored page decompresses to {len(page)} bytes instead of {page_size}"
            )
        return page
