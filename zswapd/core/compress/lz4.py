# SPDX-License-Identifier: GPL-2.0-or-later
"""LZ4 blocks (python-lz4). LZ4 is the fastest to decompress, so it is the default for swap."""

from __future__ import annotations

from typing import Final

import lz4.block

from zswapd.core.compress.base import LZ4
from zswapd.errors import CorruptedPageError

_compress: Final = lz4.block.compress
_decompress: Final = lz4.block.decompress


class Lz4:
    """LZ4's fast mode, without a stored length, since the page size is known."""

    name = "lz4"
    codec = LZ4

    def compress(self, page: memoryview) -> bytes:
        """Return the page as an LZ4 block."""
        data: bytes = _compress(page, "default", False)  # noqa: FBT003 - store_size; a name costs as much as half the checksum
        return data

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Return the page.

        Raises:
            CorruptedPageError: the block is damaged or is not a whole page.
        """
        try:
            page: bytes = _decompress(data, page_size)
        except lz4.block.LZ4BlockError as error:
            raise CorruptedPageError(f"a stored page is no LZ4 block: {error}") from error
        if len(page) != page_size:
            raise CorruptedPageError(
                f"a stored page decompresses to {len(page)} bytes instead of {page_size}"
            )
        return page
