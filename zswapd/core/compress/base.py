# SPDX-License-Identifier: GPL-2.0-or-later
"""What a compressor is.

The codec's number stands in every stored object's header, so numbers are for ever: never reuse one.
"""

from __future__ import annotations

from typing import Final, Protocol

SAME_FILLED: Final = 0
"""Number kept in the header of a page that is one machine word repeated; the word is all its data.
"""
RAW: Final = 1
"""Number kept in the header of a page that is stored as it is."""
FIRST_CODEC: Final = 2
LZ4: Final = 2
"""Number of LZ4 blocks, which `core/pam/_pages.c` makes and reads too."""


class Compressor(Protocol):
    """One algorithm.

    Attributes:
        name: what the configuration calls it.
        codec: its number in object headers.
    """

    name: str
    codec: int

    def compress(self, page: memoryview) -> bytes:
        """Return the compressed bytes of a page.

        They may be longer than the page (4096 random bytes become 4114 or 4116).
        """

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Return the page.

        Raises:
            CorruptedPageError: `data` is not what `compress` made of a page of that size.
        """
